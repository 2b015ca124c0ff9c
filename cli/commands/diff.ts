/**
 * `offshoot snapshot diff A B`: what changed between two snapshots, or between a snapshot and now.
 *
 * The daemon knows from its metadata which blocks may differ. With --exact, and whenever the two have nothing in common, their content
 * is read under the mount and compared.
 */
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import type { ControlClient } from '../../daemon/control/client.js';
import { visible } from '../../daemon/control/paths.js';
import type { ExtentInfo, TreeNode } from '../../daemon/control/transfer-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { extentPages, openMounted, PIECE_BYTES, pushExtent, readPiece } from '../mounted-disk.js';
import { counted, renderTable } from '../output.js';
import { formatBytes, formatCount } from '../sizes.js';

interface DiffOptions {
  readonly exact?: boolean;
}

/** What `--json` prints of one disk. */
interface DiskChanges {
  readonly kind: 'disk';
  readonly from: string;
  readonly to: string;
  readonly fromSizeBytes: number;
  readonly toSizeBytes: number;
  /** Contents were compared. */
  readonly exact: boolean;
  readonly extents: readonly ExtentInfo[];
}

interface EntryChange {
  readonly path: string;
  readonly kind: TreeNode['kind'];
  readonly change: 'added' | 'removed' | 'changed';
  readonly sizeBytes: number;
  readonly attributesChanged: boolean;
  readonly extents: readonly ExtentInfo[];
}

/** What `--json` prints of a container. */
interface ContainerChanges {
  readonly kind: 'container';
  readonly from: string;
  readonly to: string;
  readonly entries: readonly EntryChange[];
}

const BLOCK_BYTES = 4096;
/** Extents that are listed for people. */
const LISTED_MAX = 40;

/** Beside the other commands of snapshots. */
export function addDiffCommand(program: Command, io: CliIo): void {
  const group = program.commands.find((command) => command.name() === 'snapshot');
  if (group === undefined) throw new Error('the commands of snapshots are added first');
  group.command('diff')
    .description('Show which extents of a disk, or which disks and files of a container, changed between two snapshots, or since one.')
    .usage('A B [OPTIONS]')
    .argument('<from>', 'the older one: CONTAINER[/PATH]@NAME')
    .argument('<to>', 'the newer one: CONTAINER[/PATH][@NAME]; without @NAME as it is now')
    .option('--exact', 'read and compare what may have changed: lists no block whose content is the same')
    .addHelpText('after', `
Without --exact a block that was written to counts as changed, whatever was written;
nothing is read. Extents of type zero hold nothing but zeros now. With --json a backup
tool gets {"extents": [{"offsetBytes", "lengthBytes", "type"}]}.

Examples:
  offshoot snapshot diff vms/db.img@monday vms/db.img@tuesday --json
  offshoot snapshot diff vms@monday vms
`)
    .action(async (from: string, to: string, options: DiffOptions, command: Command) => {
      await diff(contextOf(io, command), from, to, options.exact === true);
    });
}

async function diff(context: CliContext, from: string, to: string, exact: boolean): Promise<void> {
  const client = context.client();
  const [older, newer] = await Promise.all([client.transfers.tree(from), client.transfers.tree(to)]);
  if (older.kind !== newer.kind) throw new OffshootError('invalid-argument', `${visible(from)} is a ${older.kind}, and ${visible(to)} a ${newer.kind}: compare two of a kind`);
  const [oldDisk, newDisk] = [older.nodes[0], newer.nodes[0]];
  if (newer.kind === 'disk' && oldDisk !== undefined && newDisk !== undefined) {
    const found = await changesOf(client, oldDisk, newDisk, exact);
    const changes: DiskChanges = { kind: 'disk', from, to, fromSizeBytes: oldDisk.sizeBytes, toSizeBytes: newDisk.sizeBytes, ...found };
    context.output.result(changes, () => diskLines(changes, context.output.bold));
    return;
  }
  const changes: ContainerChanges = { kind: 'container', from, to, entries: await entriesOf(client, older.nodes, newer.nodes, exact) };
  context.output.result(changes, () => containerLines(changes, context.output.bold));
}

/** Changed extents of one disk. */
async function changesOf(client: ControlClient, older: TreeNode, newer: TreeNode, exact: boolean): Promise<{ readonly exact: boolean; readonly extents: ExtentInfo[] }> {
  const extents: ExtentInfo[] = [];
  let isExact = exact;
  for await (const page of extentPages(client, newer.storePath, older.storePath, newer.nodeId)) {
    // Two that have nothing in common: only their contents can tell.
    if (!page.related) isExact = true;
    for (const extent of page.extents) pushExtent(extents, extent);
  }
  return { exact: isExact, extents: isExact ? await differing(older, newer, extents) : extents };
}

/** The parts of the extents whose content is another, block by block. */
async function differing(older: TreeNode, newer: TreeNode, extents: readonly ExtentInfo[]): Promise<ExtentInfo[]> {
  const found: ExtentInfo[] = [];
  const [before, after] = [await openMounted(older.mountPath, older.nodeId), await openMounted(newer.mountPath, newer.nodeId)];
  try {
    for (const extent of extents) {
      const endBytes = extent.offsetBytes + extent.lengthBytes;
      for (let at = extent.offsetBytes; at < endBytes; at += PIECE_BYTES) {
        const lengthBytes = Math.min(PIECE_BYTES, endBytes - at);
        const was = await readPiece(before, at, lengthBytes);
        const is = extent.type === 'zero' ? Buffer.alloc(lengthBytes) : await readPiece(after, at, lengthBytes);
        if (was.equals(is)) continue;
        for (let block = 0; block < lengthBytes; block += BLOCK_BYTES) {
          const end = Math.min(lengthBytes, block + BLOCK_BYTES);
          if (was.compare(is, block, end, block, end) !== 0) pushExtent(found, { offsetBytes: at + block, lengthBytes: end - block, type: extent.type });
        }
      }
    }
  } finally {
    await before.close();
    await after.close();
  }
  return found;
}

async function entriesOf(client: ControlClient, older: readonly TreeNode[], newer: readonly TreeNode[], exact: boolean): Promise<EntryChange[]> {
  const before = new Map(older.map((node) => [node.path, node]));
  const after = new Map(newer.map((node) => [node.path, node]));
  const entries: EntryChange[] = [];
  for (const node of older) {
    const now = after.get(node.path);
    if (now?.kind !== node.kind) entries.push({ path: node.path, kind: node.kind, change: 'removed', sizeBytes: node.sizeBytes, attributesChanged: false, extents: [] });
  }
  for (const node of newer) {
    const was = before.get(node.path);
    const { path, kind, sizeBytes } = node;
    if (was?.kind !== kind) {
      entries.push({ path, kind, change: 'added', sizeBytes, attributesChanged: false, extents: [] });
      continue;
    }
    const attributesChanged = was.mode !== node.mode || was.uid !== node.uid || was.gid !== node.gid || was.linkTarget !== node.linkTarget;
    const { extents } = kind === 'disk' || kind === 'file' ? await changesOf(client, was, node, exact) : { extents: [] };
    if (attributesChanged || extents.length > 0 || (kind !== 'directory' && was.sizeBytes !== sizeBytes)) {
      entries.push({ path, kind, change: 'changed', sizeBytes, attributesChanged, extents });
    }
  }
  return entries.sort((one, other) => (one.path < other.path ? -1 : one.path > other.path ? 1 : 0));
}

function sum(extents: readonly ExtentInfo[]): number {
  return extents.reduce((bytes, extent) => bytes + extent.lengthBytes, 0);
}

function diskLines(changes: DiskChanges, bold: (text: string) => string): string[] {
  const { extents, fromSizeBytes, toSizeBytes } = changes;
  const size = fromSizeBytes === toSizeBytes ? [] : [`size: ${formatBytes(fromSizeBytes)}, now ${formatBytes(toSizeBytes)}`];
  if (extents.length === 0) return size.length > 0 ? [...size, 'no block of it is another one'] : [`nothing changed from ${visible(changes.from)} to ${visible(changes.to)}`];
  const rows = extents.slice(0, LISTED_MAX).map((extent) => [String(extent.offsetBytes), String(extent.lengthBytes), extent.type]);
  const more = extents.length - rows.length;
  return [
    ...size,
    ...renderTable([{ header: 'OFFSET', right: true }, { header: 'LENGTH', right: true }, { header: 'TYPE' }], rows, bold),
    ...(more > 0 ? [`… ${formatCount(more)} more`] : []),
    `${counted(extents.length, 'extent')}, ${formatBytes(sum(extents))}${changes.exact ? '' : ' written to'}`,
  ];
}

/** What else there is to a change than what was written. */
function remarkOf({ change, extents, attributesChanged, kind }: EntryChange): string {
  if (change !== 'changed') return '';
  if (attributesChanged) return kind === 'symlink' ? 'target, mode or owner' : 'mode or owner';
  return extents.length === 0 ? 'size' : '';
}

function containerLines(changes: ContainerChanges, bold: (text: string) => string): string[] {
  if (changes.entries.length === 0) return [`nothing changed from ${visible(changes.from)} to ${visible(changes.to)}`];
  const count = (change: EntryChange['change']): number => changes.entries.filter((entry) => entry.change === change).length;
  return [
    ...renderTable([{ header: 'CHANGE' }, { header: 'KIND' }, { header: 'WRITTEN', right: true }, { header: 'PATH' }, { header: '' }],
      changes.entries.map((entry) => [entry.change, entry.kind, entry.extents.length === 0 ? '-' : formatBytes(sum(entry.extents)), entry.path, remarkOf(entry)]), bold),
    `${count('changed')} changed, ${count('added')} added, ${count('removed')} removed`,
  ];
}
