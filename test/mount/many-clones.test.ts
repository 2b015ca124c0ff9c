/**
 * A thousand clones through the command line and under the mount: all there, one transaction, gone again; and the server killed in the
 * middle of it, or of their removal.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';

import type { CloneResult, DiskInfo, NodeInfo, RemoveResult } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { mustRun } from '../support/model/command.js';
import { signalProcess, waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const COUNT = 1000;
const KIB = 1024;
const KILLS = 2;
const WAIT_MS = 60_000;

const cleanup = createCleanup();

afterEach(async () => { await cleanup.run(); });

async function daemonWithImage(): Promise<TestDaemon> {
  const daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_CRASHES_MAX: '100' } });
  const image = join(makeTempDir('many', cleanup), 'image.raw');
  writeFileSync(image, Buffer.alloc(64 * KIB, 0x5a));
  await daemon.json(['container', 'create', 'vms']);
  await daemon.json(['import', image, 'vms/image']);
  await daemon.json(['container', 'create', 'many']);
  return daemon;
}

function names(container: string): string[] {
  return Array.from({ length: COUNT }, (_, i) => `${container}/vm${i}`);
}

/** Of `ls -i`: the inode of each name. */
function inodesOf(listing: string): Map<string, string> {
  return new Map(listing.trim().split('\n').map((line) => line.trim().split(/\s+/u)).map(([inode = '', name = '']) => [name, inode]));
}

describe('a thousand clones', () => {
  it('are there under the mount and in every list, work, and are removed with their container', async () => {
    const daemon = await daemonWithImage();
    const made = await daemon.json<CloneResult>(['clone', 'vms/image', ...names('many')]);
    expect(made.clones.map((clone) => clone.path)).toEqual(names('many'));
    const listed = await daemon.json<NodeInfo[]>(['ls', 'many']);
    expect(listed.map((node) => node.path)).toEqual(names('many').toSorted());
    expect(new Set(listed.map((node) => `${node.kind} ${node.sizeBytes} ${node.ownedBytes} ${node.openCount}`))).toEqual(new Set([`disk ${64 * KIB} 0 0`]));
    const shown = inodesOf((await mustRun('ls', ['-i1', daemon.path('many')], { timeoutMs: WAIT_MS })).stdout);
    expect(shown.size).toBe(COUNT);
    expect(new Set(shown.values()).size).toBe(COUNT);
    writeFileSync(daemon.path('many/vm7'), Buffer.alloc(8 * KIB, 1), { flag: 'r+' });
    expect(readFileSync(daemon.path('many/vm7')).equals(Buffer.concat([Buffer.alloc(8 * KIB, 1), Buffer.alloc(56 * KIB, 0x5a)]))).toBe(true);
    expect(readFileSync(daemon.path('many/vm8')).equals(Buffer.alloc(64 * KIB, 0x5a))).toBe(true);
    expect((await daemon.json<NodeInfo[]>(['ls', 'many'])).find((node) => node.path === 'many/vm7')?.ownedBytes).toBe(8 * KIB);
    expect((await daemon.json<DiskInfo>(['show', 'many/vm7'])).ownedBytes).toBe(8 * KIB);
    const removed = await daemon.json<RemoveResult>(['rm', '-r', 'many']);
    expect(removed).toMatchObject({ nodesRemoved: COUNT + 1, layersRemoved: COUNT });
    expect(removed.freedBytes).toBeGreaterThanOrEqual(8 * KIB);
    expect(readdirSync(daemon.path('.'))).toEqual(['vms']);
    expect((await daemon.status()).layersTotal).toBe(2);
    expect((await daemon.cli(['check'])).code).toBe(0);
    daemon.assertQuietLog();
  });

  it('are none when one of their names is taken', async () => {
    const daemon = await daemonWithImage();
    await daemon.json(['clone', 'vms/image', 'many/vm999']);
    expect((await daemon.cli(['clone', 'vms/image', ...names('many')])).code).toBe(4);
    expect((await daemon.json<NodeInfo[]>(['ls', 'many'])).map((node) => node.path)).toEqual(['many/vm999']);
  });

  it('are all there or none when the server is killed in the middle, and so is their removal', async () => {
    const daemon = await daemonWithImage();
    const killDuring = async (delayMs: number, args: readonly string[]): Promise<void> => {
      const { serverPid } = await daemon.status();
      // The command's own start takes a tenth of a second or more; the kill comes at random around what it asks for.
      const asked = daemon.cli(args, { timeoutMs: WAIT_MS });
      await sleep(delayMs);
      signalProcess(serverPid, 'SIGKILL');
      await asked;
      await daemon.waitForServer(serverPid, WAIT_MS);
    };
    const counted = async (container: string): Promise<number> => {
      const found = await daemon.cli(['ls', container, '--json']);
      return found.code === 3 ? -1 : (JSON.parse(found.stdout) as NodeInfo[]).length;
    };
    for (let kill = 0; kill < KILLS; kill += 1) {
      const container = `kill${kill}`;
      await daemon.json(['container', 'create', container]);
      await killDuring(100 + 40 * kill + 30 * Math.random(), ['clone', 'vms/image', ...names(container)]);
      expect([0, COUNT]).toContain(await counted(container));
      if (await counted(container) === 0) await daemon.json(['clone', 'vms/image', ...names(container)]);
      await killDuring(100 + 60 * kill + 30 * Math.random(), ['rm', '-r', container]);
      // All names, the container's among them, go in one transaction.
      expect([-1, COUNT]).toContain(await counted(container));
      if (await counted(container) === COUNT) await daemon.json(['rm', '-r', container]);
    }
    // What lost its name and not yet its rows is taken away by the last server, in steps, once it serves.
    expect(await waitUntil(async () => (await daemon.status()).layersTotal === 2, WAIT_MS)).toBe(true);
    expect((await daemon.cli(['check'])).code).toBe(0);
  });
});
