/** The client's side of exports. See `client.ts`. */
import type { DiscoverBody, DiscoverResult, ExportInfo, PresentBody } from './export-schemas.js';
import type { Call } from './machine-client.js';

export interface ExportClient {
  present(body: PresentBody): Promise<ExportInfo>;
  withdraw(what: { readonly path?: string; readonly id?: string; readonly kind?: ExportInfo['kind']; readonly force: boolean }): Promise<ExportInfo>;
  list(): Promise<ExportInfo[]>;
  discover(body: DiscoverBody): Promise<DiscoverResult>;
}

export function createExportClient(call: Call): ExportClient {
  return {
    present: (body) => call('POST', '/v1/exports', body),
    withdraw: ({ path, id, kind, force }) => call('DELETE', `/v1/exports?${new URLSearchParams({
      ...(path === undefined ? {} : { path }), ...(id === undefined ? {} : { id }), ...(kind === undefined ? {} : { kind }), force: String(force),
    }).toString()}`),
    list: () => call('GET', '/v1/exports'),
    discover: (body) => call('POST', '/v1/exports/discover', body),
  };
}
