import { describe, expect, it } from 'vitest';
import type { FileIdentity } from '../../blockstore/meta/rows.js';
import { addLayer, addNode, databasePath, expectError, openStore } from '../support/meta-store-fixture.js';

const IDENTITY: FileIdentity = { device: 2049, inode: 131_075, sizeBytes: 2 ** 41, mtimeNs: '1700000000123456789', ctimeNs: '1700000000987654321' };

const ids = (rows: readonly { readonly id: number }[]): number[] => rows.map((row) => row.id);

describe('layers', () => {
  it('come back as they were put in, across a restart', () => {
    const path = databasePath();
    const store = openStore(path);
    const image = addLayer(store, { kind: 'external', externalPath: '/images/é.raw', externalIdentity: IDENTITY, sealed: true, complete: true, sizeBytes: 2 ** 41 });
    const layer = addLayer(store, { backingId: image.id, backingLimitBytes: 4096 });
    store.close();
    const again = openStore(path);
    expect(again.layers.byId(image.id)).toEqual(image);
    expect(again.layers.byId(layer.id)).toEqual(layer);
    expect(again.layers.byId(99)).toBeUndefined();
  });

  it('never get an id that was used before, for data files are named by it', () => {
    const store = openStore();
    const first = addLayer(store);
    store.layers.remove(first.id);
    expect(addLayer(store).id).toBeGreaterThan(first.id);
  });

  it('change only what an update names', () => {
    const store = openStore();
    const image = addLayer(store, { sealed: true, complete: true });
    const layer = addLayer(store, { backingId: image.id });
    store.layers.update(layer.id, { sealed: true, backingLimitBytes: 8192 });
    expect(store.layers.byId(layer.id)).toEqual({ ...layer, sealed: true, backingLimitBytes: 8192 });
    store.layers.clearBacking(layer.id);
    expect(store.layers.byId(layer.id)).toEqual({ ...layer, sealed: true, backingId: null, backingLimitBytes: null });
    expectError('not-found', () => { store.layers.update(99, { sealed: true }); });
  });

  it.each([
    ['an external layer without a path', { kind: 'external', externalIdentity: IDENTITY, sealed: true }],
    ['an external layer that could be written', { kind: 'external', externalPath: '/x', externalIdentity: IDENTITY, sealed: false }],
    ['a layer of the store with an external path', { externalPath: '/x' }],
  ] as const)('refuse %s', (_what, fields) => {
    const store = openStore();
    expect(() => addLayer(store, fields)).toThrow(/CHECK constraint/);
  });

  it('give their chain from the active layer down to the first complete one', () => {
    const store = openStore();
    const far = addLayer(store, { sealed: true, complete: true });
    const image = addLayer(store, { sealed: true, complete: true, backingId: far.id });
    const middle = addLayer(store, { sealed: true, backingId: image.id });
    const active = addLayer(store, { backingId: middle.id });
    expect(ids(store.layers.chain(active.id))).toEqual([active.id, middle.id, image.id]);
    expect(ids(store.layers.chain(image.id))).toEqual([image.id]);
    expect(ids(store.layers.chain(addLayer(store).id))).toHaveLength(1);
    expectError('not-found', () => store.layers.chain(99));
  });

  it('report a chain that runs in a circle', () => {
    const store = openStore();
    const lower = addLayer(store);
    const upper = addLayer(store, { backingId: lower.id });
    store.layers.update(lower.id, { backingId: upper.id });
    expectError('store-damaged', () => store.layers.chain(upper.id));
  });

  it('know who reads through them', () => {
    const store = openStore();
    const image = addLayer(store, { sealed: true, complete: true });
    const sealed = addLayer(store, { sealed: true, backingId: image.id });
    const [first, second, filled] = [
      addLayer(store, { backingId: sealed.id }),
      addLayer(store, { backingId: image.id }),
      addLayer(store, { backingId: sealed.id, complete: true }),
    ];
    const disks = [first, second, filled].map((layer, index) => addNode(store, `disk-${index}`, { kind: 'disk', layerId: layer.id }));
    expect(ids(store.layers.dependants(image.id))).toEqual([sealed.id, second.id]);
    expect(ids(store.layers.dependants(sealed.id))).toEqual([first.id]);
    expect(ids(store.layers.dependantNodes(image.id))).toEqual([disks[0]?.id, disks[1]?.id]);
    expect(ids(store.layers.dependantNodes(sealed.id))).toEqual([disks[0]?.id]);
    expect(ids(store.layers.dependantNodes(filled.id))).toEqual([disks[2]?.id]);
    store.nodes.orphan(disks[0]?.id ?? 0);
    expect(ids(store.layers.dependantNodes(sealed.id))).toEqual([disks[0]?.id]);
  });

  it('go only when nothing reads through them, and take their owned blocks along', () => {
    const store = openStore();
    const image = addLayer(store, { sealed: true, complete: true });
    const active = addLayer(store, { backingId: image.id });
    const filled = addLayer(store, { backingId: image.id, backingLimitBytes: 1, complete: true });
    const disk = addNode(store, 'disk', { kind: 'disk', layerId: active.id });
    store.ownership.add(active.id, [{ block: 0, count: 10 }]);
    expect(ids(store.layers.unreferenced())).toEqual([filled.id]);
    for (const layer of [image, active]) {
      expectError('in-use', () => { store.layers.remove(layer.id); });
      expect(store.layers.byId(layer.id)).toEqual(layer);
    }
    expect(store.layers.byId(filled.id)).toEqual(filled);
    store.nodes.remove(disk.id);
    expect(ids(store.layers.unreferenced())).toEqual([active.id, filled.id]);
    store.layers.remove(active.id);
    expect(store.ownership.ownedBlocks(active.id)).toBe(0);
    expect(ids(store.layers.unreferenced())).toEqual([image.id, filled.id]);
    store.layers.remove(image.id);
    expect(store.layers.byId(filled.id)).toEqual({ ...filled, backingId: null, backingLimitBytes: null });
  });
});
