/**
 * What an operator does with containers and clones in the recorded process, through the code that serves the control API; with the markers that
 * say which names one operation makes, changes and takes away.
 *
 * Directories have a name that ends with a slash, see `FoundDisk`.
 */
import type { NodeRow } from '../../../blockstore/meta/rows.js';
import { ROOT_ID } from '../../../blockstore/meta/rows.js';
import { originOf } from '../../../blockstore/promote.js';
import { SNAPSHOTS_NAME, listTree } from '../../../blockstore/trees.js';
import { copyRange } from '../../../daemon/filesystem/copy-range.js';
import { cloneTree } from '../../../daemon/server/clone-trees.js';
import { removeNode } from '../../../daemon/server/remove-node.js';
import { controlParts, type ControlParts } from '../control-parts.js';
import type { Begun, Guest } from './guest.js';

const OPERATOR = { uid: 0, gid: 0, pid: 1 };

export class ContainerGuest {
  readonly guest: Guest;
  parts: ControlParts;

  constructor(guest: Guest) {
    this.guest = guest;
    this.parts = controlParts(guest.store);
  }

  /** What the next server has instead of what this one remembers. */
  restart(): void {
    this.parts = controlParts(this.guest.store);
  }

  /** A container, or a directory in one. */
  makeDirectory(directory: string): void {
    const at = directory.lastIndexOf('/');
    const parent = at < 0 ? ROOT_ID : this.guest.idOf(directory.slice(0, at));
    this.guest.marked({ op: 'create', disk: `${directory}/`, sizeBytes: 0, seed: 0, holes: 0 }, () => {
      this.parts.fileSystem.mkdir(parent, directory.slice(at + 1), 0o755, OPERATOR);
    });
  }

  /** Nothing is written meanwhile, so that every instant is the snapshot's. `inside`: of one disk of the container. */
  async snapshot(container: string, name: string, inside: string | null = null): Promise<void> {
    const sources = this.namesIn(container).filter((source) => inside === null || source === '' || source === inside || (source.endsWith('/') && inside.startsWith(source)));
    const top = this.namesOf(`${container}/${SNAPSHOTS_NAME}`) === null ? [`${container}/${SNAPSHOTS_NAME}/`] : [];
    await this.during({
      op: 'snapshot', disks: [...top.map(() => `${container}/`), ...sources.map((source) => `${container}/${source}`)],
      targets: [...top, ...sources.map((source) => `${container}/${SNAPSHOTS_NAME}/${name}/${source}`)],
    }, async () => await this.parts.snapshots.create({ reference: `${container}${inside === null ? '' : `/${inside}`}@${name}`, quiesce: null }));
  }

  async removeSnapshot(container: string, name: string): Promise<void> {
    const directory = `${container}/${SNAPSHOTS_NAME}`;
    const gone = this.namesIn(`${directory}/${name}`).map((each) => `${directory}/${name}/${each}`);
    const { meta } = this.guest.store;
    if (meta.nodes.childCount(this.guest.idOf(directory)) === 1) gone.push(`${directory}/`);
    await this.during({ op: 'turn', made: [], changed: [], gone }, async () => await this.parts.snapshots.remove(this.referenceOf(container, name), { keepData: true }));
  }

  /** Nothing of it may be open. */
  async revert(container: string, name: string): Promise<void> {
    const { meta } = this.guest.store;
    const inside = meta.snapshots.byName(this.guest.idOf(container), name)?.path ?? null;
    const frozen = this.namesIn(`${container}/${SNAPSHOTS_NAME}/${name}`).filter((each) => inside === null || each === inside);
    const present = this.namesIn(container).filter((each) => inside === null || each === inside);
    const turned = (each: string): { readonly disk: string; readonly content: { readonly copyOf: string } } => (
      { disk: `${container}/${each}`, content: { copyOf: `${container}/${SNAPSHOTS_NAME}/${name}/${each}` } }
    );
    await this.during({
      op: 'turn', made: frozen.filter((each) => !present.includes(each)).map(turned), changed: frozen.filter((each) => present.includes(each) && isData(each)).map(turned),
      gone: present.filter((each) => !frozen.includes(each)).map((each) => `${container}/${each}`),
    }, async () => await this.parts.snapshots.revert(this.referenceOf(container, name)));
  }

  /** `source` is a container, or a snapshot of one. */
  async cloneContainer(source: string, targets: readonly string[]): Promise<void> {
    const { store } = this.guest;
    const resolved = this.parts.references.resolve(source);
    const names = this.namesIn(resolved.path);
    await this.during({
      op: 'snapshot', disks: targets.flatMap(() => names.map((name) => `${resolved.path}/${name}`)), targets: targets.flatMap((target) => names.map((name) => `${target}/${name}`)),
    }, async () => await cloneTree({ store, namespace: this.parts.fileSystem.namespace }, resolved, targets, { copyOnRead: false, record: () => undefined }));
  }

  async removeContainer(container: string): Promise<void> {
    const row = this.parts.fileSystem.namespace.resolve(container);
    const gone = this.namesIn(container).map((name) => `${container}/${name}`);
    await this.during({ op: 'turn', made: [], changed: [], gone }, async () => (
      await removeNode({ store: this.guest.store, fileSystem: this.parts.fileSystem }, row, container, { keepData: true, recursive: true })
    ));
  }

  /** copy_file_range(2), into an open disk or file. Promises what a write promises. */
  async copyRange(source: string, disk: string, from: number, to: number, length: number): Promise<void> {
    this.guest.open(source);
    await this.during({ op: 'copy', source, disk, from, to, length }, async () => {
      const copied = await copyRange(this.guest.store, { source: this.guest.idOf(source), sourceAtBytes: from, target: this.guest.idOf(disk), targetAtBytes: to, lengthBytes: length });
      if (copied !== length) throw new Error(`${copied} of ${length} bytes were copied`);
    });
    this.guest.close(source);
  }

  async promote(disk: string): Promise<void> {
    const { store } = this.guest;
    const id = this.guest.idOf(disk);
    const origin = originOf(store.meta, id, store.meta.layers.chain(store.meta.nodes.byId(id)?.layerId ?? 0));
    if (origin === undefined) throw new Error(`${disk} is a clone of nobody`);
    await this.during({ op: 'promote', disk, origin: store.meta.nodes.pathOf(origin.id) }, () => store.promote(id));
  }

  /** `own`: the blocks that the clone has written or discarded. */
  async rebase(disk: string, image: string, own: readonly number[], force: boolean): Promise<void> {
    await this.during({ op: 'turn', made: [], changed: [{ disk, content: { copyOf: image }, except: own }], gone: [] }, async () => {
      const { rebased } = await this.guest.store.rebase(this.guest.idOf(disk), this.guest.idOf(image), force);
      if (!rebased) throw new Error(`${disk} was not rebased`);
    });
  }

  async during(marker: Begun, body: () => unknown): Promise<void> {
    this.guest.say({ ...marker, phase: 'begin' });
    await body();
    this.guest.say({ ...marker, phase: 'end' });
  }

  /** What is in a directory, itself first, as the empty name. */
  namesIn(directory: string): string[] {
    const names = this.namesOf(directory);
    if (names === null) throw new Error(`there is no ${directory}`);
    return names;
  }

  private namesOf(directory: string): string[] | null {
    const { meta } = this.guest.store;
    const root: NodeRow | undefined = meta.nodes.byPath(directory);
    if (root === undefined) return null;
    return listTree(meta, root).map((node) => (node.id === root.id ? '' : `${meta.nodes.pathOf(node.id).slice(directory.length + 1)}${node.kind === 'directory' ? '/' : ''}`));
  }

  private referenceOf(container: string, name: string): string {
    const row = this.guest.store.meta.snapshots.byName(this.guest.idOf(container), name);
    if (row === undefined) throw new Error(`${container} has no snapshot ${name}`);
    return this.parts.references.nameOf(row);
  }
}

function isData(name: string): boolean {
  return name !== '' && !name.endsWith('/');
}
