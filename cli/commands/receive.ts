/**
 * `offshoot receive TARGET`: a stream of `offshoot send` on standard input becomes a disk or a container.
 *
 * The command takes the stream apart into whole records and hands them to the daemon in batches. What the daemon has not made durable yet stays
 * in memory here, so that a server that dies in the middle is only a pause. When the stream itself breaks off, the daemon keeps what came.
 */
import type { Command } from 'commander';
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { StreamReader } from '../../blockstore/stream-format.js';
import type { ControlClient } from '../../daemon/control/client.js';
import { checkStorePath, visible } from '../../daemon/control/paths.js';
import type { ReceiveInfo } from '../../daemon/control/transfer-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { watchInterrupts } from '../follow.js';
import type { CliIo } from '../io.js';
import { renderTable } from '../output.js';
import { createProgressView } from '../progress.js';
import { formatBytes, formatDuration } from '../sizes.js';

interface ReceiveOptions {
  readonly resumeToken?: boolean;
  readonly abort?: boolean;
  readonly list?: boolean;
}

/** Handed over at a time; below the largest request by more than one record. */
const BATCH_BYTES = 4 * 1024 * 1024;
/** How long a daemon may be away. */
const AWAY_MS_MAX = 30_000;
const RETRY_MS = 200;

export function addReceiveCommand(program: Command, io: CliIo): void {
  program.command('receive')
    .description('Make a disk or a container of a stream of offshoot send on standard input. It appears, with its snapshot, when all of it is there.')
    .summary('make a disk or container of a stream')
    .usage('TARGET [OPTIONS]')
    .argument('[target]', 'what to make of it: CONTAINER[/PATH]; with PATH for a stream of one disk')
    .option('--resume-token', 'print the token with which the sending side goes on with a receive that was interrupted')
    .option('--abort', 'drop what is kept of a receive that was interrupted')
    .option('--list', 'show what is being received or was interrupted')
    .addHelpText('after', `
A stream of changes is received where its base is, and only if nothing was changed
there since. What was interrupted is kept, seen by nobody, until it is gone on
with or dropped.

Examples:
  ssh host offshoot send golden@v1 | offshoot receive golden
  offshoot receive golden --resume-token
`)
    .action(async (target: string | undefined, options: ReceiveOptions, command: Command) => {
      const context = contextOf(io, command);
      const asked = [options.resumeToken === true ? '--resume-token' : '', options.abort === true ? '--abort' : '', options.list === true ? '--list' : ''].filter((each) => each !== '');
      if (asked.length > 1) throw new OffshootError('invalid-argument', `${asked.join(' and ')} do not go together: give one of them`);
      if (options.list === true) await list(context);
      else if (target === undefined) throw new OffshootError('invalid-argument', 'say where the stream goes: CONTAINER, or CONTAINER/PATH for one disk');
      else if (options.resumeToken === true || options.abort === true) await tokenOrAbort(context, checkStorePath(target), options.abort === true);
      else await receive(context, checkStorePath(target));
    });
}

async function list(context: CliContext): Promise<void> {
  const receives = await context.client().transfers.receives();
  context.output.result(receives, () => receives.length === 0 ? ['nothing is being received, and nothing was interrupted'] : renderTable(
    [{ header: 'ID', right: true }, { header: 'TARGET' }, { header: 'FROM' }, { header: 'STATE' }, { header: 'CAME', right: true }],
    receives.map((each) => [String(each.receiveId), each.target, each.reference, each.state, formatBytes(each.dataBytes)]), context.output.bold));
}

async function tokenOrAbort(context: CliContext, target: string, isAbort: boolean): Promise<void> {
  const { transfers } = context.client();
  const found = (await transfers.receives()).find((each) => each.target === target);
  if (found === undefined) throw new OffshootError('not-found', `nothing is kept of a receive into ${visible(target)}: offshoot receive --list shows what there is`, { path: target });
  if (isAbort) {
    await transfers.receiveAbort(found.receiveId);
    context.output.result({ dropped: true, receiveId: found.receiveId, target }, () => [`dropped what was received of ${visible(found.reference)} into ${visible(target)}`]);
    return;
  }
  const paused = await transfers.receivePause(found.receiveId);
  context.output.result(paused, () => [paused.token]);
}

async function receive(context: CliContext, target: string): Promise<void> {
  const { io, output } = context;
  if (io.stdinIsTerminal()) throw new OffshootError('invalid-argument', `no stream comes in: pipe one into it (ssh host offshoot send REFERENCE | offshoot receive ${visible(target)}), or read it from a file (<)`);
  const beganMs = io.nowMs();
  const reader = new StreamReader(io.stdin());
  const { header, text } = await reader.readHeader();
  const daemon = new PatientDaemon(context.client(), io);
  const begun = await daemon.begin(target, text, header.uuid);
  const view = createProgressView(io, output, `receive ${target}`);
  const interrupts = watchInterrupts(io, () => { view.end(); });
  const feed = new Feed(daemon, begun, (info) => { view.update({ doneBytes: info.dataBytes, totalBytes: 0 }); });
  try {
    for (;;) {
      const record = await untilAborted(reader.readRecord(), interrupts.signal);
      if (record === null) throw new OffshootError('io-error', 'the stream broke off before its end: look at what the sending side said');
      await feed.add(record.bytes);
      if (record.head.type === 'end') break;
    }
    await reader.assertEnd();
    await feed.flush();
    const result = await daemon.finish(begun.receiveId);
    view.end();
    output.result(result, () => [
      `received ${visible(header.reference)} as ${visible(result.path)}@${visible(result.snapshot)}: ${formatBytes(result.dataBytes)} in ${formatDuration(io.nowMs() - beganMs)}`,
    ]);
  } catch (thrown) {
    view.end();
    throw await keeping(thrown, feed, daemon, target, begun.receiveId);
  } finally {
    interrupts.release();
  }
}

/** Has the daemon keep what came, and says how to go on. */
async function keeping(thrown: unknown, feed: Feed, daemon: PatientDaemon, target: string, receiveId: number): Promise<unknown> {
  const error = toOffshootError(thrown);
  if (error.kind === 'internal') return thrown;
  try {
    // Whole records that came before what was wrong. What is wrong with them was said already.
    await feed.flush().catch(() => undefined);
    const { token, records } = await daemon.pause(receiveId);
    return new OffshootError(error.kind,
      `${error.message}\nwhat came before is kept (${records} records); to go on, on the sending side:\n  offshoot send --resume ${token}\ninto: offshoot receive ${visible(target)}`,
      { ...error.context, token, receiveId }, error);
  } catch {
    return error; // The daemon is away, or nothing is left of it: the first error says more.
  }
}

async function untilAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  let stop = (): void => undefined;
  const aborted = new Promise<never>((_, reject) => {
    stop = () => { reject(new OffshootError('cancelled', 'receiving was interrupted')); };
    if (signal.aborted) stop();
    else signal.addEventListener('abort', stop, { once: true });
  });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal.removeEventListener('abort', stop);
  }
}

/** Records on their way: those that the daemon has not made durable are kept. */
class Feed {
  private readonly daemon: PatientDaemon;
  private readonly onProgress: (info: ReceiveInfo) => void;
  private info: ReceiveInfo;
  /** Record `firstKept` and all behind it. */
  private kept: Buffer[] = [];
  private firstKept: number;
  private unsentBytes = 0;

  constructor(daemon: PatientDaemon, begun: ReceiveInfo, onProgress: (info: ReceiveInfo) => void) {
    this.daemon = daemon;
    this.info = begun;
    this.firstKept = begun.records;
    this.onProgress = onProgress;
  }

  async add(record: Buffer): Promise<void> {
    this.kept.push(record);
    this.unsentBytes += record.length;
    if (this.unsentBytes >= BATCH_BYTES) await this.flush();
  }

  async flush(): Promise<void> {
    this.unsentBytes = 0;
    while (this.info.records < this.firstKept + this.kept.length) {
      const from = this.info.records - this.firstKept;
      if (from < 0) throw new OffshootError('io-error', 'the daemon has lost records that it had called durable: send the stream again', { records: this.info.records });
      let bytes = 0;
      const batch: Buffer[] = [];
      for (let i = from; i < this.kept.length && (batch.length === 0 || bytes + this.kept[i]!.length <= BATCH_BYTES + BATCH_BYTES / 2); i += 1) {
        batch.push(this.kept[i]!);
        bytes += this.kept[i]!.length;
      }
      this.info = await this.daemon.records(this.info.receiveId, this.info.records, batch);
      this.onProgress(this.info);
      const durable = Math.min(this.kept.length, this.info.durableRecords - this.firstKept);
      if (durable > 0) {
        this.kept = this.kept.slice(durable);
        this.firstKept += durable;
      }
    }
  }
}

/** The daemon, whose server may die at any call and is back in a moment. */
class PatientDaemon {
  private readonly client: ControlClient;
  private readonly io: CliIo;

  constructor(client: ControlClient, io: CliIo) {
    this.client = client;
    this.io = io;
  }

  async begin(target: string, header: string, uuid: string): Promise<ReceiveInfo> {
    const { transfers } = this.client;
    return await this.patiently(
      async () => await transfers.receiveBegin(target, header),
      async () => {
        // It may have been begun: with nothing in it yet, it is as good as new.
        const begun = (await transfers.receives()).find((each) => each.uuid === uuid && each.target === target && each.records === 0);
        if (begun !== undefined) await transfers.receiveAbort(begun.receiveId);
        return null;
      });
  }

  async records(receiveId: number, first: number, batch: readonly Buffer[]): Promise<ReceiveInfo> {
    const { transfers } = this.client;
    try {
      return await this.patiently(async () => await transfers.receiveRecords(receiveId, first, batch), async () => await transfers.receive(receiveId));
    } catch (thrown) {
      // A server that was replaced between two batches stands where the one before had made everything durable.
      const standsAt = toOffshootError(thrown).context['records'];
      if (typeof standsAt === 'number' && standsAt < first) return await transfers.receive(receiveId);
      throw thrown;
    }
  }

  async pause(receiveId: number): Promise<ReceiveInfo> {
    const { transfers } = this.client;
    return await this.patiently(async () => await transfers.receivePause(receiveId), () => Promise.resolve(null));
  }

  async finish(receiveId: number): ReturnType<ControlClient['transfers']['receiveFinish']> {
    return await this.patiently(async () => await this.client.transfers.receiveFinish(receiveId), () => Promise.resolve(null));
  }

  /** Calls until a server answers. After a call whose outcome is not known `look` may say what it was; null: call again. */
  private async patiently<T>(call: () => Promise<T>, look: () => Promise<T | null>): Promise<T> {
    const beganMs = this.io.nowMs();
    let isUnknown = false;
    for (;;) {
      try {
        if (isUnknown) {
          const found = await look();
          if (found !== null) return found;
          isUnknown = false;
        }
        return await call();
      } catch (thrown) {
        const error = toOffshootError(thrown);
        const wasBroken = error.context['connectionBroken'] === true;
        if ((error.kind !== 'daemon-not-running' && !wasBroken) || this.io.nowMs() - beganMs > AWAY_MS_MAX) throw thrown;
        isUnknown ||= wasBroken;
        await this.io.sleep(RETRY_MS, new AbortController().signal);
      }
    }
  }
}
