import { describe, expect, it } from 'vitest';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { addLayer, addNode, databasePath, expectError, openStore } from '../support/meta-store-fixture.js';

describe('nodes', () => {
  it('come back as they were put in, across a restart', () => {
    const path = databasePath();
    const store = openStore(path);
    const layer = addLayer(store);
    const disk = addNode(store, 'a.img', {
      kind: 'disk',
      mode: 0o4751,
      uid: 4_294_967_295,
      gid: 1000,
      sizeBytes: 16 * 1024 ** 4,
      atimeUs: Number.MAX_SAFE_INTEGER,
      mtimeUs: -1,
      ctimeUs: 1_700_000_000_123_456,
      layerId: layer.id,
      copyOnRead: true,
      fault: 'fdatasync failed',
    });
    const link = addNode(store, 'link', { kind: 'symlink', linkTarget: '../é' });
    expect(disk.generation).toBeGreaterThan(0);
    expect(disk.generation).toBeLessThan(2 ** 32);
    store.close();
    const again = openStore(path);
    expect(again.nodes.byId(disk.id)).toEqual(disk);
    expect(again.nodes.byLayer(layer.id)).toEqual(disk);
    expect(again.nodes.child(ROOT_ID, 'link')).toEqual(link);
    expect(again.nodes.byId(99)).toBeUndefined();
    expect(again.nodes.byLayer(99)).toBeUndefined();
  });

  it('never get an id that was used before', () => {
    const store = openStore();
    const first = addNode(store, 'a');
    store.nodes.remove(first.id);
    expect(addNode(store, 'a').id).toBeGreaterThan(first.id);
  });

  it('take a name once in a directory, compared by its bytes', () => {
    const store = openStore();
    const container = addNode(store, 'vms');
    addNode(store, 'Disk');
    addNode(store, 'disk');
    addNode(store, 'vms', { parentId: container.id });
    expectError('already-exists', () => addNode(store, 'vms'));
    const other = addNode(store, 'other');
    expectError('already-exists', () => { store.nodes.move(other.id, ROOT_ID, 'vms'); });
    expect(store.nodes.byId(other.id)?.name).toBe('other');
  });

  it('change only what an update names', () => {
    const store = openStore();
    const disk = addNode(store, 'a.img', { kind: 'disk', fault: 'bad' });
    store.nodes.update(disk.id, { mode: 0o600, fault: null });
    expect(store.nodes.byId(disk.id)).toEqual({ ...disk, mode: 0o600, fault: null });
    const layer = addLayer(store);
    store.nodes.update(disk.id, { layerId: layer.id, sizeBytes: 7, copyOnRead: true });
    expect(store.nodes.byId(disk.id)).toEqual({ ...disk, mode: 0o600, fault: null, layerId: layer.id, sizeBytes: 7, copyOnRead: true });
    expectError('not-found', () => { store.nodes.update(99, { mode: 0 }); });
    expectError('not-found', () => { store.nodes.move(99, ROOT_ID, 'x'); });
    expectError('not-found', () => { store.nodes.orphan(99); });
  });

  it('never share an active layer', () => {
    const store = openStore();
    const layer = addLayer(store);
    addNode(store, 'a.img', { kind: 'disk', layerId: layer.id });
    expect(() => addNode(store, 'b.img', { kind: 'disk', layerId: layer.id })).toThrow(/nodes\.layer_id/);
  });

  it.each([
    ['a directory with a layer', { kind: 'directory', layerId: 1 }],
    ['a disk without one', { kind: 'disk', layerId: null }],
    ['a symlink to nowhere', { kind: 'symlink', linkTarget: null }],
    ['an odd mode', { mode: 0o10000 }],
    ['a negative size', { sizeBytes: -1 }],
    ['a name with a slash', { name: 'a/b' }],
    ['a name too long', { name: 'é'.repeat(128) }],
  ] as const)('refuse %s', (_what, fields) => {
    const store = openStore();
    addLayer(store);
    expect(() => addNode(store, 'x', fields)).toThrow(/CHECK constraint/);
    expect(store.nodes.childCount(ROOT_ID)).toBe(0);
  });

  it('cannot be removed while they have children, nor be put under what does not exist', () => {
    const store = openStore();
    const container = addNode(store, 'vms');
    addNode(store, 'a', { parentId: container.id });
    expect(() => { store.nodes.remove(container.id); }).toThrow(/FOREIGN KEY/);
    expect(() => addNode(store, 'b', { parentId: 99 })).toThrow(/FOREIGN KEY/);
  });

  it('are listed and counted by directory', () => {
    const store = openStore();
    const container = addNode(store, 'vms');
    const made = ['c', 'a', 'b'].map((name) => addNode(store, name, { parentId: container.id, kind: name === 'a' ? 'directory' : 'file' }));
    expect(store.nodes.children(container.id, 0, 10)).toEqual(made);
    expect(store.nodes.children(container.id, made[0]?.id ?? 0, 1)).toEqual([made[1]]);
    expect(store.nodes.childCount(container.id)).toBe(3);
    expect(store.nodes.directoryCount(container.id)).toBe(1);
    expect(store.nodes.directoryCount(ROOT_ID)).toBe(1);
  });

  it('lose their name and are then orphans', () => {
    const store = openStore();
    const container = addNode(store, 'vms');
    const first = addNode(store, 'a.img', { parentId: container.id, kind: 'disk' });
    const second = addNode(store, 'b.img', { parentId: container.id, kind: 'disk' });
    store.nodes.orphan(first.id);
    store.nodes.orphan(second.id);
    expect(store.nodes.orphans().map((node) => node.id)).toEqual([first.id, second.id]);
    expect(store.nodes.byId(first.id)).toEqual({ ...first, parentId: null, name: '' });
    expect(store.nodes.pathOf(first.id)).toBe(`@deleted/${first.id}`);
    expect(store.nodes.childCount(container.id)).toBe(0);
    store.nodes.move(first.id, container.id, 'back.img');
    expect(store.nodes.orphans()).toHaveLength(1);
    expect(() => { store.nodes.orphan(ROOT_ID); }).toThrow();
    expect(() => { store.nodes.remove(ROOT_ID); }).toThrow();
  });

  it('are found by path, and know theirs', () => {
    const store = openStore();
    const container = addNode(store, 'vms');
    const directory = addNode(store, 'été', { parentId: container.id });
    const disk = addNode(store, 'a b.img', { parentId: directory.id, kind: 'disk' });
    expect(store.nodes.byPath('vms/été/a b.img')).toEqual(disk);
    expect(store.nodes.byPath('')?.id).toBe(ROOT_ID);
    expect(store.nodes.byPath('vms//été')).toBeUndefined();
    expect(store.nodes.byPath('/vms')).toBeUndefined();
    expect(store.nodes.byPath('vms/été/a b.img/x')).toBeUndefined();
    expect(store.nodes.pathOf(disk.id)).toBe('vms/été/a b.img');
    expect(store.nodes.pathOf(ROOT_ID)).toBe('');
    expectError('not-found', () => store.nodes.pathOf(99));
  });

  it('are walked in the order of their paths, more than a batch of them, while they change', () => {
    const store = openStore();
    const names = ['b', 'a'].flatMap((container) => Array.from({ length: 600 }, (_, index) => `${container}/${String(index).padStart(3, '0')}`));
    store.transaction(() => {
      for (const container of ['b', 'a']) addNode(store, container);
      for (const path of names) {
        const [container = '', name = ''] = path.split('/');
        addNode(store, name, { parentId: store.nodes.byPath(container)?.id ?? 0, kind: 'disk' });
      }
      const deep = addNode(store, '300x', { parentId: store.nodes.byPath('a')?.id ?? 0 });
      addNode(store, 'z', { parentId: deep.id, kind: 'file' });
      addNode(store, 'link', { parentId: deep.id, kind: 'symlink', linkTarget: 'z' });
      addNode(store, 'empty', { parentId: deep.id });
    });
    const walked: string[] = [];
    store.transaction(() => {
      for (const node of store.nodes.disksUnder(null)) {
        walked.push(store.nodes.pathOf(node.id));
        store.nodes.update(node.id, { mode: 0o600 });
      }
    });
    const expected = [...names, 'a/300x/z'].sort();
    expect(walked).toEqual(expected);
    const below = [...store.nodes.disksUnder(store.nodes.byPath('a')?.id ?? 0)];
    expect(below).toHaveLength(601);
    expect(below.every((node) => node.mode === 0o600)).toBe(true);
  });
});
