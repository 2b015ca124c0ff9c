/**
 * Rows of the metadata store as attributes, with the live values of open nodes on top. Main thread only.
 *
 * While a node is open its size and times may be ahead of the database, which follows at each flush; whoever writes
 * times to the row takes the live ones as the base, so that changing one of them never turns another back.
 */
import type { NodeTable } from '../../blockstore/meta/node-table.js';
import { ROOT_ID, type NodeRow, type NodeUpdate } from '../../blockstore/meta/rows.js';
import type { KnownAllocation, NodeData } from './node-data.js';
import type { AttributeChanges, Attributes } from './types.js';

export const MODE_MASK = 0o7777;
export const SET_GID = 0o2000;
const SET_UID = 0o4000;
const GROUP_EXECUTE = 0o010;

export interface NodeTimes {
  readonly atimeUs: number;
  readonly mtimeUs: number;
  readonly ctimeUs: number;
}

export function attributesOf(row: NodeRow, nodes: NodeTable, data: NodeData, known?: KnownAllocation): Attributes {
  const live = hasData(row) ? data.liveAttributes(row.id) : undefined;
  return {
    nodeId: row.id,
    generation: row.generation,
    kind: row.kind,
    mode: row.mode,
    uid: row.uid,
    gid: row.gid,
    linkCount: linkCountOf(row, nodes),
    sizeBytes: live?.sizeBytes ?? row.sizeBytes,
    allocatedBytes: hasData(row) ? data.allocatedBytes(row.layerId, known) : 0,
    atimeUs: live?.atimeUs ?? row.atimeUs,
    mtimeUs: live?.mtimeUs ?? row.mtimeUs,
    ctimeUs: live?.ctimeUs ?? row.ctimeUs,
  };
}

/** The times as they are now: the live ones of an open node, the row's otherwise. */
export function timesOf(row: NodeRow, data: NodeData): NodeTimes {
  const { atimeUs, mtimeUs, ctimeUs } = (hasData(row) ? data.liveAttributes(row.id) : undefined) ?? row;
  return { atimeUs, mtimeUs, ctimeUs };
}

/** What a setattr, its size apart, does to a row; undefined when it asks for nothing. `times` are those of `timesOf`. */
export function updateFor(
  before: NodeRow,
  times: NodeTimes,
  changes: Omit<AttributeChanges, 'sizeBytes'>,
  nowUs: number,
): NodeUpdate | undefined {
  const { mode, uid, gid, atimeUs, mtimeUs, ctimeUs } = changes;
  if ([mode, uid, gid, atimeUs, mtimeUs, ctimeUs].every((value) => value === undefined)) return undefined;
  const changesOwner = uid !== undefined || gid !== undefined;
  return {
    mode: mode === undefined ? modeAfter(before, changesOwner) : mode & MODE_MASK,
    uid: uid ?? before.uid,
    gid: gid ?? before.gid,
    atimeUs: timeGiven(atimeUs, nowUs) ?? times.atimeUs,
    mtimeUs: timeGiven(mtimeUs, nowUs) ?? times.mtimeUs,
    ctimeUs: timeGiven(ctimeUs, nowUs) ?? nowUs,
  };
}

/** Running programs must not gain rights that the former owner gave: as chown does everywhere. */
function modeAfter(before: NodeRow, changesOwner: boolean): number {
  if (!changesOwner || before.kind === 'directory') return before.mode;
  const dropped = (before.mode & GROUP_EXECUTE) === 0 ? SET_UID : SET_UID | SET_GID;
  return before.mode & ~dropped;
}

/** Times beyond what a double counts in microseconds (the year 2255) become the last one that it does, as in other file systems. */
function timeGiven(time: number | 'now' | undefined, nowUs: number): number | undefined {
  if (time === undefined) return undefined;
  if (time === 'now') return nowUs;
  return Math.min(Math.max(Math.trunc(time), Number.MIN_SAFE_INTEGER), Number.MAX_SAFE_INTEGER);
}

export function hasData(row: NodeRow): boolean {
  return row.kind === 'file' || row.kind === 'disk';
}

/** A directory is named by its parent, by its own `.`, and by the `..` of each directory in it. */
function linkCountOf(row: NodeRow, nodes: NodeTable): number {
  if (row.kind === 'directory') return 2 + nodes.directoryCount(row.id);
  return row.parentId === null && row.id !== ROOT_ID ? 0 : 1;
}
