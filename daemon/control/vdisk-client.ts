/** The client's side of staged and deployed machines, and of block devices. See `client.ts`. */
import type { Call } from './machine-client.js';
import type { JobInfo } from './schemas.js';
import type { AttachedInfo, DeployBody, DeployedInfo, StageBody, StagedInfo } from './vdisk-schemas.js';

export interface VdiskClient {
  stage(body: StageBody): Promise<JobInfo>;
  deploy(body: DeployBody): Promise<JobInfo>;
  decommission(name: string, options: { readonly force: boolean; readonly timeoutSeconds: number }): Promise<JobInfo>;
  staged(): Promise<StagedInfo[]>;
  deployed(query: { readonly name?: string; readonly agent?: boolean }): Promise<DeployedInfo[]>;
  start(name: string): Promise<DeployedInfo>;
  attached(): Promise<AttachedInfo[]>;
  attach(path: string, readOnly: boolean): Promise<AttachedInfo>;
  detach(path: string): Promise<AttachedInfo>;
}

export function createVdiskClient(call: Call): VdiskClient {
  return {
    stage: (body) => call('POST', '/v1/staged', body),
    deploy: (body) => call('POST', '/v1/deployed', body),
    decommission: (name, options) => call('POST', '/v1/deployed/decommission', { name, ...options }),
    staged: () => call('GET', '/v1/staged'),
    deployed: ({ name, agent }) => call('GET', `/v1/deployed?${new URLSearchParams({ ...(name === undefined ? {} : { name }), agent: String(agent ?? false) }).toString()}`),
    start: (name) => call('POST', '/v1/deployed/start', { name }),
    attached: () => call('GET', '/v1/attached'),
    attach: (path, readOnly) => call('POST', '/v1/attached', { path, readOnly }),
    detach: (path) => call('POST', '/v1/attached/detach', { path }),
  };
}
