/**
 * The HTTP application: the table of routes on fastify, with strict validation, one shape of error, and the OpenAPI
 * document beside it. It binds nothing: it answers what a listener (`listener.ts`) takes in.
 *
 * Inputs are taken as they are: nothing is coerced, unknown fields are refused. What the service refuses becomes an
 * answer; any other exception is answered as `internal` and then given to `onInternalError`, for the server is
 * crash-only and its owner decides when to end. Fastify's own log is off: one line per call goes to the logger given, and says
 * who called. Whether the caller may is decided before the body is read (`access.ts`).
 */
import type { Socket } from 'node:net';
import type { TSchema } from '@sinclair/typebox';
import fastify, { type FastifyError, type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import { OffshootError, httpStatusOf, isOperatingError, toOffshootError, type ErrorContext } from '../../blockstore/errors.js';
import { assertMay, whoIs, type Caller } from './access.js';
import { lazySchemas, type LazySchemas } from './lazy-schemas.js';
import { REQUEST_BYTES_MAX } from './limits.js';
import type { ControlListener, RequestHandler } from './listener.js';
import { visible } from './paths.js';
import type { Route, RouteCaller, RouteInput } from './route.js';
import { routes } from './routes.js';
import { ErrorResponse, namedSchemas, refTo } from './schemas.js';

/** The part of a pino logger that is used here. */
export interface ControlLogger {
  debug(fields: object, message: string): void;
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
  error(fields: object, message: string): void;
}

export type AnyRouteInput = RouteInput<TSchema, TSchema, TSchema>;

export interface HttpAppOptions {
  readonly version: string;
  readonly logger: ControlLogger;
  readonly dispatch: (route: Route, input: AnyRouteInput, caller: RouteCaller) => unknown;
  /** The figures as text, for GET /metrics, where Prometheus looks for them. */
  readonly metricsText: () => Promise<string>;
  /** Called after the answer to a call that met a programmer error. */
  readonly onInternalError: (error: unknown) => void;
  /** Who made this connection, and what he may do. */
  readonly callerOf: (socket: Socket) => Caller;
  /** Where requests come from; left out: from nowhere. */
  readonly listener?: Pick<ControlListener, 'server' | 'serve'>;
  /** For a test that compiles them all. */
  readonly schemas?: LazySchemas;
  /** Sees the routes as they are added. */
  readonly beforeRoutes?: (app: FastifyInstance) => Promise<void>;
}

export async function createHttpApp(options: HttpAppOptions): Promise<FastifyInstance> {
  const { listener } = options;
  let handleRequest: RequestHandler | undefined;
  const app = fastify({
    logger: false,
    schemaController: (options.schemas ?? lazySchemas()).controller,
    bodyLimit: REQUEST_BYTES_MAX,
    ...(listener === undefined ? {} : {
      serverFactory: (handler: RequestHandler) => {
        handleRequest = handler;
        return listener.server;
      },
    }),
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: false, allErrors: false } },
    schemaErrorFormatter: (errors, part) => validationError(errors, part),
    frameworkErrors: (error, request, reply) => { answerError(options, error, request, reply); },
    clientErrorHandler: (error, socket) => { answerBrokenRequest(error.message, socket); },
  });
  app.setErrorHandler((error: FastifyError, request, reply) => answerError(options, error, request, reply));
  app.setNotFoundHandler((request, reply) => answerError(options, noSuchRoute(request), request, reply));
  // Only JSON is understood; without this, fastify would hand text/plain bodies through.
  app.removeContentTypeParser('text/plain');
  app.addHook('onRequest', (request, _reply, done) => {
    assertMay(options.callerOf(request.socket), request.method);
    done();
  });
  // A POST without a body and without a content type is an empty request, not an error: {} is put in its place.
  app.addHook('preValidation', (request, _reply, done) => {
    if (request.body === undefined && request.method === 'POST') request.body = {};
    done();
  });
  for (const schema of namedSchemas) app.addSchema(schema);
  await options.beforeRoutes?.(app);
  for (const route of routes) if (!route.takesBytes) addRoute(app, route, options);
  // A scope of its own: nobody else takes anything but JSON.
  await app.register((scope, _options, done) => {
    scope.addContentTypeParser('application/octet-stream', { parseAs: 'buffer' }, (_request, body, parsed) => { parsed(null, body); });
    for (const route of routes) if (route.takesBytes) addRoute(scope, route, options);
    done();
  });
  // Few ask for it, and what makes it takes longer to load than all the rest: an application of its own, made for the first who does.
  let document: Promise<Readonly<Record<string, unknown>>> | undefined;
  app.get('/v1/openapi.json', { schema: { hide: true } }, async () => await (document ??= openApiDocument(options.version)));
  app.get('/metrics', { schema: { hide: true } }, async (_request, reply) => await reply.type('text/plain; version=0.0.4; charset=utf-8').send(await options.metricsText()));
  await app.ready();
  if (handleRequest !== undefined) listener?.serve(handleRequest);
  return app;
}

/** The OpenAPI document, which needs no daemon: what GET /v1/openapi.json answers. */
export async function openApiDocument(version: string): Promise<Readonly<Record<string, unknown>>> {
  const { addOpenApi } = await import('./openapi.js');
  const silent = (): void => undefined;
  const app = await createHttpApp({
    version,
    logger: { debug: silent, info: silent, warn: silent, error: silent },
    dispatch: () => { throw new Error('the application that makes the OpenAPI document serves nobody'); },
    onInternalError: (error) => { throw error; },
    metricsText: () => Promise.resolve(''),
    callerOf: () => ({ access: 'none', peer: null, via: 'admin' }),
    beforeRoutes: async (made) => { await addOpenApi(made, version); },
  });
  try {
    return { ...app.swagger() };
  } finally {
    await app.close();
  }
}

function addRoute(app: FastifyInstance, route: Route, options: HttpAppOptions): void {
  app.route({
    method: route.method,
    url: route.url,
    schema: {
      operationId: route.operationId,
      summary: route.summary,
      tags: [route.tag],
      ...(route.body === null ? {} : { body: route.body }),
      ...(route.query === null ? {} : { querystring: route.query }),
      ...(route.params === null ? {} : { params: route.params }),
      response: { [route.status]: route.response, default: refTo(ErrorResponse) },
    },
    handler: async (request, reply) => {
      const begin = performance.now();
      const input = { body: request.body, query: request.query, params: request.params };
      const { peer } = options.callerOf(request.socket);
      const answer = await options.dispatch(route, input, { isRoot: peer?.uid === 0, peer });
      const line = {
        operation: route.operationId, ...pathOf(input), ...whoIs(options.callerOf(request.socket)), status: route.status, durationMs: Math.round(performance.now() - begin),
      };
      if (route.changes) options.logger.info(line, 'control call');
      else options.logger.debug(line, 'control call');
      return reply.status(route.status).send(answer);
    },
  });
}

/** What a call was about, for the log: paths only, never a whole request. */
export function pathOf(input: Pick<AnyRouteInput, 'body' | 'query'>): Record<string, string | number> {
  // Bytes have no fields, but an index each: to copy those of one batch of a stream would hold up the main thread for seconds.
  const body = Buffer.isBuffer(input.body) ? undefined : input.body as object | undefined;
  const fields = { ...(input.query as object), ...body } as Record<string, unknown>;
  const line: Record<string, string | number> = {};
  for (const key of ['path', 'name', 'file', 'target', 'source', 'reference']) {
    const value = fields[key];
    if (typeof value === 'string') line[key === 'name' || key === 'target' ? 'path' : key] = value;
  }
  if (Array.isArray(fields['targets'])) {
    line['targets'] = fields['targets'].length;
    if (typeof fields['targets'][0] === 'string') line['path'] = fields['targets'][0];
  }
  return line;
}

interface ValidationProblem {
  readonly instancePath: string;
  readonly keyword: string;
  readonly params: Record<string, unknown>;
  readonly message?: string;
}

function validationError(errors: readonly ValidationProblem[], part: string): Error {
  const problem = errors[0];
  if (problem === undefined) return new OffshootError('invalid-argument', `the ${part} of the request is not valid: see API.md`);
  const field = problem.instancePath.slice(1).replaceAll('/', '.');
  return new OffshootError('invalid-argument', `${problemText(problem, field === '' ? `the ${part} of the request` : field)} (GET /v1/openapi.json has the schema)`, {
    part, field,
  });
}

function problemText(problem: ValidationProblem, field: string): string {
  switch (problem.keyword) {
    case 'additionalProperties': return `${field} has an unknown field '${visible(String(problem.params['additionalProperty']))}': leave it out`;
    case 'required': return `${field} lacks the field '${String(problem.params['missingProperty'])}': add it`;
    case 'enum': return `${field} must be one of ${(problem.params['allowedValues'] as readonly unknown[]).join(', ')}`;
    default: return `${field} ${problem.message ?? 'is not valid'}`;
  }
}

function noSuchRoute(request: FastifyRequest): OffshootError {
  return new OffshootError('not-found', `the control API has no ${request.method} ${visible(request.url.slice(0, 200))}: GET /v1/openapi.json lists what it has`);
}

/** Errors of fastify itself: all of them say that the request was wrong. */
function fromFastify(error: FastifyError): OffshootError | null {
  if (error.code === 'FST_ERR_CTP_BODY_TOO_LARGE') {
    return new OffshootError('too-large', `the request has more than ${REQUEST_BYTES_MAX} bytes: make several smaller ones`, {}, error);
  }
  if (error.code === 'FST_ERR_CTP_INVALID_MEDIA_TYPE') {
    return new OffshootError('invalid-argument', 'the body must be JSON: send it with content-type: application/json', {}, error);
  }
  const status = error.statusCode ?? 500;
  if (status < 400 || status >= 500) return null;
  return new OffshootError('invalid-argument', `the request cannot be understood: ${visible(error.message)}`, {}, error);
}

function answerError(options: HttpAppOptions, error: Error, request: FastifyRequest, reply: FastifyReply): void {
  const known = error instanceof OffshootError ? error : fromFastify(error as FastifyError) ?? toOffshootError(error);
  const operation = `${request.method} ${visible(request.url.split('?', 1)[0] ?? '')}`;
  if (isOperatingError(known)) {
    const line = { operation, kind: known.kind, ...known.context, ...whoIs(options.callerOf(request.socket)) };
    if (known.kind === 'permission-denied' && options.callerOf(request.socket).access !== 'all') options.logger.warn(line, `refused: ${known.message}`);
    else options.logger.info(line, known.message);
    sendError(reply, known.kind, known.message, known.context);
    return;
  }
  options.logger.error({ operation, err: error }, 'control call met a programmer error');
  reply.raw.once('close', () => { options.onInternalError(error); });
  sendError(reply, 'internal', 'the daemon met an error of its own: its log has the details; please report them', {});
}

/** What is not even HTTP gets its answer past fastify's replies, in the same shape. */
function answerBrokenRequest(reason: string, socket: Socket): void {
  if (!socket.writable) return;
  const answer: ErrorResponse = { error: { kind: 'invalid-argument', message: `the request is not HTTP: ${visible(reason)}`, context: {} } };
  const body = JSON.stringify(answer);
  socket.end(`HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`);
}

function sendError(reply: FastifyReply, kind: OffshootError['kind'], message: string, context: ErrorContext): void {
  const answer: ErrorResponse = { error: { kind, message, context: { ...context } } };
  void reply.status(httpStatusOf[kind]).send(answer);
}
