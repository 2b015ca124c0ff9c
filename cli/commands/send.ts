/**
 * `offshoot send REFERENCE [--from @BASE]`: a snapshot of a disk or a container as a stream on standard output.
 *
 * What is to be sent comes from the daemon, the content from under the mount. The first pass counts, for the bar; the second sends.
 */
import { once } from 'node:events';
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { decodeToken, encodeHeader, encodeRecord, RECORD_DATA_BYTES_MAX, type RecordHead, type ResumeToken, type StreamHeader, type StreamNode } from '../../blockstore/stream-format.js';
import type { ControlClient } from '../../daemon/control/client.js';
import { visible } from '../../daemon/control/paths.js';
import type { ExtentInfo, TreeInfo, TreeNode } from '../../daemon/control/transfer-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { watchInterrupts } from '../follow.js';
import { extentPages, isZero, openMounted, readPiece } from '../mounted-disk.js';
import { createProgressView } from '../progress.js';
import { formatBytes, formatDuration } from '../sizes.js';
import type { CliIo } from '../io.js';

interface SendOptions {
  readonly from?: string;
  readonly resume?: string;
}

export function addSendCommand(program: Command, io: CliIo): void {
  program.command('send')
    .description('Write a snapshot of a disk or of a whole container to standard output, for offshoot receive on another host.')
    .summary('write a snapshot as a stream, whole or as changes')
    .usage('REFERENCE [OPTIONS]')
    .argument('[reference]', 'the snapshot: CONTAINER[/PATH]@NAME')
    .option('--from <base>', 'send only what changed since this older snapshot, which the receiver must have: @NAME, or a whole reference')
    .option('--resume <token>', 'go on where a receive was interrupted: the token that offshoot receive --resume-token prints there')
    .addHelpText('after', `
Disks are read under the mount, with your rights. Holes are not sent. Progress goes
to standard error.

Examples:
  offshoot send golden@v1 | ssh host offshoot receive golden
  offshoot send golden@v2 --from @v1 | ssh host offshoot receive golden
  offshoot send --resume eyJyZWN... | ssh host offshoot receive golden
`)
    .action(async (reference: string | undefined, options: SendOptions, command: Command) => {
      await send(contextOf(io, command), reference, options);
    });
}

interface Plan {
  readonly header: StreamHeader;
  readonly tree: TreeInfo;
  readonly base: TreeInfo | null;
  readonly token: ResumeToken | null;
}

async function send(context: CliContext, reference: string | undefined, options: SendOptions): Promise<void> {
  const { io, output } = context;
  if (io.stdout.isTTY === true) throw new OffshootError('invalid-argument', 'a stream is not for a terminal: write it to a file, or into a pipe (| ssh host offshoot receive TARGET)');
  io.requireWholeOutput();
  const beganMs = io.nowMs();
  const client = context.client();
  const { plan, totalBytes } = await planOf(client, reference, options);
  const view = createProgressView(io, output, `send ${plan.header.reference}`);
  const interrupts = watchInterrupts(io, () => { view.end(); });
  const sender = new Sender(client, plan, io, interrupts.signal, (doneBytes) => { view.update({ doneBytes, totalBytes }); });
  try {
    await sender.run();
  } finally {
    view.end();
    interrupts.release();
  }
  output.note(`sent ${visible(plan.header.reference)}${plan.base === null ? '' : ` from ${visible(plan.base.reference)}`}: ${formatBytes(sender.doneBytes)} in ${formatDuration(io.nowMs() - beganMs)}`);
}

async function planOf(client: ControlClient, given: string | undefined, options: SendOptions): Promise<{ readonly plan: Plan; readonly totalBytes: number }> {
  const token = options.resume === undefined ? null : decodeToken(options.resume);
  if (token !== null && (given !== undefined || options.from !== undefined)) throw new OffshootError('invalid-argument', 'a resume token says what is to be sent: leave out the reference and --from');
  const reference = token?.reference ?? given;
  if (reference === undefined) throw new OffshootError('invalid-argument', 'say what to send: CONTAINER@NAME or CONTAINER/PATH@NAME');
  const tree = await client.transfers.tree(reference);
  const { snapshot } = tree;
  if (snapshot === null) {
    throw new OffshootError('invalid-argument', `${visible(reference)} changes while it is read: take a snapshot (offshoot snapshot create ${visible(reference)}@NAME) and send that`);
  }
  const baseReference = token === null ? fullBase(reference, options.from) : token.baseReference;
  const base = baseReference === null ? null : await client.transfers.tree(baseReference);
  if (base !== null && (base.snapshot === null || base.kind !== tree.kind)) {
    throw new OffshootError('invalid-argument', `${visible(base.reference)} is no snapshot of a ${tree.kind === 'container' ? 'container' : 'disk'}: changes are sent between two snapshots of the same kind`);
  }
  if (base?.snapshot?.uuid === snapshot.uuid) throw new OffshootError('invalid-argument', 'both are the same snapshot: nothing changed between them');
  if (token !== null && (token.uuid !== snapshot.uuid || token.baseUuid !== (base?.snapshot?.uuid ?? null))) {
    throw new OffshootError('not-found', `${visible(reference)} is not the snapshot any more that was begun to be sent: drop what the receiver has (offshoot receive TARGET --abort) and send all of it`);
  }
  const baseNodes = baseByPathOf(tree, base);
  let totalBytes = 0;
  const nodes: StreamNode[] = [];
  for (const [index, node] of tree.nodes.entries()) {
    const old = baseNodes.get(node.path);
    let delta = hasData(node) && old?.kind === node.kind;
    if (hasData(node)) {
      let bytes = 0;
      const from = token?.node === index ? token.offsetBytes : 0;
      if (delta && old !== undefined) delta = (await client.transfers.extents(node.storePath, old.storePath, 0)).related;
      for await (const page of extentPages(client, node.storePath, delta ? old?.storePath ?? null : null, node.nodeId, from)) bytes += dataBytes(page.extents);
      if (token === null || index >= token.node) totalBytes += bytes;
    }
    nodes.push({
      path: node.path, kind: node.kind, mode: node.mode, uid: node.uid, gid: node.gid, mtimeUs: node.mtimeUs, sizeBytes: node.sizeBytes, linkTarget: node.linkTarget, delta,
    });
  }
  const header: StreamHeader = {
    reference, baseReference, kind: tree.kind, uuid: snapshot.uuid, name: snapshot.name, consistency: snapshot.consistency, message: snapshot.message, createdUs: snapshot.createdUs,
    baseUuid: base?.snapshot?.uuid ?? null, nodes, resume: token === null ? null : { records: token.records, check: token.check },
  };
  return { plan: { header, tree, base, token }, totalBytes };
}

/** `@v1` is short for the same disk or container at v1. */
function fullBase(reference: string, from: string | undefined): string | null {
  if (from === undefined) return null;
  if (!from.startsWith('@')) return from;
  const at = reference.lastIndexOf('@');
  return `${at < 0 ? reference : reference.slice(0, at)}${from}`;
}

/** The base's nodes under the paths of the tree: one disk goes with the other, whatever they are called. */
function baseByPathOf(tree: TreeInfo, base: TreeInfo | null): ReadonlyMap<string, TreeNode> {
  return new Map((base?.nodes ?? []).map((node) => [tree.kind === 'disk' ? tree.nodes[0]?.path ?? '' : node.path, node]));
}

function hasData(node: TreeNode | StreamNode): boolean {
  return node.kind === 'disk' || node.kind === 'file';
}

function dataBytes(extents: readonly ExtentInfo[]): number {
  return extents.reduce((sum, extent) => sum + (extent.type === 'data' ? extent.lengthBytes : 0), 0);
}

class Sender {
  doneBytes = 0;
  private readonly client: ControlClient;
  private readonly plan: Plan;
  private readonly io: CliIo;
  private readonly signal: AbortSignal;
  private readonly onProgress: (doneBytes: number) => void;
  private readonly baseByPath: ReadonlyMap<string, TreeNode>;
  private check: Uint8Array = Buffer.alloc(0);
  private records = 0;

  constructor(client: ControlClient, plan: Plan, io: CliIo, signal: AbortSignal, onProgress: (doneBytes: number) => void) {
    this.client = client;
    this.plan = plan;
    this.io = io;
    this.signal = signal;
    this.onProgress = onProgress;
    this.baseByPath = baseByPathOf(plan.tree, plan.base);
  }

  async run(): Promise<void> {
    const { header, tree, token } = this.plan;
    const { bytes, check } = encodeHeader(header);
    this.check = check;
    this.records = token?.records ?? 0;
    await this.write([bytes]);
    for (const [index, node] of tree.nodes.entries()) {
      if (!hasData(node) || (token !== null && index < token.node)) continue;
      await this.sendNode(node, index, token?.node === index ? token.offsetBytes : 0);
    }
    await this.record({ type: 'end', node: 0, offsetBytes: this.records, lengthBytes: 0 }, null);
  }

  private async sendNode(node: TreeNode, index: number, fromBytes: number): Promise<void> {
    const isDelta = this.plan.header.nodes[index]?.delta === true;
    const old = isDelta ? this.baseByPath.get(node.path) : undefined;
    const handle = await openMounted(node.mountPath, node.nodeId);
    try {
      for await (const page of extentPages(this.client, node.storePath, old?.storePath ?? null, node.nodeId, fromBytes)) {
        for (const extent of page.extents) {
          if (extent.type === 'data') await this.sendData(handle, index, extent, isDelta);
          else if (isDelta) await this.record({ type: 'zero', node: index, offsetBytes: extent.offsetBytes, lengthBytes: extent.lengthBytes }, null);
        }
      }
    } finally {
      await handle.close();
    }
  }

  private async sendData(handle: Awaited<ReturnType<typeof openMounted>>, index: number, extent: ExtentInfo, isDelta: boolean): Promise<void> {
    const endBytes = extent.offsetBytes + extent.lengthBytes;
    for (let at = extent.offsetBytes; at < endBytes; ) {
      const lengthBytes = Math.min(RECORD_DATA_BYTES_MAX, endBytes - at);
      const bytes = await readPiece(handle, at, lengthBytes);
      const head = { node: index, offsetBytes: at, lengthBytes };
      if (!isZero(bytes)) await this.record({ type: 'data', ...head }, bytes);
      else if (isDelta) await this.record({ type: 'zero', ...head }, null);
      at += lengthBytes;
      this.doneBytes += lengthBytes;
      this.onProgress(this.doneBytes);
    }
  }

  private async record(head: RecordHead, data: Buffer | null): Promise<void> {
    if (this.signal.aborted) throw new OffshootError('cancelled', 'sending was interrupted; the receiver keeps what it has');
    const { pieces, check } = encodeRecord(this.check, head, data);
    this.check = check;
    this.records += 1;
    await this.write(pieces);
  }

  private async write(pieces: readonly Uint8Array[]): Promise<void> {
    let hasRoom = true;
    for (const piece of pieces) hasRoom = this.io.stdout.write(piece);
    if (!hasRoom) await once(this.io.stdout, 'drain');
  }
}
