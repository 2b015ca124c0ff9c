/** The client's side of what is sent, received, exported and compared. See `client.ts`. */
import type { ExtentPage, InstantInfo, ReceiveInfo, ReceiveResult, TreeInfo } from './transfer-schemas.js';

export interface TransferClient {
  tree(reference: string): Promise<TreeInfo>;
  extents(reference: string, base: string | null, offsetBytes: number): Promise<ExtentPage>;
  instant(reference: string): Promise<InstantInfo>;
  releaseInstant(path: string): Promise<void>;
  receives(): Promise<ReceiveInfo[]>;
  receive(receiveId: number): Promise<ReceiveInfo>;
  receiveBegin(target: string, header: string): Promise<ReceiveInfo>;
  receiveRecords(receiveId: number, first: number, records: readonly Uint8Array[]): Promise<ReceiveInfo>;
  receivePause(receiveId: number): Promise<ReceiveInfo>;
  receiveFinish(receiveId: number): Promise<ReceiveResult>;
  receiveAbort(receiveId: number): Promise<void>;
}

/** How the calls are made. A body of bytes goes as it is, any other as JSON. */
export type Call = <T>(method: 'GET' | 'POST' | 'DELETE', url: string, body?: object) => Promise<T>;

export function createTransferClient(call: Call): TransferClient {
  const query = (fields: Readonly<Record<string, string>>): string => new URLSearchParams(fields).toString();
  return {
    tree: (reference) => call('GET', `/v1/trees?${query({ reference })}`),
    extents: (reference, base, offsetBytes) => call('GET', `/v1/extents?${query({ reference, ...(base === null ? {} : { base }), offsetBytes: String(offsetBytes) })}`),
    instant: (reference) => call('POST', '/v1/instants', { reference }),
    releaseInstant: async (path) => { await call('POST', '/v1/instants/release', { path }); },
    receives: () => call('GET', '/v1/receives'),
    receive: (receiveId) => call('GET', `/v1/receives/${receiveId}`),
    receiveBegin: (target, header) => call('POST', '/v1/receives', { target, header }),
    receiveRecords: (receiveId, first, records) => call('POST', `/v1/receives/${receiveId}/records?${query({ first: String(first) })}`, Buffer.concat(records)),
    receivePause: (receiveId) => call('POST', `/v1/receives/${receiveId}/pause`, {}),
    receiveFinish: (receiveId) => call('POST', `/v1/receives/${receiveId}/finish`, {}),
    receiveAbort: async (receiveId) => { await call('POST', `/v1/receives/${receiveId}/abort`, {}); },
  };
}
