import { describe, expect, it } from 'vitest';
import { OffshootError } from '../../blockstore/errors.js';
import { NAME_BYTES_MAX as NAME_BYTES_MAX_OF_CONTROL } from '../../daemon/control/limits.js';
import { LINK_TARGET_BYTES_MAX, NAME_BYTES_MAX, shown } from '../../daemon/filesystem/names.js';
import { ROOT_NODE_ID } from '../../daemon/filesystem/types.js';
import { addLayer, expectError } from '../support/meta-store-fixture.js';
import { CALLER, container, EXCHANGE, namesIn, openNamespace, PLAIN } from '../support/namespace-fixture.js';

describe('making', () => {
  it('makes containers, directories, files and symlinks, with their attributes', () => {
    const fixture = openNamespace();
    const { names, meta, clock } = fixture;
    const vms = container(fixture);
    expect(vms).toMatchObject({ kind: 'directory', mode: 0o755, uid: 1000, gid: 100, linkCount: 2, allocatedBytes: 0 });
    const madeUs = clock.nowUs;
    const file = names.create(vms.nodeId, 'vm.xml', 0o100640, CALLER);
    const layerId = meta.nodes.byId(file.nodeId)?.layerId ?? 0;
    expect(file).toMatchObject({ kind: 'file', mode: 0o640, uid: 1000, gid: 100, linkCount: 1, sizeBytes: 0, allocatedBytes: layerId * 4096 });
    expect([file.atimeUs, file.mtimeUs, file.ctimeUs]).toEqual([madeUs + 1, madeUs + 1, madeUs + 1]);
    const link = names.symlink(vms.nodeId, 'link', '../été', CALLER);
    expect(link).toMatchObject({ kind: 'symlink', mode: 0o777, sizeBytes: 8, linkCount: 1 });
    expect(names.readlink(link.nodeId)).toBe('../été');
    expect(names.lookup(vms.nodeId, 'vm.xml')).toEqual(file);
    expect(names.getattr(link.nodeId)).toEqual(link);
  });

  it('counts the directories in a directory', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const before = names.getattr(ROOT_NODE_ID).linkCount;
    const vms = container(fixture);
    expect(names.getattr(ROOT_NODE_ID).linkCount).toBe(before + 1);
    names.mkdir(vms.nodeId, 'a', 0o755, CALLER);
    names.create(vms.nodeId, 'b', 0o644, CALLER);
    expect(names.getattr(vms.nodeId).linkCount).toBe(3);
    names.rmdir(vms.nodeId, 'a');
    expect(names.getattr(vms.nodeId).linkCount).toBe(2);
  });

  it('hands the group of a set-group-id directory on, and to directories the bit', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    names.applyAttributes(vms.nodeId, { mode: 0o2775, gid: 7 });
    expect(names.create(vms.nodeId, 'f', 0o644, CALLER)).toMatchObject({ gid: 7, mode: 0o644, uid: 1000 });
    expect(names.mkdir(vms.nodeId, 'd', 0o755, CALLER)).toMatchObject({ gid: 7, mode: 0o2755 });
    expect(names.symlink(vms.nodeId, 's', 'f', CALLER)).toMatchObject({ gid: 7, mode: 0o777 });
  });

  it('has nothing but containers at the top', () => {
    const fixture = openNamespace();
    const { names, data } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o644, CALLER);
    expect(expectError('not-permitted', () => names.create(ROOT_NODE_ID, 'f', 0o644, CALLER)).message).toMatch(/put it into a container/);
    expectError('not-permitted', () => names.symlink(ROOT_NODE_ID, 's', 'f', CALLER));
    expectError('not-permitted', () => { names.rename(vms.nodeId, 'f', ROOT_NODE_ID, 'f', PLAIN); });
    container(fixture, 'other');
    expectError('not-permitted', () => { names.rename(vms.nodeId, 'f', ROOT_NODE_ID, 'other', EXCHANGE); });
    expect(names.lookup(vms.nodeId, 'f')).toEqual(file);
    expect(data.layersMade).toBe(1);
  });

  it('refuses a name that is taken, before it makes a layer', () => {
    const fixture = openNamespace();
    const { names, data } = fixture;
    const vms = container(fixture);
    names.create(vms.nodeId, 'f', 0o644, CALLER);
    expectError('already-exists', () => names.create(vms.nodeId, 'f', 0o644, CALLER));
    expectError('already-exists', () => names.mkdir(vms.nodeId, 'f', 0o755, CALLER));
    expectError('already-exists', () => container(fixture));
    expect(data.layersMade).toBe(1);
  });

  it('leaves nothing when the layer cannot be made', () => {
    const fixture = openNamespace();
    const { names, data, meta } = fixture;
    const vms = container(fixture);
    data.createEmptyLayer = (): number => {
      addLayer(meta);
      throw new OffshootError('no-space', 'full');
    };
    expectError('no-space', () => names.create(vms.nodeId, 'f', 0o644, CALLER));
    expect(namesIn(fixture, vms.nodeId)).toEqual([]);
    expect(names.getattr(vms.nodeId)).toEqual(vms);
    expect(meta.layers.unreferenced()).toEqual([]);
  });

  it('puts a disk over a layer, within a transaction of the caller', () => {
    const fixture = openNamespace();
    const { names, meta } = fixture;
    const vms = container(fixture);
    const disk = { mode: 0o600, uid: 107, gid: 107, sizeBytes: 1024 ** 3, copyOnRead: true };
    expect(() =>
      meta.transaction(() => {
        names.addDisk(vms.nodeId, 'a.img', { ...disk, layerId: addLayer(meta).id });
        throw new Error('stop');
      }),
    ).toThrow('stop');
    expect(namesIn(fixture, vms.nodeId)).toEqual([]);
    const row = names.addDisk(vms.nodeId, 'a.img', { ...disk, layerId: addLayer(meta).id });
    expect(names.lookup(vms.nodeId, 'a.img')).toMatchObject({ nodeId: row.id, kind: 'disk', mode: 0o600, uid: 107, sizeBytes: 1024 ** 3 });
    expect(meta.nodes.byId(row.id)).toEqual(row);
    expectError('not-permitted', () => names.addDisk(ROOT_NODE_ID, 'a.img', { ...disk, layerId: addLayer(meta).id }));
  });
});

describe('names', () => {
  it.each([
    ['', 'invalid-name'], ['.', 'invalid-name'], ['..', 'invalid-name'], ['a/b', 'invalid-name'], ['a\0b', 'invalid-name'], ['a\nb', 'invalid-name'],
    ['\u007f', 'invalid-name'], ['\u0085', 'invalid-name'], ['\ud800', 'invalid-name'], ['x'.repeat(256), 'name-too-long'], ['é'.repeat(128), 'name-too-long'],
    ['.snapshots', 'invalid-name'], ['.block', 'invalid-name'],
  ] as const)('refuses %j', (name, kind) => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    names.create(vms.nodeId, 'f', 0o644, CALLER);
    const making = [
      (): unknown => names.mkdir(vms.nodeId, name, 0o755, CALLER),
      (): unknown => names.create(vms.nodeId, name, 0o644, CALLER),
      (): unknown => names.symlink(vms.nodeId, name, 'f', CALLER),
      (): void => { names.rename(vms.nodeId, 'f', vms.nodeId, name, PLAIN); },
    ];
    for (const make of making) expect(expectError(kind, make).message).not.toMatch(/\p{Cc}/u);
    expect(namesIn(fixture, vms.nodeId)).toEqual(['f']);
  });

  it('takes any other, up to 255 bytes', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    const good = ['x'.repeat(255), `${'é'.repeat(127)}x`, ' ', '-rf', '...', 'a@b', 'a:b*?"\\', '𝒟isk', '.block2'];
    for (const name of good) {
      const made = names.create(vms.nodeId, name, 0o644, CALLER);
      expect(names.lookup(vms.nodeId, name)).toEqual(made);
    }
    expect(namesIn(fixture, vms.nodeId)).toEqual(good);
    expect(NAME_BYTES_MAX).toBe(NAME_BYTES_MAX_OF_CONTROL);
  });

  it('keeps "@" out of containers, and reserved names out of their top only', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    expectError('invalid-name', () => container(fixture, 'vms@now'));
    const vms = container(fixture);
    const deep = names.mkdir(vms.nodeId, 'deep', 0o755, CALLER);
    names.mkdir(deep.nodeId, '.snapshots', 0o755, CALLER);
    expectError('invalid-name', () => { names.rename(deep.nodeId, '.snapshots', vms.nodeId, '.snapshots', PLAIN); });
    expect(expectError('invalid-name', () => { names.rename(vms.nodeId, 'deep', ROOT_NODE_ID, 'deep', PLAIN); }).message).toMatch(/rename that first/);
    expectError('invalid-name', () => { names.rename(ROOT_NODE_ID, 'vms', ROOT_NODE_ID, 'v@ms', PLAIN); });
    expect(namesIn(fixture, vms.nodeId)).toEqual(['deep']);
  });

  it('shows names in messages without control characters, and cut', () => {
    expect(shown('a\nb\u007f\u009f')).toBe('"a\\nb\\u007f\\u009f"');
    expect(shown('x'.repeat(300))).toHaveLength(83);
  });

  it('takes targets of symlinks up to 4095 bytes', () => {
    const { names, ...fixture } = openNamespace();
    const vms = container({ names, ...fixture });
    expect(names.symlink(vms.nodeId, 'long', 'x'.repeat(LINK_TARGET_BYTES_MAX), CALLER).sizeBytes).toBe(LINK_TARGET_BYTES_MAX);
    expectError('name-too-long', () => names.symlink(vms.nodeId, 'a', 'x'.repeat(LINK_TARGET_BYTES_MAX + 1), CALLER));
    expectError('invalid-argument', () => names.symlink(vms.nodeId, 'a', '', CALLER));
    expectError('invalid-argument', () => names.symlink(vms.nodeId, 'a', 'x\0y', CALLER));
  });
});

describe('looking up', () => {
  it('knows . and .. of every node', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o644, CALLER);
    expect(names.lookup(ROOT_NODE_ID, '.').nodeId).toBe(ROOT_NODE_ID);
    expect(names.lookup(ROOT_NODE_ID, '..').nodeId).toBe(ROOT_NODE_ID);
    expect(names.lookup(vms.nodeId, '..').nodeId).toBe(ROOT_NODE_ID);
    expect(names.lookup(file.nodeId, '.')).toEqual(file);
    expect(names.lookup(file.nodeId, '..').nodeId).toBe(vms.nodeId);
    expect(names.parentOf(vms.nodeId)).toBe(ROOT_NODE_ID);
  });

  it('says what is wrong', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o644, CALLER);
    expectError('not-found', () => names.lookup(vms.nodeId, 'g'));
    expectError('not-found', () => names.lookup(vms.nodeId, 'a/b'));
    expectError('not-found', () => names.lookup(99, 'f'));
    expectError('not-found', () => names.lookup(99, '.'));
    expectError('not-a-directory', () => names.lookup(file.nodeId, 'f'));
    expectError('name-too-long', () => names.lookup(vms.nodeId, 'x'.repeat(256)));
    expectError('not-found', () => names.getattr(99));
    expectError('not-found', () => names.readdir(99, 0, 10));
    expectError('not-a-directory', () => names.readdir(file.nodeId, 0, 10));
    expectError('invalid-argument', () => names.readlink(file.nodeId));
  });

  it('reads a directory in parts, which a removal between them does not disturb', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    for (const name of ['e', 'd', 'c', 'b', 'a']) names.mkdir(vms.nodeId, name, 0o755, CALLER);
    const first = names.readdir(vms.nodeId, 0, 2);
    expect(first.map((entry) => entry.name)).toEqual(['e', 'd']);
    expect(first[0]?.attributes).toEqual(names.lookup(vms.nodeId, 'e'));
    names.rmdir(vms.nodeId, 'd');
    names.rmdir(vms.nodeId, 'c');
    names.rename(vms.nodeId, 'e', vms.nodeId, 'z', PLAIN);
    expect(names.readdir(vms.nodeId, first[1]?.cookie ?? 0, 10).map((entry) => entry.name)).toEqual(['b', 'a']);
    expect(names.readdir(vms.nodeId, 0, 0)).toEqual([]);
  });
});

describe('attributes', () => {
  it('change the times of the directories that a change of names touches', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const [a, b] = [container(fixture, 'a'), container(fixture, 'b')];
    const touchedBy = (change: () => unknown): string[] => {
      const nodes = { root: ROOT_NODE_ID, a: a.nodeId, b: b.nodeId };
      const before = Object.values(nodes).map((node) => names.getattr(node));
      change();
      return Object.keys(nodes).filter((_, index) => {
        const was = before[index];
        const is = names.getattr(was?.nodeId ?? 0);
        expect(is.atimeUs).toBe(was?.atimeUs);
        expect(is.mtimeUs > (was?.mtimeUs ?? 0)).toBe(is.ctimeUs > (was?.ctimeUs ?? 0));
        return is.mtimeUs > (was?.mtimeUs ?? 0);
      });
    };
    expect(touchedBy(() => names.create(a.nodeId, 'f', 0o644, CALLER))).toEqual(['a']);
    expect(touchedBy(() => names.mkdir(a.nodeId, 'd', 0o755, CALLER))).toEqual(['a']);
    expect(touchedBy(() => names.symlink(b.nodeId, 's', 'x', CALLER))).toEqual(['b']);
    expect(touchedBy(() => { names.rename(a.nodeId, 'f', b.nodeId, 'f', PLAIN); })).toEqual(['a', 'b']);
    expect(touchedBy(() => { names.rename(a.nodeId, 'd', b.nodeId, 'f', EXCHANGE); })).toEqual(['a', 'b']);
    expect(touchedBy(() => { names.rename(b.nodeId, 'f', b.nodeId, 'g', PLAIN); })).toEqual(['b']);
    expect(touchedBy(() => { names.rename(b.nodeId, 'g', b.nodeId, 'g', PLAIN); })).toEqual([]);
    expect(touchedBy(() => { names.unlink(b.nodeId, 's'); })).toEqual(['b']);
    expect(touchedBy(() => { names.rmdir(b.nodeId, 'g'); })).toEqual(['b']);
    expect(touchedBy(() => names.lookup(a.nodeId, 'd'))).toEqual([]);
    expect(touchedBy(() => container(fixture, 'c'))).toEqual(['root']);
  });

  it('are applied as given, with the change time set', () => {
    const fixture = openNamespace();
    const { names, clock } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o644, CALLER);
    expect(names.applyAttributes(file.nodeId, {})).toEqual(file);
    const changed = names.applyAttributes(file.nodeId, { mode: 0o106711, uid: 5, gid: 6, atimeUs: 10, mtimeUs: 'now' });
    expect(changed).toEqual({ ...file, mode: 0o6711, uid: 5, gid: 6, atimeUs: 10, mtimeUs: clock.nowUs, ctimeUs: clock.nowUs });
    expect(names.getattr(file.nodeId)).toEqual(changed);
    expect(names.applyAttributes(file.nodeId, { mtimeUs: -5, ctimeUs: 77 })).toMatchObject({ mtimeUs: -5, ctimeUs: 77, atimeUs: 10 });
    expect(names.applyAttributes(file.nodeId, { mtimeUs: 2 ** 60 }).mtimeUs).toBe(Number.MAX_SAFE_INTEGER);
    expectError('not-found', () => names.applyAttributes(99, { mode: 0 }));
  });

  it('lose the set-id bits with a new owner, but not with the mode given at the same time', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o6755, CALLER);
    expect(names.applyAttributes(file.nodeId, { uid: 5 }).mode).toBe(0o755);
    names.applyAttributes(file.nodeId, { mode: 0o6745 });
    expect(names.applyAttributes(file.nodeId, { gid: 5 }).mode).toBe(0o2745);
    expect(names.applyAttributes(file.nodeId, { gid: 6, mode: 0o4755 }).mode).toBe(0o4755);
    names.applyAttributes(vms.nodeId, { mode: 0o2755 });
    expect(names.applyAttributes(vms.nodeId, { uid: 5 }).mode).toBe(0o2755);
  });

  it('of an open node are the live ones, which no change of another turns back', () => {
    const fixture = openNamespace();
    const { names, data, meta, clock } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o644, CALLER);
    const live = { sizeBytes: 12_345, atimeUs: 2e15, mtimeUs: 3e15, ctimeUs: 3e15 };
    data.open.set(file.nodeId, live);
    expect(names.getattr(file.nodeId)).toEqual({ ...file, ...live });
    expect(names.readdir(vms.nodeId, 0, 1)[0]?.attributes).toEqual({ ...file, ...live });
    const changed = names.applyAttributes(file.nodeId, { mode: 0o600 });
    expect(changed).toEqual({ ...file, ...live, mode: 0o600, ctimeUs: clock.nowUs });
    names.rename(vms.nodeId, 'f', vms.nodeId, 'g', PLAIN);
    expect(names.getattr(file.nodeId)).toEqual({ ...changed, ctimeUs: clock.nowUs });
    names.unlink(vms.nodeId, 'g');
    expect(names.getattr(file.nodeId)).toEqual({ ...changed, ctimeUs: clock.nowUs, linkCount: 0 });
    expect(data.changed).toEqual([file.nodeId, file.nodeId, file.nodeId]);
    expect(meta.nodes.byId(file.nodeId)).toMatchObject({ sizeBytes: 0, mtimeUs: 3e15 });
  });
});

describe('paths of the control API', () => {
  it('lead to nodes', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    const directory = names.mkdir(vms.nodeId, 'a b', 0o755, CALLER);
    const file = names.create(directory.nodeId, 'é', 0o644, CALLER);
    names.symlink(vms.nodeId, 'link', 'a b', CALLER);
    expect(names.resolve('vms').id).toBe(vms.nodeId);
    expect(names.resolve('vms/a b/é').id).toBe(file.nodeId);
    expect(expectError('not-found', () => names.resolve('vms/a b/f')).message).toContain('"vms/a b/f"');
    expectError('not-a-directory', () => names.resolve('vms/a b/é/x'));
    expectError('not-a-directory', () => names.resolve('vms/link/é'));
    for (const path of ['', '/', '/vms', 'vms/', 'vms//a b', 'vms/../vms', './vms', 'vms/a\nb']) expectError('invalid-name', () => names.resolve(path));
    expectError('name-too-long', () => names.resolve(`vms/${'x'.repeat(256)}`));
  });

  it('lead to where something new would go', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    const file = names.create(vms.nodeId, 'f', 0o644, CALLER);
    expect(names.resolveNew('new')).toMatchObject({ parent: { id: ROOT_NODE_ID }, name: 'new' });
    expect(names.resolveNew('vms/new.img')).toMatchObject({ parent: { id: vms.nodeId }, name: 'new.img' });
    expectError('already-exists', () => names.resolveNew('vms/f'));
    expectError('already-exists', () => names.resolveNew('vms'));
    expectError('not-found', () => names.resolveNew('vms/deep/new.img'));
    expectError('not-a-directory', () => names.resolveNew('vms/f/new.img'));
    expectError('invalid-name', () => names.resolveNew('v@ms'));
    expectError('invalid-name', () => names.resolveNew('vms/.block'));
    expectError('invalid-name', () => names.resolveNew('vms/..'));
    expect(names.getattr(file.nodeId)).toEqual(file);
  });
});
