/**
 * Merges while the store has no room for a copy: nothing is begun, one line is said, and they go on once there is room.
 *
 * Merges and their hash worker are the built ones (`dist`), because a thread cannot be started from TypeScript.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, expect, it, vi } from 'vitest';

import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { Hasher as HasherType } from '../../daemon/jobs/hasher.js';
import { readChunk } from '../../daemon/jobs/layer-data.js';
import type { Merges as MergesType } from '../../daemon/jobs/merges.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';
import { SmallDisk } from '../support/small-disk.js';
import { createCleanup } from '../support/temp.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 20 * MIB;
const DISK_MIB = 128;
/** More than what counts as a full store, a quarter of the 8 MiB that are kept back; less than merges of MiBs want. */
const LEFT_BYTES = 3 * MIB;
/** More layers than are left alone. */
const SEALS = 14;

const built = path.resolve(import.meta.dirname, '../../dist/daemon/jobs');
const { Merges } = await import(path.join(built, 'merges.js')) as { readonly Merges: typeof MergesType };
const { Hasher } = await import(path.join(built, 'hasher.js')) as { readonly Hasher: typeof HasherType };

const cleanup = createCleanup();

afterEach(async () => {
  vi.restoreAllMocks();
  await cleanup.run();
});

it('a store without room for a merge: no job is begun, however often it is looked at, and that is said once', async () => {
  const smallDisk = new SmallDisk(DISK_MIB, cleanup);
  const fixture = new TestStore({ storeDir: smallDisk.storeDir });
  const content = patterned(3, SIZE_BYTES, (block) => block % 8 !== 0);
  const disk = fixture.clone(fixture.image('base', content), 'disk');
  fixture.acquire(disk);
  for (let layer = 0; layer < SEALS; layer += 1) {
    for (const at of [layer * MIB, (layer + 1) * MIB]) {
      const data = patternBytes(50 + layer, at, MIB);
      fixture.write(disk, at, data);
      data.copy(content, at);
    }
    const clone = fixture.clone(disk, 'to-seal');
    fixture.store.meta.nodes.orphan(clone.id);
    fixture.store.discardNode(clone.id);
  }
  const { store } = fixture;
  const layers = (): number => store.meta.layers.chain(store.meta.nodes.byId(disk.id)?.layerId ?? 0).length;
  const depth = layers();
  // A layer is merged when it has checksums, which the scrub sees to.
  const hasher = new Hasher(null);
  for (const layer of store.meta.layers.chain(store.meta.nodes.byId(disk.id)?.layerId ?? 0)) {
    for (let at = 0; ; ) {
      const result = await readChunk(store, hasher, layer.id, at, { keep: true, fromDisk: false, rateBytesPerSecond: 0 });
      if (result === null) break;
      at += result.lengthBytes;
    }
  }
  await hasher.close();

  smallDisk.leave(LEFT_BYTES / BLOCK_BYTES);
  // Counts the looks; the answers are the file system's own.
  const statfs = vi.spyOn(fs.promises, 'statfs');
  const warned: string[] = [];
  const logger = { info: () => undefined, error: () => undefined, warn: (context: object) => { warned.push('reason' in context ? String(context.reason) : ''); } };
  const fatal: Error[] = [];
  const merges = new Merges({ store, logger, onFatal: (error) => { fatal.push(error); }, restMs: 5 });
  merges.run();
  try {
    await vi.waitFor(() => { expect(statfs.mock.calls.length).toBeGreaterThan(4); }, 30_000);
    expect(warned).toEqual([expect.stringMatching(/^layers are not merged: \d+ bytes would be copied, and the store has \d+ left$/u)]);
    expect(store.space().isFull).toBe(false);
    expect(store.meta.jobs.list().filter((job) => job.kind === 'merge')).toEqual([]);
    expect(layers()).toBe(depth);

    smallDisk.free();
    await vi.waitFor(() => { expect(layers()).toBeLessThan(depth); }, 30_000);
    fixture.expectContent(disk, content);
  } finally {
    await merges.close();
  }
  expect(fatal).toEqual([]);
});
