/**
 * Nodes: names, attributes, and which layer is active. Main thread only.
 *
 * The table keeps the tree's hard rules (a name is taken once, a parent exists, an active layer belongs to one node)
 * and nothing of what the file system promises about names; that is `daemon/filesystem/namespace.ts`. Ids are never
 * used again. Iterators read in batches, so that the caller may write while it walks.
 */
import { OffshootError } from '../errors.js';
import { newGeneration } from './migrations.js';
import { ROOT_ID, type NewNode, type NodeKind, type NodeRow, type NodeUpdate } from './rows.js';
import { safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

const BATCH_ROWS = 256;

/** More ancestors than any path that could be made by hand: only a cycle, so a damaged database, gets here. */
const DEPTH_MAX = 100_000;

export const NODE_COLUMNS = `
  nodes.id, nodes.parent_id, nodes.name, nodes.kind, nodes.mode, nodes.uid, nodes.gid, nodes.size_bytes, nodes.atime_us,
  nodes.mtime_us, nodes.ctime_us, nodes.created_us, nodes.generation, nodes.layer_id, nodes.link_target, nodes.copy_on_read, nodes.fault, nodes.frozen`;

/** A row as SQLite gives it. */
export interface RawNode {
  readonly id: number;
  readonly parent_id: number | null;
  readonly name: string;
  readonly kind: string;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly size_bytes: number;
  readonly atime_us: number;
  readonly mtime_us: number;
  readonly ctime_us: number;
  readonly created_us: number;
  readonly generation: number;
  readonly layer_id: number | null;
  readonly link_target: string | null;
  readonly copy_on_read: number;
  readonly fault: string | null;
  readonly frozen: number;
}

export function toNodeRow(raw: RawNode): NodeRow {
  return {
    id: safeInteger(raw.id, 'nodes.id'),
    parentId: safeIntegerOrNull(raw.parent_id, 'nodes.parent_id'),
    name: raw.name,
    kind: raw.kind as NodeKind,
    mode: raw.mode,
    uid: raw.uid,
    gid: raw.gid,
    sizeBytes: safeInteger(raw.size_bytes, 'nodes.size_bytes'),
    atimeUs: safeInteger(raw.atime_us, 'nodes.atime_us'),
    mtimeUs: safeInteger(raw.mtime_us, 'nodes.mtime_us'),
    ctimeUs: safeInteger(raw.ctime_us, 'nodes.ctime_us'),
    createdUs: safeInteger(raw.created_us, 'nodes.created_us'),
    generation: raw.generation,
    layerId: safeIntegerOrNull(raw.layer_id, 'nodes.layer_id'),
    linkTarget: raw.link_target,
    copyOnRead: raw.copy_on_read === 1,
    fault: raw.fault,
    frozen: raw.frozen === 1,
  };
}

export interface NodeCounts {
  readonly disks: number;
  readonly containers: number;
  readonly snapshots: number;
}

/**
 * The times of a node that is open with `mtimeMs`. One that is another than the row's came from a write, which changed the node as well; the row's own was
 * given by somebody, to the microsecond, and says nothing of when that was. So the times of a node are the same whether it is open or not.
 */
export function timesAsWritten(row: Pick<NodeRow, 'mtimeUs' | 'ctimeUs'>, mtimeMs: number): { readonly mtimeUs: number; readonly ctimeUs: number } {
  if (mtimeMs === row.mtimeUs / 1000) return { mtimeUs: row.mtimeUs, ctimeUs: row.ctimeUs };
  const mtimeUs = Math.round(mtimeMs * 1000);
  return { mtimeUs, ctimeUs: Math.max(row.ctimeUs, mtimeUs) };
}

export class NodeTable {
  readonly #connection: SqlConnection;
  readonly #byId: SqlStatement<RawNode>;
  readonly #byLayer: SqlStatement<RawNode>;
  readonly #child: SqlStatement<RawNode>;
  readonly #childrenById: SqlStatement<RawNode>;
  readonly #childrenByName: SqlStatement<RawNode>;
  readonly #childCount: SqlStatement<{ readonly count: number }>;
  readonly #directoryCount: SqlStatement<{ readonly count: number }>;
  readonly #orphans: SqlStatement<RawNode>;
  readonly #orphanIds: SqlStatement<{ readonly id: number }>;
  readonly #insert: SqlStatement<unknown>;
  readonly #updateAttributes: SqlStatement<unknown>;
  readonly #updateLayer: SqlStatement<unknown>;
  readonly #move: SqlStatement<unknown>;
  readonly #takeName: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;
  readonly #counts: SqlStatement<NodeCounts>;
  readonly #faulted: SqlStatement<RawNode>;
  readonly #virtualBytes: SqlStatement<{ readonly bytes: number }>;

  constructor(connection: SqlConnection) {
    const select = `SELECT ${NODE_COLUMNS} FROM nodes`;
    this.#connection = connection;
    this.#byId = connection.prepare(`${select} WHERE id = ?`);
    this.#byLayer = connection.prepare(`${select} WHERE layer_id = ?`);
    this.#child = connection.prepare(`${select} WHERE parent_id = ? AND name = ?`);
    this.#childrenById = connection.prepare(`${select} WHERE parent_id = ? AND id > ? ORDER BY id LIMIT ?`);
    this.#childrenByName = connection.prepare(`${select} WHERE parent_id = ? AND name > ? ORDER BY name LIMIT ?`);
    this.#childCount = connection.prepare('SELECT count(*) AS count FROM nodes WHERE parent_id = ?');
    this.#directoryCount = connection.prepare(
      "SELECT count(*) AS count FROM nodes INDEXED BY directories_by_parent WHERE parent_id = ? AND kind = 'directory'",
    );
    this.#orphans = connection.prepare(`${select} WHERE parent_id IS NULL AND id <> ${ROOT_ID} ORDER BY id`);
    this.#orphanIds = connection.prepare(`SELECT id FROM nodes WHERE parent_id IS NULL AND id <> ${ROOT_ID} ORDER BY id`);
    this.#insert = connection.prepare(
      `INSERT INTO nodes (parent_id, name, kind, mode, uid, gid, size_bytes, atime_us, mtime_us, ctime_us, created_us, generation, layer_id, link_target, copy_on_read, fault, frozen)
       VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
    );
    // The layer has a statement of its own: an update of attributes then touches no index, so one page and not three.
    this.#updateAttributes = connection.prepare(
      `UPDATE nodes SET mode = ?, uid = ?, gid = ?, size_bytes = ?, atime_us = ?, mtime_us = ?, ctime_us = ?, copy_on_read = ?, fault = ? WHERE id = ?`,
    );
    this.#updateLayer = connection.prepare('UPDATE nodes SET layer_id = ? WHERE id = ?');
    this.#move = connection.prepare('UPDATE nodes SET parent_id = ?, name = ? WHERE id = ?');
    this.#takeName = connection.prepare(`UPDATE nodes SET parent_id = NULL, name = '', ctime_us = ? WHERE id = ?`);
    this.#remove = connection.prepare('DELETE FROM nodes WHERE id = ?');
    this.#counts = connection.prepare(
      `SELECT (SELECT count(*) FROM nodes WHERE kind = 'disk' AND frozen = 0) AS disks, (SELECT count(*) FROM nodes WHERE parent_id = ${ROOT_ID}) AS containers,
         (SELECT count(*) FROM snapshots) AS snapshots`,
    );
    this.#virtualBytes = connection.prepare("SELECT coalesce(sum(size_bytes), 0) AS bytes FROM nodes WHERE kind IN ('disk', 'file') AND frozen = 0");
    this.#faulted = connection.prepare(`${select} WHERE fault IS NOT NULL ORDER BY id`);
  }

  byId(id: number): NodeRow | undefined {
    return rowOrNone(this.#byId.get(id));
  }

  /** The node whose active layer this is. */
  byLayer(layerId: number): NodeRow | undefined {
    return rowOrNone(this.#byLayer.get(layerId));
  }

  child(parentId: number, name: string): NodeRow | undefined {
    return rowOrNone(this.#child.get(parentId, name));
  }

  /** At most `limit` children with an id above `afterId`, in the order of their ids. */
  children(parentId: number, afterId: number, limit: number): NodeRow[] {
    return this.#childrenById.all(parentId, afterId, limit).map(toNodeRow);
  }

  /** The nodes of a directory whose names begin with `prefix`, in the order of their names; few are expected. */
  childrenWithPrefix(parentId: number, prefix: string): NodeRow[] {
    // Every name that begins with it comes right behind it.
    const found = this.#childrenByName.all(parentId, prefix, BATCH_ROWS).map(toNodeRow);
    const end = found.findIndex((row) => !row.name.startsWith(prefix));
    return end < 0 ? found : found.slice(0, end);
  }

  /** What is in the store. Disks in snapshots are no disks of their own: nobody can write to them. */
  counts(): NodeCounts {
    return this.#counts.get() ?? { disks: 0, containers: 0, snapshots: 0 };
  }

  /** Virtual sizes of all disks and files that can be written to; of one that is open, as of its last commit. */
  virtualBytes(): number {
    return this.#virtualBytes.get()?.bytes ?? 0;
  }

  /** The nodes that take no more writes. */
  faulted(): NodeRow[] {
    return this.#faulted.all().map(toNodeRow);
  }

  childCount(parentId: number): number {
    return this.#childCount.get(parentId)?.count ?? 0;
  }

  directoryCount(parentId: number): number {
    return this.#directoryCount.get(parentId)?.count ?? 0;
  }

  /** Adds a node under a name; a name that is taken is `already-exists`. */
  insert(fields: NewNode): NodeRow {
    const generation = newGeneration();
    const createdUs = Date.now() * 1000;
    const { lastId } = this.#refusingTakenNames(fields.name, () =>
      this.#insert.run(
        fields.parentId,
        fields.name,
        fields.kind,
        fields.mode,
        fields.uid,
        fields.gid,
        fields.sizeBytes,
        fields.atimeUs,
        fields.mtimeUs,
        fields.ctimeUs,
        createdUs,
        generation,
        fields.layerId,
        fields.linkTarget,
        fields.copyOnRead ? 1 : 0,
        fields.fault,
        fields.frozen === true ? 1 : 0,
      ),
    );
    return { ...fields, frozen: fields.frozen === true, id: lastId, generation, createdUs };
  }

  /** Changes what is given and leaves the rest. A node that is gone is `not-found`. */
  update(id: number, changes: NodeUpdate): void {
    this.#connection.transaction(() => {
      const before = this.#existing(id);
      const { layerId, ...attributes } = changes;
      if (Object.keys(attributes).length > 0) {
        const after = { ...before, ...attributes };
        this.#updateAttributes.run(
          after.mode,
          after.uid,
          after.gid,
          after.sizeBytes,
          after.atimeUs,
          after.mtimeUs,
          after.ctimeUs,
          after.copyOnRead ? 1 : 0,
          after.fault,
          id,
        );
      }
      if (layerId !== undefined && layerId !== before.layerId) this.#updateLayer.run(layerId, id);
    });
  }

  /** What an open disk or file knows better than its row. */
  written(id: number, mtimeMs: number, sizeBytes?: number): void {
    this.update(id, { ...timesAsWritten(this.#existing(id), mtimeMs), ...(sizeBytes === undefined ? {} : { sizeBytes }) });
  }

  /** Gives the node another name; a name that is taken is `already-exists`. Cycles are the caller's to refuse. */
  move(id: number, newParentId: number, newName: string): void {
    const { changes } = this.#refusingTakenNames(newName, () => this.#move.run(newParentId, newName, id));
    if (changes === 0) throw gone(id);
  }

  /** Takes the node's name away and keeps the node. */
  orphan(id: number): void {
    if (id === ROOT_ID) throw new Error('the root directory cannot lose its place');
    if (this.#move.run(null, '', id).changes === 0) throw gone(id);
  }

  /** Takes the names of many nodes away, and keeps the nodes: one statement for each, for they may be ten thousand. */
  orphanAll(ids: readonly number[], nowUs: number): void {
    this.#connection.transaction(() => {
      for (const id of ids) {
        if (id === ROOT_ID) throw new Error('the root directory cannot lose its place');
        if (this.#takeName.run(nowUs, id).changes === 0) throw gone(id);
      }
    });
  }

  /** Removes the row; of a directory, only without children. Its layer stays, for the caller to look after. */
  remove(id: number): void {
    if (id === ROOT_ID) throw new Error('the root directory cannot be removed');
    this.#remove.run(id);
  }

  /** Nodes without a name: after a restart, what lost its last name while it was open, or was not cleared away in time. */
  orphans(): NodeRow[] {
    return this.#orphans.all().map(toNodeRow);
  }

  orphanIds(): number[] {
    return this.#orphanIds.all().map((row) => row.id);
  }

  /** The node at `container/directory/file`, the root at the empty path. Symlinks are not followed. */
  byPath(path: string): NodeRow | undefined {
    let node = this.byId(ROOT_ID);
    if (path === '') return node;
    for (const name of path.split('/')) {
      if (node === undefined) return undefined;
      node = this.child(node.id, name);
    }
    return node;
  }

  /**
   * The path under the mount without a leading slash, empty for the root. An orphan has none any more: it is written
   * `@deleted/ID`, which is no path, for a container's name never holds `@`.
   */
  pathOf(id: number): string {
    const names: string[] = [];
    let node = this.#existing(id);
    while (node.parentId !== null) {
      if (names.length === DEPTH_MAX) {
        throw new OffshootError('store-damaged', `the directories above node ${id} run in a circle: restore the store's database from a backup`, { nodeId: id });
      }
      names.push(node.name);
      node = this.#existing(node.parentId);
    }
    if (node.id !== ROOT_ID) names.push(`@deleted/${node.id}`);
    return names.reverse().join('/');
  }

  /**
   * All files and disks below a directory (null: below the root), directory by directory, the names in each in the
   * order of their bytes.
   */
  *disksUnder(parentId: number | null): Generator<NodeRow, void, undefined> {
    const open: { readonly parentId: number; readonly rows: NodeRow[]; next: number; isLast: boolean }[] = [];
    const enter = (id: number, afterName: string): void => {
      const rows = this.#childrenByName.all(id, afterName, BATCH_ROWS).map(toNodeRow);
      open.push({ parentId: id, rows, next: 0, isLast: rows.length < BATCH_ROWS });
    };
    enter(parentId ?? ROOT_ID, '');
    for (let level = open.at(-1); level !== undefined; level = open.at(-1)) {
      const node = level.rows[level.next];
      if (node === undefined) {
        open.pop();
        const lastName = level.rows.at(-1)?.name;
        if (!level.isLast && lastName !== undefined) enter(level.parentId, lastName);
        continue;
      }
      level.next += 1;
      if (node.kind === 'directory') enter(node.id, '');
      else if (node.kind !== 'symlink') yield node;
    }
  }

  #existing(id: number): NodeRow {
    const row = this.byId(id);
    if (row === undefined) throw gone(id);
    return row;
  }

  #refusingTakenNames<T>(name: string, statement: () => T): T {
    try {
      return statement();
    } catch (thrown) {
      if (isTakenName(thrown)) throw new OffshootError('already-exists', `"${name}" exists already: choose another name, or remove it first`, { name }, thrown);
      throw thrown;
    }
  }
}

function rowOrNone(raw: RawNode | undefined): NodeRow | undefined {
  return raw === undefined ? undefined : toNodeRow(raw);
}

function gone(id: number): OffshootError {
  return new OffshootError('not-found', `node ${id} does not exist any more: look its name up again`, { nodeId: id });
}

/** The other unique columns (an active layer of two nodes) are a mistake of the program and stay what they are. */
function isTakenName(thrown: unknown): boolean {
  return (
    thrown instanceof Error &&
    (thrown as { readonly code?: unknown }).code === 'SQLITE_CONSTRAINT_UNIQUE' &&
    thrown.message.includes('nodes.parent_id')
  );
}
