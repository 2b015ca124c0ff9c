/** One row of the table in `routes.ts`: what it takes, what it gives, and how it is checked. */
import type { Static, TNever, TSchema } from '@sinclair/typebox';
import { OffshootError } from '../../blockstore/errors.js';
import { visible } from './paths.js';
import type { Peer } from './peer-credentials.js';
import type { ControlService } from './service.js';

export interface RouteInput<Body extends TSchema, Query extends TSchema, Params extends TSchema> {
  readonly body: Static<Body>;
  readonly query: Static<Query>;
  readonly params: Static<Params>;
}

/** Who asks; few operations look at it. */
export interface RouteCaller {
  readonly isRoot: boolean;
  /** Null when the kernel does not say. */
  readonly peer: Peer | null;
}

export interface Route {
  readonly operationId: string;
  readonly tag: 'daemon' | 'containers' | 'nodes' | 'disks' | 'jobs' | 'fills' | 'checks' | 'snapshots' | 'space' | 'transfers' | 'machines' | 'exports' | 'vdisks';
  readonly method: 'GET' | 'POST' | 'DELETE';
  readonly url: string;
  readonly summary: string;
  /** Status of a good answer: 201 when something was made, 202 when something was begun. */
  readonly status: 200 | 201 | 202;
  /** Whether it changes anything: such calls are logged as information, others for debugging. */
  readonly changes: boolean;
  /** The body is bytes, and no JSON; the handler gets a Buffer. */
  readonly takesBytes: boolean;
  readonly body: TSchema | null;
  readonly query: TSchema | null;
  readonly params: TSchema | null;
  readonly response: TSchema;
  readonly handle: (service: ControlService, input: RouteInput<TSchema, TSchema, TSchema>, caller: RouteCaller) => unknown;
}

interface RouteDefinition<Body extends TSchema, Query extends TSchema, Params extends TSchema, Response extends TSchema> {
  readonly operationId: string;
  readonly tag: Route['tag'];
  readonly method: Route['method'];
  readonly url: string;
  readonly summary: string;
  readonly status?: Route['status'];
  readonly takesBytes?: boolean;
  readonly body?: Body;
  readonly query?: Query;
  readonly params?: Params;
  readonly response: Response;
  readonly handle: (service: ControlService, input: RouteInput<Body, Query, Params>, caller: RouteCaller) => AnswerOf<Response> | Promise<AnswerOf<Response>>;
}

/** Services may give read-only arrays. */
type AnswerOf<Response extends TSchema> = Static<Response> extends readonly (infer Item)[] ? readonly Item[] : Static<Response>;

/** A part that an operation does not take is `never` to its handler. */
export function route<Response extends TSchema, Body extends TSchema = TNever, Query extends TSchema = TNever, Params extends TSchema = TNever>(
  definition: RouteDefinition<Body, Query, Params, Response>,
): Route {
  return {
    status: 200,
    takesBytes: false,
    ...definition,
    changes: definition.method !== 'GET',
    body: definition.body ?? null,
    query: definition.query ?? null,
    params: definition.params ?? null,
    // The validator has checked the input against these very schemas before it gets here.
    handle: definition.handle as Route['handle'],
  };
}

export function refuseTwice(targets: readonly string[]): void {
  const seen = new Set<string>();
  for (const target of targets) {
    if (seen.has(target)) {
      throw new OffshootError('invalid-argument', `the target '${visible(target)}' is given twice: name each clone once`, { path: target });
    }
    seen.add(target);
  }
}
