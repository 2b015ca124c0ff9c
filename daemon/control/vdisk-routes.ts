/** The rows of staged and deployed machines, and of block devices, in the table of `routes.ts`. */
import { Type } from '@sinclair/typebox';
import { checkPathInContainer, checkStorePath } from './paths.js';
import { route, type Route } from './route.js';
import { JobInfo, refTo } from './schemas.js';
import { AttachBody, AttachedInfo, DecommissionBody, DeployBody, DeployedBody, DeployedInfo, DeployedQuery, DetachBody, StageBody, StagedInfo } from './vdisk-schemas.js';

const STOP_SECONDS_DEFAULT = 120;

export const vdiskRoutes: readonly Route[] = [
  route({
    operationId: 'stageMachine', tag: 'vdisks', method: 'POST', url: '/v1/staged', summary: 'Begin to copy a machine that is off into a container file', status: 202,
    body: StageBody, response: refTo(JobInfo),
    handle: (service, { body }) => service.vdisks.stage({ ...body, source: checkStorePath(body.source), target: checkPathInContainer(body.target) }),
  }),
  route({
    operationId: 'listStaged', tag: 'vdisks', method: 'GET', url: '/v1/staged', summary: 'The container files of the store',
    response: Type.Array(refTo(StagedInfo)), handle: (service) => service.vdisks.staged(),
  }),
  route({
    operationId: 'deployMachine', tag: 'vdisks', method: 'POST', url: '/v1/deployed', summary: 'Begin to make a machine of a clone of a container file', status: 202,
    body: DeployBody, response: refTo(JobInfo),
    handle: (service, { body }) => service.vdisks.deploy({ ...body, source: checkStorePath(body.source), container: body.container === undefined || body.container === null ? null : checkStorePath(body.container) }),
  }),
  route({
    operationId: 'listDeployed', tag: 'vdisks', method: 'GET', url: '/v1/deployed', summary: 'The deployed machines, with their states from their hypervisors',
    query: DeployedQuery, response: Type.Array(refTo(DeployedInfo)), handle: (service, { query }) => service.vdisks.deployed({ name: query.name ?? null, agent: query.agent === 'true' }),
  }),
  route({
    operationId: 'startDeployed', tag: 'vdisks', method: 'POST', url: '/v1/deployed/start', summary: 'Start a deployed machine',
    body: DeployedBody, response: refTo(DeployedInfo), handle: (service, { body }) => service.vdisks.start(body.name),
  }),
  route({
    operationId: 'decommissionMachine', tag: 'vdisks', method: 'POST', url: '/v1/deployed/decommission', summary: 'Begin to undo a deployment: off, unregistered, unmounted, detached, its clone destroyed', status: 202,
    body: DecommissionBody, response: refTo(JobInfo),
    handle: (service, { body }) => service.vdisks.decommission(body.name, { force: body.force ?? false, timeoutMs: (body.timeoutSeconds ?? STOP_SECONDS_DEFAULT) * 1000 }),
  }),
  route({
    operationId: 'listAttached', tag: 'vdisks', method: 'GET', url: '/v1/attached', summary: 'What is attached as a block device of this host',
    response: Type.Array(refTo(AttachedInfo)), handle: (service) => service.vdisks.attached(),
  }),
  route({
    operationId: 'attachDisk', tag: 'vdisks', method: 'POST', url: '/v1/attached', summary: 'Attach a disk as a block device of this host',
    body: AttachBody, response: refTo(AttachedInfo), handle: (service, { body }) => service.vdisks.attach(checkStorePath(body.path), body.readOnly ?? false),
  }),
  route({
    operationId: 'detachDisk', tag: 'vdisks', method: 'POST', url: '/v1/attached/detach', summary: 'Give a block device back; one that is open goes with its last close, and the answer is in-use',
    body: DetachBody, response: refTo(AttachedInfo), handle: (service, { body }) => service.vdisks.detach(checkStorePath(body.path)),
  }),
];
