import { describe, expect, it } from 'vitest';
import { ROOT_NODE_ID, type Attributes } from '../../daemon/filesystem/types.js';
import { expectError } from '../support/meta-store-fixture.js';
import { CALLER, container, EXCHANGE, namesIn, NO_REPLACE, openNamespace, PLAIN, type NamespaceFixture } from '../support/namespace-fixture.js';

describe('removing', () => {
  it('discards a closed file after the commit, and keeps an open one until its last close', () => {
    const fixture = openNamespace();
    const { names, data, meta } = fixture;
    const vms = container(fixture);
    const closed = names.create(vms.nodeId, 'closed', 0o644, CALLER);
    const open = names.create(vms.nodeId, 'open', 0o644, CALLER);
    data.openNode(open.nodeId);
    names.unlink(vms.nodeId, 'closed');
    names.unlink(vms.nodeId, 'open');
    expect(data.discarded).toEqual([closed.nodeId]);
    expectError('not-found', () => names.getattr(closed.nodeId));
    expect(names.getattr(open.nodeId).linkCount).toBe(0);
    expectError('not-found', () => names.lookup(open.nodeId, '..'));
    expect(meta.nodes.orphans().map((node) => node.id)).toEqual([open.nodeId]);
    data.release(open.nodeId);
    expect(data.discarded).toEqual([closed.nodeId, open.nodeId]);
    expect(meta.layers.unreferenced()).toEqual([]);
  });

  it('discards nothing when a transaction around it fails', () => {
    const fixture = openNamespace();
    const { names, data, meta } = fixture;
    const vms = container(fixture);
    names.create(vms.nodeId, 'f', 0o644, CALLER);
    expect(() =>
      meta.transaction(() => {
        names.unlink(vms.nodeId, 'f');
        throw new Error('stop');
      }),
    ).toThrow('stop');
    expect(data.discarded).toEqual([]);
    expect(namesIn(fixture, vms.nodeId)).toEqual(['f']);
  });

  it('tells directories from what is none, and empty ones from others', () => {
    const fixture = openNamespace();
    const { names } = fixture;
    const vms = container(fixture);
    names.create(vms.nodeId, 'f', 0o644, CALLER);
    names.symlink(vms.nodeId, 's', 'f', CALLER);
    expectError('not-empty', () => { names.rmdir(ROOT_NODE_ID, 'vms'); });
    expectError('is-a-directory', () => { names.unlink(ROOT_NODE_ID, 'vms'); });
    expectError('not-a-directory', () => { names.rmdir(vms.nodeId, 'f'); });
    expectError('not-found', () => { names.unlink(vms.nodeId, 'g'); });
    expectError('not-found', () => { names.rmdir(vms.nodeId, 'g'); });
    names.unlink(vms.nodeId, 'f');
    names.unlink(vms.nodeId, 's');
    names.rmdir(ROOT_NODE_ID, 'vms');
    expect(namesIn(fixture, ROOT_NODE_ID)).toEqual([]);
    expectError('not-found', () => names.mkdir(vms.nodeId, 'late', 0o755, CALLER));
  });
});

describe('renaming', () => {
  function twoContainers(): NamespaceFixture & { readonly a: Attributes; readonly b: Attributes } {
    const fixture = openNamespace();
    return { ...fixture, a: container(fixture, 'a'), b: container(fixture, 'b') };
  }

  it('moves files and directories, across containers, and keeps their ids', () => {
    const fixture = twoContainers();
    const { names, a, b } = fixture;
    const file = names.create(a.nodeId, 'f', 0o644, CALLER);
    const directory = names.mkdir(a.nodeId, 'd', 0o755, CALLER);
    names.rename(a.nodeId, 'f', directory.nodeId, 'g', PLAIN);
    names.rename(a.nodeId, 'd', b.nodeId, 'e', PLAIN);
    expect(names.resolve('b/e/g').id).toBe(file.nodeId);
    expect(names.getattr(a.nodeId).linkCount).toBe(2);
    expect(names.getattr(b.nodeId).linkCount).toBe(3);
    names.rename(b.nodeId, 'e', ROOT_NODE_ID, 'c', PLAIN);
    names.rename(ROOT_NODE_ID, 'a', b.nodeId, 'a', PLAIN);
    expect(namesIn(fixture, ROOT_NODE_ID)).toEqual(['b', 'c']);
    expect(names.resolve('b/a').id).toBe(a.nodeId);
  });

  it('replaces a file, open or closed, and an empty directory', () => {
    const { names, data, meta, a, b } = twoContainers();
    const make = (name: string): Attributes => names.create(a.nodeId, name, 0o644, CALLER);
    const [first, second, third] = [make('first'), make('second'), make('third')];
    data.openNode(third.nodeId);
    names.rename(a.nodeId, 'first', a.nodeId, 'second', PLAIN);
    expect(data.discarded).toEqual([second.nodeId]);
    names.rename(a.nodeId, 'second', a.nodeId, 'third', PLAIN);
    expect(data.discarded).toEqual([second.nodeId]);
    expect(meta.nodes.orphans().map((node) => node.id)).toEqual([third.nodeId]);
    expect(names.lookup(a.nodeId, 'third').nodeId).toBe(first.nodeId);
    names.rename(ROOT_NODE_ID, 'a', ROOT_NODE_ID, 'b', PLAIN);
    expect(names.lookup(ROOT_NODE_ID, 'b').nodeId).toBe(a.nodeId);
    expectError('not-found', () => names.getattr(b.nodeId));
  });

  it('does not replace what it must not', () => {
    const fixture = twoContainers();
    const { names, a, b } = fixture;
    names.create(a.nodeId, 'f', 0o644, CALLER);
    names.create(a.nodeId, 'g', 0o644, CALLER);
    names.mkdir(a.nodeId, 'd', 0o755, CALLER);
    names.mkdir(b.nodeId, 'x', 0o755, CALLER);
    expectError('not-empty', () => { names.rename(ROOT_NODE_ID, 'a', ROOT_NODE_ID, 'b', PLAIN); });
    expectError('is-a-directory', () => { names.rename(a.nodeId, 'f', a.nodeId, 'd', PLAIN); });
    expectError('not-a-directory', () => { names.rename(a.nodeId, 'd', a.nodeId, 'f', PLAIN); });
    expectError('already-exists', () => { names.rename(a.nodeId, 'f', a.nodeId, 'g', NO_REPLACE); });
    expectError('already-exists', () => { names.rename(a.nodeId, 'f', a.nodeId, 'f', NO_REPLACE); });
    expectError('not-found', () => { names.rename(a.nodeId, 'h', a.nodeId, 'g', PLAIN); });
    expectError('not-a-directory', () => { names.rename(a.nodeId, 'f', names.lookup(a.nodeId, 'g').nodeId, 'f', PLAIN); });
    expectError('invalid-argument', () => { names.rename(a.nodeId, 'f', a.nodeId, 'g', { noReplace: true, exchange: true }); });
    names.rename(a.nodeId, 'f', a.nodeId, 'f', PLAIN);
    names.rename(a.nodeId, 'f', a.nodeId, 'h', NO_REPLACE);
    expect(namesIn(fixture, a.nodeId)).toEqual(['h', 'g', 'd']);
  });

  it('never moves a directory into itself', () => {
    const { names, a } = twoContainers();
    const outer = names.mkdir(a.nodeId, 'outer', 0o755, CALLER);
    const inner = names.mkdir(outer.nodeId, 'inner', 0o755, CALLER);
    expectError('invalid-argument', () => { names.rename(a.nodeId, 'outer', outer.nodeId, 'x', PLAIN); });
    expectError('invalid-argument', () => { names.rename(a.nodeId, 'outer', inner.nodeId, 'x', PLAIN); });
    expectError('invalid-argument', () => { names.rename(ROOT_NODE_ID, 'a', inner.nodeId, 'x', PLAIN); });
    expectError('not-empty', () => { names.rename(outer.nodeId, 'inner', a.nodeId, 'outer', PLAIN); });
    expectError('invalid-argument', () => { names.rename(outer.nodeId, 'inner', a.nodeId, 'outer', EXCHANGE); });
    expectError('invalid-argument', () => { names.rename(a.nodeId, 'outer', outer.nodeId, 'inner', EXCHANGE); });
    expect(names.resolve('a/outer/inner').id).toBe(inner.nodeId);
  });

  it('exchanges two names, of any kind', () => {
    const fixture = twoContainers();
    const { names, data, a, b } = fixture;
    const file = names.create(a.nodeId, 'f', 0o644, CALLER);
    const directory = names.mkdir(b.nodeId, 'd', 0o755, CALLER);
    names.create(directory.nodeId, 'inside', 0o644, CALLER);
    names.rename(a.nodeId, 'f', b.nodeId, 'd', EXCHANGE);
    expect(names.lookup(a.nodeId, 'f').nodeId).toBe(directory.nodeId);
    expect(names.lookup(b.nodeId, 'd').nodeId).toBe(file.nodeId);
    expect(names.resolve('a/f/inside').kind).toBe('file');
    expect([a, b].map(({ nodeId }) => names.getattr(nodeId).linkCount)).toEqual([3, 2]);
    names.rename(ROOT_NODE_ID, 'a', ROOT_NODE_ID, 'b', EXCHANGE);
    expect(names.lookup(ROOT_NODE_ID, 'b').nodeId).toBe(a.nodeId);
    names.rename(b.nodeId, 'd', b.nodeId, 'd', EXCHANGE);
    expectError('not-found', () => { names.rename(b.nodeId, 'd', b.nodeId, 'e', EXCHANGE); });
    expect(data.discarded).toEqual([]);
  });
});
