/** Schemas that are compiled when a call needs them: every one of them can be, and an app that was not asked has compiled none. */
import { describe, expect, it } from 'vitest';

import { createHttpApp } from '../../daemon/control/http-app.js';
import { lazySchemas, type LazySchemas } from '../../daemon/control/lazy-schemas.js';
import { routes } from '../../daemon/control/routes.js';

async function appWith(schemas: LazySchemas): Promise<{ close(): Promise<unknown> }> {
  const silent = (): void => undefined;
  return await createHttpApp({
    version: '0', logger: { debug: silent, info: silent, warn: silent, error: silent }, dispatch: () => { throw new Error('nobody is served'); },
    metricsText: () => Promise.resolve(''), onInternalError: (error) => { throw error; }, callerOf: () => ({ access: 'none', peer: null, via: 'admin' }), schemas,
  });
}

describe('the schemas of the control API', () => {
  it('can all be compiled, and are not before somebody calls', async () => {
    const schemas = lazySchemas();
    const app = await appWith(schemas);
    // An answer and an error for each operation, at least.
    expect(schemas.pendingCount()).toBeGreaterThanOrEqual(2 * routes.length);
    schemas.compileAll();
    expect(schemas.pendingCount()).toBe(0);
    await app.close();
  });
});
