/** Sockets that listen before anything answers on them, as a start of the daemon opens them: nobody is refused, and nobody is answered twice or not at all. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import { listenForControl, type ControlListener } from '../../daemon/control/listener.js';
import { startControlServer, type ControlServer } from '../../daemon/control/server.js';
import { waitUntil } from '../support/processes.js';
import { makeDirectory, recordingLogger } from '../support/control-fixture.js';
import { MemoryService } from '../support/control-memory-service.js';

const WAIT_MS = 30_000;

let directory: ReturnType<typeof makeDirectory>;
let socketPath: string;
let listener: ControlListener;
let server: ControlServer | null;

beforeEach(async () => {
  directory = makeDirectory();
  socketPath = join(directory.path, 'o.sock');
  server = null;
  listener = await listenForControl({ socketPath, logger: recordingLogger([]) });
});

afterEach(async () => {
  await server?.close();
  if (server === null && listener.server.listening) await listener.close();
  directory.remove();
});

async function answer(service: MemoryService): Promise<void> {
  server = await startControlServer({ service, socketPath, version: '1', logger: recordingLogger([]), onInternalError: (error) => { throw error; } }, listener);
}

/** Resolves when so many requests have come. */
async function asked(count: number): Promise<void> {
  let seen = 0;
  listener.server.on('request', () => { seen += 1; });
  if (!await waitUntil(() => seen >= count, WAIT_MS)) throw new Error(`${seen} of ${count} requests came`);
}

describe('sockets that listen before anything answers', () => {
  it('keep calls waiting, bodies and all, and answer each once when they can', async () => {
    const service = new MemoryService();
    const client = createControlClient({ socketPath, patienceMs: 0, timeoutMs: WAIT_MS });
    const settled: string[] = [];
    const three = asked(3);
    const calls = [
      client.status().then((status) => { settled.push('status'); return status.version; }),
      client.createContainer('vms', {}).then((made) => { settled.push('create'); return made.name; }),
      client.show('vms/none').then(() => 'shown', (error: unknown) => { settled.push('show'); return (error as { kind: string }).kind; }),
    ];
    await three;
    expect(settled).toEqual([]);

    await answer(service);
    expect(await Promise.all(calls)).toEqual([expect.any(String), 'vms', 'not-found']);
    expect((await client.listContainers()).map(({ name }) => name)).toEqual(['vms']);
  }, WAIT_MS);

  it('end without an answer to those who wait when the daemon ends first, and leave no socket', async () => {
    const client = createControlClient({ socketPath, patienceMs: 0, timeoutMs: WAIT_MS });
    const one = asked(1);
    const call = client.createContainer('vms', {}).then(() => 'made', (error: unknown) => (error as { kind: string }).kind);
    await one;
    await listener.withdraw();
    await listener.close();
    expect(await call).toBe('io-error');
    expect(existsSync(socketPath)).toBe(false);
  }, WAIT_MS);
});
