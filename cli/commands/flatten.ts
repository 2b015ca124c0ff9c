/**
 * `offshoot flatten TARGET...`: a clone gets all that it does not own yet, and then stands on nothing any more.
 *
 * The work is the daemon's fill job; this command follows it. Ctrl-C pauses what has not come to its end, and says so: what was filled stays.
 */
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkPathInContainer } from '../../daemon/control/paths.js';
import type { FillInfo } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { follow, watchInterrupts } from '../follow.js';
import type { CliIo } from '../io.js';
import { createProgressView } from '../progress.js';
import { formatBytesOf, formatPercent, parseRate } from '../sizes.js';
import { refuseUnlessCompleted } from './import.js';

interface FlattenOptions {
  readonly rate?: string;
}

export function addFlattenCommand(program: Command, io: CliIo): void {
  program.command('flatten')
    .description('Make clones independent: copy what they do not own yet, then drop what they stand on. In use or not.')
    .summary('make clones independent of what they were cloned from')
    .usage('TARGET... [OPTIONS]')
    .argument('<target...>', 'the clones, each CONTAINER/PATH')
    .option('--rate <bytes>', 'limit in bytes per second for each, as in 100M (default: unlimited)')
    .addHelpText('after', `
Only data is copied, holes never are. Layers that nobody else reads are given back
at the end. Ctrl-C pauses it; the same command goes on where it was.

Examples:
  offshoot flatten vms/web.img
  offshoot flatten vms/web1.img vms/web2.img --rate 200M
`)
    .action(async (targets: string[], options: FlattenOptions, command: Command) => { await flatten(contextOf(io, command), targets, options); });
}

async function flatten(context: CliContext, targets: readonly string[], options: FlattenOptions): Promise<void> {
  const { io, output } = context;
  const rateBytesPerSecond = options.rate === undefined ? null : parseRate(options.rate);
  for (const target of targets) checkPathInContainer(target);
  const client = context.client();
  const view = createProgressView(io, output, targets.length === 1 ? `flatten ${targets[0] ?? ''}` : `flatten ${targets.length} disks`);
  const interrupts = watchInterrupts(io, () => { view.end(); });
  let infos: readonly FillInfo[];
  try {
    // All of them are there, or nothing is begun.
    if (targets.length > 1) for (const target of targets) await client.show(target);
    const started: FillInfo[] = [];
    for (const target of targets) started.push(await client.fillStart(target, { rateBytesPerSecond, flatten: true }));
    infos = await follow<readonly FillInfo[]>(io, {
      first: started,
      ask: async () => await Promise.all(targets.map(async (target) => await client.fillStatus(target))),
      ended: (states) => states.every((state) => state.state !== 'running'),
      progress: (states) => ({ doneBytes: sum(states, 'doneBytes'), totalBytes: sum(states, 'totalBytes'), bytesPerSecond: sum(states, 'currentBytesPerSecond') }),
      view,
      signal: interrupts.signal,
    });
    if (interrupts.signal.aborted) infos = await pauseAll(context, targets, infos);
  } finally {
    view.end();
    interrupts.release();
  }
  const paused = infos.find((info) => info.state === 'paused');
  if (paused !== undefined) {
    throw new OffshootError(interrupts.signal.aborted ? 'cancelled' : 'busy',
      `flattening ${paused.path} is paused, ${formatPercent(paused.doneBytes, paused.totalBytes)} (${formatBytesOf(paused.doneBytes, paused.totalBytes)}) done; what was copied stays, and the disk is used as before: offshoot flatten ${targets.join(' ')} goes on`,
      { path: paused.path, jobId: paused.jobId });
  }
  for (const info of infos) if (info.state !== 'completed') refuseUnlessCompleted(await client.job(info.jobId), `flattening ${info.path}`, 'what was copied stays');
  output.result(infos, () => infos.map((info) => `${info.path} is independent: it reads from no other disk any more`));
}

/** Pauses what runs still. One that has ended meanwhile is as it is. */
async function pauseAll(context: CliContext, targets: readonly string[], infos: readonly FillInfo[]): Promise<readonly FillInfo[]> {
  const client = context.client();
  return await Promise.all(targets.map(async (target, i) => {
    if (infos[i]?.state !== 'running') return await client.fillStatus(target);
    try {
      return await client.fillPause(target);
    } catch (thrown) {
      if (!(thrown instanceof OffshootError) || thrown.kind !== 'invalid-argument') throw thrown;
      return await client.fillStatus(target);
    }
  }));
}

function sum(infos: readonly FillInfo[], field: 'doneBytes' | 'totalBytes' | 'currentBytesPerSecond'): number {
  return infos.reduce((total, info) => total + info[field], 0);
}
