/** The client's side of virtual machines. See `client.ts`. */
import type { HypervisorName, MachineCloneBody, MachineImportBody, MachineInfo, MachineSetting } from './machine-schemas.js';
import type { JobInfo, RemoveResult } from './schemas.js';

export interface MachineClient {
  list(query: { readonly container?: string; readonly operationId?: string; readonly power?: boolean }): Promise<MachineInfo[]>;
  show(path: string): Promise<MachineInfo>;
  clone(body: MachineCloneBody): Promise<JobInfo>;
  startImport(body: MachineImportBody): Promise<JobInfo>;
  get(path: string, key: string | null): Promise<MachineSetting[]>;
  set(path: string, settings: readonly MachineSetting[]): Promise<MachineInfo>;
  register(path: string, hypervisor: HypervisorName | null): Promise<MachineInfo>;
  unregister(path: string): Promise<MachineInfo>;
  start(path: string): Promise<MachineInfo>;
  stop(path: string, options: { readonly force: boolean; readonly timeoutSeconds: number }): Promise<MachineInfo>;
  remove(path: string, options: { readonly force: boolean }): Promise<RemoveResult>;
}

/** How the calls are made; `moreMs`: what may come on top of the usual time for an answer. */
export type Call = <T>(method: 'GET' | 'POST' | 'DELETE', url: string, body?: object, moreMs?: number) => Promise<T>;

export function createMachineClient(call: Call): MachineClient {
  const query = (fields: Readonly<Record<string, string>>): string => new URLSearchParams(fields).toString();
  return {
    list: ({ container, operationId, power }) => call('GET', `/v1/machines?${query({ ...(container === undefined ? {} : { container }), ...(operationId === undefined ? {} : { operationId }), power: String(power ?? false) })}`),
    show: (path) => call('GET', `/v1/machines/show?${query({ path })}`),
    clone: (body) => call('POST', '/v1/machines/clones', body),
    startImport: (body) => call('POST', '/v1/machines/imports', body),
    get: (path, key) => call('GET', `/v1/machines/settings?${query({ path, ...(key === null ? {} : { key }) })}`),
    set: (path, settings) => call('POST', '/v1/machines/settings', { path, settings }),
    register: (path, hypervisor) => call('POST', '/v1/machines/register', { path, hypervisor }),
    unregister: (path) => call('POST', '/v1/machines/unregister', { path }),
    start: (path) => call('POST', '/v1/machines/start', { path }),
    stop: (path, options) => call('POST', '/v1/machines/stop', { path, ...options }, options.timeoutSeconds * 1000),
    remove: (path, options) => call('DELETE', `/v1/machines?${query({ path, force: String(options.force) })}`),
  };
}
