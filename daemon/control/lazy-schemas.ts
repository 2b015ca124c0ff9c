/**
 * Schemas of the control API are compiled when a call first needs them, and not all at once at every start.
 *
 * Compiling a validator and a serialiser for each of some thirty operations takes longer than all else that a server does before it is
 * ready, and most servers are asked for few of them. The compilers are fastify's own; only the moment is another. A schema that cannot be
 * compiled would be found by its first caller: so `compileAll` is there for a test.
 */
import { createRequire } from 'node:module';

import type { BuildCompilerFromPool } from '@fastify/ajv-compiler';
import type { SerializerFactory } from '@fastify/fast-json-stringify-compiler';
import type { FastifyServerOptions } from 'fastify';

type SchemaController = NonNullable<FastifyServerOptions['schemaController']>;

/** Loading them takes a while too: at the first call, which cannot wait for an import, unless `preloadCompilers` came before it. */
const require = createRequire(import.meta.url);
const validatorCompiler = () => require('@fastify/ajv-compiler') as () => BuildCompilerFromPool;
const serializerCompiler = () => require('@fastify/fast-json-stringify-compiler') as () => SerializerFactory;

/** Each loads one of the two compilers, for whoever has time. */
export const preloadCompilers: readonly (() => unknown)[] = [serializerCompiler, validatorCompiler];

export interface LazySchemas {
  readonly controller: SchemaController;
  /** Compiles what was not compiled yet. */
  compileAll(): void;
  /** What was not compiled yet. */
  pendingCount(): number;
}

export function lazySchemas(): LazySchemas {
  const pending = new Set<() => void>();
  const lazily = <T>(make: () => T): (() => T) => {
    let made: { readonly value: T } | undefined;
    const get = (): T => {
      made ??= { value: make() };
      pending.delete(get);
      return made.value;
    };
    pending.add(get);
    return get;
  };
  const buildValidator: BuildCompilerFromPool = (schemas, options) => {
    const compiler = lazily(() => validatorCompiler()()(schemas, options));
    return (route) => {
      const compiled = lazily(() => compiler()(route));
      // fastify looks for the errors of the last call where ajv leaves them.
      const validate = (value: unknown): unknown => {
        const result: unknown = compiled()(value);
        validate.errors = compiled().errors ?? null;
        return result;
      };
      validate.errors = null as ReturnType<typeof compiled>['errors'];
      return validate as unknown as ReturnType<typeof compiled>;
    };
  };
  const buildSerializer: SerializerFactory = (schemas, options) => {
    const compiler = lazily(() => serializerCompiler()()(schemas, options));
    return (route) => {
      const compiled = lazily(() => compiler()(route));
      return (value) => compiled()(value);
    };
  };
  return {
    controller: { compilersFactory: { buildValidator, buildSerializer } },
    compileAll: () => { for (const compile of [...pending]) compile(); },
    pendingCount: () => pending.size,
  };
}
