/** The rows of exports in the table of `routes.ts`. */
import { Type } from '@sinclair/typebox';
import { DiscoverBody, DiscoverResult, ExportInfo, PresentBody, WithdrawQuery } from './export-schemas.js';
import { checkStorePath } from './paths.js';
import { route, type Route } from './route.js';
import { refTo } from './schemas.js';

export const exportRoutes: readonly Route[] = [
  route({
    operationId: 'present', tag: 'exports', method: 'POST', url: '/v1/exports', summary: 'Show a container, directory or disk to others', status: 201,
    body: PresentBody, response: refTo(ExportInfo),
    handle: (service, { body }) => service.exports.present({ ...body, path: checkStorePath(body.path) }),
  }),
  route({
    operationId: 'withdraw', tag: 'exports', method: 'DELETE', url: '/v1/exports', summary: 'Show it no longer; refused while somebody uses it, unless forced',
    query: WithdrawQuery, response: refTo(ExportInfo),
    handle: (service, { query }) => service.exports.withdraw({ ...query, ...(query.path === undefined ? {} : { path: checkStorePath(query.path) }) }),
  }),
  route({
    operationId: 'listExports', tag: 'exports', method: 'GET', url: '/v1/exports', summary: 'What is shown, as what, for whom, where, and who uses it',
    response: Type.Array(refTo(ExportInfo)),
    handle: (service) => service.exports.list(),
  }),
  route({
    operationId: 'discover', tag: 'exports', method: 'POST', url: '/v1/exports/discover', summary: 'Have libvirt, vSphere or an iSCSI initiator look again',
    body: DiscoverBody, response: refTo(DiscoverResult),
    handle: (service, { body }) => service.exports.discover(body),
  }),
];
