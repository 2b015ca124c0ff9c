/**
 * The namespace against a plain tree: random operations on both, and after each of them the same tree, the same
 * orphans, the same nodes discarded. The model says what an operation needs in order to succeed, and what it does then.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { OffshootError } from '../../blockstore/errors.js';
import { ROOT_NODE_ID, type NodeId, type NodeKind } from '../../daemon/filesystem/types.js';
import { CALLER, openNamespace, type NamespaceFixture } from '../support/namespace-fixture.js';

type Path = readonly string[];

type PathOperation =
  | { readonly type: 'mkdir' | 'create' | 'symlink' | 'unlink' | 'rmdir' | 'open'; readonly path: Path }
  | { readonly type: 'release'; readonly which: number }
  | { readonly type: 'rename'; readonly from: Path; readonly to: Path; readonly mode: 'plain' | 'noReplace' | 'exchange' };

/** With one of the files that are there at that moment, rather than a path. */
interface FileOperation {
  readonly type: 'unlinkFile' | 'openFile';
  readonly which: number;
}

interface ModelNode {
  id: NodeId;
  readonly kind: NodeKind;
  readonly children: Map<string, ModelNode>;
}

class RefusedByModel extends Error {}

function require(condition: boolean): asserts condition {
  if (!condition) throw new RefusedByModel();
}

class TreeModel {
  readonly root: ModelNode = { id: ROOT_NODE_ID, kind: 'directory', children: new Map() };
  readonly open = new Set<ModelNode>();
  readonly orphans = new Set<ModelNode>();
  readonly discarded = new Set<NodeId>();

  directory(path: Path): ModelNode {
    let node = this.root;
    for (const name of path) {
      const child = node.children.get(name);
      require(child?.kind === 'directory');
      node = child;
    }
    return node;
  }

  at(path: Path): ModelNode {
    const node = this.directory(path.slice(0, -1)).children.get(path.at(-1) ?? '');
    require(node !== undefined);
    return node;
  }

  make(path: Path, kind: NodeKind): ModelNode {
    const directory = this.directory(path.slice(0, -1));
    const name = path.at(-1) ?? '';
    require(isAllowed(path) && !directory.children.has(name) && (path.length > 1 || kind === 'directory'));
    const node = { id: 0, kind, children: new Map<string, ModelNode>() };
    directory.children.set(name, node);
    return node;
  }

  remove(path: Path, isDirectory: boolean): void {
    const node = this.at(path);
    require((node.kind === 'directory') === isDirectory && node.children.size === 0);
    this.#takeName(path);
  }

  rename(from: Path, to: Path, mode: 'plain' | 'noReplace' | 'exchange'): void {
    const node = this.at(from);
    const directory = this.directory(to.slice(0, -1));
    const name = to.at(-1) ?? '';
    const there = directory.children.get(name);
    require(mode !== 'exchange' || there !== undefined);
    require(mode !== 'noReplace' || there === undefined);
    if (there === node) return;
    require(mayBeAt(node, to));
    if (mode === 'exchange') {
      require(there !== undefined && mayBeAt(there, from) && !holds(there, this.directory(from.slice(0, -1))));
    }
    require(!holds(node, directory));
    if (mode !== 'exchange' && there !== undefined) {
      require((there.kind === 'directory') === (node.kind === 'directory') && there.children.size === 0);
      this.#takeName(to);
    }
    const source = this.directory(from.slice(0, -1));
    if (mode === 'exchange' && there !== undefined) source.children.set(from.at(-1) ?? '', there);
    else source.children.delete(from.at(-1) ?? '');
    directory.children.set(name, node);
  }

  release(node: ModelNode): void {
    this.open.delete(node);
    if (this.orphans.delete(node)) this.discarded.add(node.id);
  }

  #takeName(path: Path): void {
    const node = this.at(path);
    this.directory(path.slice(0, -1)).children.delete(path.at(-1) ?? '');
    if (node.kind !== 'file') return;
    if (this.open.has(node)) this.orphans.add(node);
    else this.discarded.add(node.id);
  }
}

function isAllowed(path: Path): boolean {
  const name = path.at(-1) ?? '';
  return !(path.length === 1 && name.includes('@')) && !(path.length === 2 && name === '.block');
}

function mayBeAt(node: ModelNode, path: Path): boolean {
  return isAllowed(path) && (path.length > 1 || (node.kind === 'directory' && !node.children.has('.block')));
}

function holds(node: ModelNode, other: ModelNode): boolean {
  return node === other || [...node.children.values()].some((child) => holds(child, other));
}

function filesIn(node: ModelNode, path: Path = []): Path[] {
  return [...node.children].flatMap(([name, child]) => (child.kind === 'file' ? [[...path, name]] : filesIn(child, [...path, name])));
}

/** With a path in place of a number. */
function resolved(model: TreeModel, { type, which }: FileOperation): PathOperation {
  const files = filesIn(model.root);
  const path = files[which % Math.max(files.length, 1)] ?? ['a'];
  return { type: type === 'openFile' ? 'open' : 'unlink', path };
}

function isAboutAnyFile(operation: PathOperation | FileOperation): operation is FileOperation {
  return operation.type === 'unlinkFile' || operation.type === 'openFile';
}

/** Each node as one line: path, kind, id, link count. */
function linesOfModel(node: ModelNode, path = ''): string[] {
  const directories = [...node.children.values()].filter((child) => child.kind === 'directory').length;
  const links = node.kind === 'directory' ? 2 + directories : 1;
  return [`${path} ${node.kind} ${node.id} ${links}`, ...[...node.children].flatMap(([name, child]) => linesOfModel(child, `${path}/${name}`))];
}

function linesOfStore(fixture: NamespaceFixture, node: NodeId = ROOT_NODE_ID, path = ''): string[] {
  const { kind, linkCount } = fixture.names.getattr(node);
  const children = kind === 'directory' ? fixture.names.readdir(node, 0, 1000) : [];
  for (const { name, attributes } of children) {
    expect(fixture.names.lookup(node, name)).toEqual(attributes);
    expect(fixture.names.parentOf(attributes.nodeId)).toBe(node);
  }
  return [`${path} ${kind} ${node} ${linkCount}`, ...children.flatMap((entry) => linesOfStore(fixture, entry.attributes.nodeId, `${path}/${entry.name}`))];
}

function parentAndName({ names }: NamespaceFixture, path: Path): [parent: NodeId, name: string] {
  let node: NodeId = ROOT_NODE_ID;
  for (const name of path.slice(0, -1)) node = names.lookup(node, name).nodeId;
  return [node, path.at(-1) ?? ''];
}

/** Does it to the store, and gives the id of a node that it made. */
function applyToStore(fixture: NamespaceFixture, operation: PathOperation, nodeOfModel: NodeId): NodeId {
  const { names, data } = fixture;
  switch (operation.type) {
    case 'mkdir': return names.mkdir(...parentAndName(fixture, operation.path), 0o755, CALLER).nodeId;
    case 'create': return names.create(...parentAndName(fixture, operation.path), 0o644, CALLER).nodeId;
    case 'symlink': return names.symlink(...parentAndName(fixture, operation.path), 'target', CALLER).nodeId;
    case 'unlink': names.unlink(...parentAndName(fixture, operation.path)); return 0;
    case 'rmdir': names.rmdir(...parentAndName(fixture, operation.path)); return 0;
    case 'open': data.openNode(nodeOfModel); return 0;
    case 'release': data.release(nodeOfModel); return 0;
    case 'rename': {
      const flags = { noReplace: operation.mode === 'noReplace', exchange: operation.mode === 'exchange' };
      names.rename(...parentAndName(fixture, operation.from), ...parentAndName(fixture, operation.to), flags);
      return 0;
    }
  }
}

/** Does it to the model, and gives the node it made, or is about. */
function applyToModel(model: TreeModel, operation: PathOperation): ModelNode | undefined {
  switch (operation.type) {
    case 'mkdir': return model.make(operation.path, 'directory');
    case 'create': return model.make(operation.path, 'file');
    case 'symlink': return model.make(operation.path, 'symlink');
    case 'unlink': model.remove(operation.path, false); return undefined;
    case 'rmdir': model.remove(operation.path, true); return undefined;
    case 'rename': model.rename(operation.from, operation.to, operation.mode); return undefined;
    case 'open': {
      const node = model.at(operation.path);
      require(node.kind === 'file' && !model.open.has(node));
      model.open.add(node);
      return node;
    }
    case 'release': {
      const node = [...model.open][operation.which % Math.max(model.open.size, 1)];
      require(node !== undefined);
      model.release(node);
      return node;
    }
  }
}

function attempt<T>(body: () => T, isRefusal: (thrown: unknown) => boolean): { readonly value: T } | undefined {
  try {
    return { value: body() };
  } catch (thrown) {
    if (isRefusal(thrown)) return undefined;
    throw thrown;
  }
}

function step(fixture: NamespaceFixture, model: TreeModel, operation: PathOperation): void {
  const { data, meta } = fixture;
  const byModel = attempt(() => applyToModel(model, operation), (thrown) => thrown instanceof RefusedByModel);
  const isAboutOpenNodes = operation.type === 'open' || operation.type === 'release';
  if (!isAboutOpenNodes || byModel !== undefined) {
    const byStore = attempt(() => applyToStore(fixture, operation, byModel?.value?.id ?? 0), (thrown) => thrown instanceof OffshootError && thrown.kind !== 'internal');
    expect(byStore !== undefined).toBe(byModel !== undefined);
    if (byModel?.value !== undefined && byStore !== undefined && !isAboutOpenNodes) byModel.value.id = byStore.value;
  }
  expect(linesOfStore(fixture).sort()).toEqual(linesOfModel(model.root).sort());
  expect(meta.nodes.orphans().map((node) => node.id)).toEqual([...model.orphans].map((node) => node.id).sort((left, right) => left - right));
  expect(new Set(data.discarded)).toEqual(model.discarded);
  expect(data.discarded).toHaveLength(model.discarded.size);
  expect(meta.layers.unreferenced()).toEqual([]);
}

const name = fc.oneof({ weight: 12, arbitrary: fc.constantFrom('a', 'b', 'c') }, { weight: 1, arbitrary: fc.constantFrom('.block', 'x@y') });
const path = fc.array(name, { minLength: 1, maxLength: 4 });
const operation: fc.Arbitrary<PathOperation | FileOperation> = fc.oneof(
  { weight: 4, arbitrary: fc.record({ type: fc.constant('mkdir' as const), path }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constant('create' as const), path }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constantFrom('symlink' as const, 'rmdir' as const), path }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constantFrom('unlink' as const, 'open' as const), path }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constantFrom('unlinkFile' as const, 'openFile' as const), which: fc.nat(5) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('release' as const), which: fc.nat(5) }) },
  { weight: 5, arbitrary: fc.record({ type: fc.constant('rename' as const), from: path, to: path, mode: fc.constantFrom('plain' as const, 'noReplace' as const, 'exchange' as const) }) },
);

describe('the namespace', () => {
  it('is a plain tree, whatever is done to it', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(fc.array(operation, { minLength: 1, maxLength: 60, size: 'max' }), (operations) => {
        const fixture = openNamespace();
        const model = new TreeModel();
        // A start with some depth, so that random paths lead somewhere.
        const start: PathOperation[] = [['a'], ['b'], ['a', 'b'], ['b', 'a']].map((made) => ({ type: 'mkdir', path: made }));
        for (const next of [...start, ...operations]) step(fixture, model, isAboutAnyFile(next) ? resolved(model, next) : next);
        fixture.meta.close();
      }),
      { numRuns: 60 },
    );
  });
});
