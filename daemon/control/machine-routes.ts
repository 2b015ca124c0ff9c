/** The rows of virtual machines in the table of `routes.ts`. */
import { Type } from '@sinclair/typebox';
import {
  MachineBody, MachineCloneBody, MachineGetQuery, MachineImportBody, MachineInfo, MachineListQuery, MachineQuery, MachineRegisterBody, MachineRemoveQuery, MachineSetBody,
  MachineSetting, MachineStopBody,
} from './machine-schemas.js';
import { checkContainerName, checkPathInContainer, checkStorePath } from './paths.js';
import { refuseTwice, route, type Route } from './route.js';
import { JobInfo, RemoveResult, refTo } from './schemas.js';

const STOP_SECONDS_DEFAULT = 120;

export const machineRoutes: readonly Route[] = [
  route({
    operationId: 'listMachines', tag: 'machines', method: 'GET', url: '/v1/machines', summary: 'The machines of the store, of a container, or of an operation',
    query: MachineListQuery, response: Type.Array(refTo(MachineInfo)),
    handle: (service, { query }) => service.machines.list({
      container: query.container === undefined ? null : checkContainerName(query.container), operationId: query.operationId === undefined ? null : Number(query.operationId), power: query.power === 'true',
    }),
  }),
  route({
    operationId: 'showMachine', tag: 'machines', method: 'GET', url: '/v1/machines/show', summary: 'All about one machine, with its state from the hypervisor',
    query: MachineQuery, response: refTo(MachineInfo),
    handle: (service, { query }) => service.machines.show(checkStorePath(query.path)),
  }),
  route({
    operationId: 'cloneMachines', tag: 'machines', method: 'POST', url: '/v1/machines/clones', summary: 'Begin to clone a machine, or all in a container: customised, perhaps registered; all or none', status: 202,
    body: MachineCloneBody, response: refTo(JobInfo),
    handle: (service, { body }, caller) => {
      checkStorePath(body.source);
      for (const target of body.targets) checkStorePath(target);
      refuseTwice(body.targets);
      return service.machines.clone(body, caller.peer);
    },
  }),
  route({
    operationId: 'importMachine', tag: 'machines', method: 'POST', url: '/v1/machines/imports', summary: 'Begin to import the directory of a machine', status: 202,
    body: MachineImportBody, response: refTo(JobInfo),
    handle: (service, { body }) => service.machines.startImport({ ...body, target: checkPathInContainer(body.target) }),
  }),
  route({
    operationId: 'getMachineSettings', tag: 'machines', method: 'GET', url: '/v1/machines/settings', summary: 'Parameters of a machine, as its configuration has them',
    query: MachineGetQuery, response: Type.Array(refTo(MachineSetting)),
    handle: (service, { query }, caller) => service.machines.get(checkStorePath(query.path), query.key ?? null, caller.peer),
  }),
  route({
    operationId: 'setMachineSettings', tag: 'machines', method: 'POST', url: '/v1/machines/settings', summary: 'Change parameters of a machine that is off, all or none',
    body: MachineSetBody, response: refTo(MachineInfo),
    handle: (service, { body }) => service.machines.set(checkPathInContainer(body.path), body.settings),
  }),
  route({
    operationId: 'registerMachine', tag: 'machines', method: 'POST', url: '/v1/machines/register', summary: 'Make a machine known to a hypervisor',
    body: MachineRegisterBody, response: refTo(MachineInfo),
    handle: (service, { body }) => service.machines.register(checkPathInContainer(body.path), body.hypervisor ?? null),
  }),
  route({
    operationId: 'unregisterMachine', tag: 'machines', method: 'POST', url: '/v1/machines/unregister', summary: 'Make its hypervisor forget a machine that is off; no file changes',
    body: MachineBody, response: refTo(MachineInfo),
    handle: (service, { body }) => service.machines.unregister(checkPathInContainer(body.path)),
  }),
  route({
    operationId: 'startMachine', tag: 'machines', method: 'POST', url: '/v1/machines/start', summary: 'Start a machine that is registered',
    body: MachineBody, response: refTo(MachineInfo),
    handle: (service, { body }) => service.machines.start(checkPathInContainer(body.path)),
  }),
  route({
    operationId: 'stopMachine', tag: 'machines', method: 'POST', url: '/v1/machines/stop', summary: 'Shut a machine down, or take its power; answers when it is off',
    body: MachineStopBody, response: refTo(MachineInfo),
    handle: (service, { body }) => service.machines.stop(checkPathInContainer(body.path), { force: body.force ?? false, timeoutMs: (body.timeoutSeconds ?? STOP_SECONDS_DEFAULT) * 1000 }),
  }),
  route({
    operationId: 'removeMachine', tag: 'machines', method: 'DELETE', url: '/v1/machines', summary: 'Unregister a machine and remove its directory',
    query: MachineRemoveQuery, response: refTo(RemoveResult),
    handle: (service, { query }) => service.machines.remove(checkPathInContainer(query.path), { force: query.force === 'true' }),
  }),
];
