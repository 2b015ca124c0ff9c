/**
 * `offshoot fill start | pause | resume | status | wait TARGET`.
 *
 * A fill is the daemon's work and survives everything; `wait` only watches it. Ctrl-C ends the watching, not the fill.
 */
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkPathInContainer } from '../../daemon/control/paths.js';
import type { FillInfo } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { follow, watchInterrupts } from '../follow.js';
import type { CliIo } from '../io.js';
import { renderFields } from '../output.js';
import { createProgressView, progressText } from '../progress.js';
import { formatBytesOf, formatDuration, formatPercent, formatRate, formatTime, formatTimeLeft, parseRate } from '../sizes.js';
import { jobHasEnded, refuseUnlessCompleted } from './import.js';

export function addFillCommands(program: Command, io: CliIo): void {
  const fill = program.command('fill').description('Copy to a clone what it does not own yet, in the background, until it needs its source no more.').summary('copy to a clone what it does not own yet')
    .helpCommand(false).usage('start|pause|resume|status|wait TARGET [OPTIONS]');
  const add = (name: string, description: string, help: string): Command => fill.command(name)
    .description(description)
    .usage('TARGET [OPTIONS]')
    .argument('<target>', 'the clone, CONTAINER/PATH')
    .addHelpText('after', help);
  add('start', 'Begin to fill a clone. Returns at once; the fill goes on in the daemon, across restarts, while the disk is in use.', `
Only data is copied, holes of the source never are; blocks that a guest wrote are
never touched.

Examples:
  offshoot fill start vms/web.img
  offshoot fill start vms/web.img --rate 100M
`).option('--rate <bytes>', 'limit in bytes per second, as in 100M (default: unlimited)').action(async (target: string, options: { rate?: string }, command: Command) => {
    const context = contextOf(io, command);
    const rateBytesPerSecond = options.rate === undefined ? null : parseRate(options.rate);
    const info = await context.client().fillStart(checkPathInContainer(target), { rateBytesPerSecond });
    context.output.result(info, () => info.state === 'completed'
      ? [`${info.path} is filled already`]
      : [`filling ${info.path}: ${formatBytesOf(info.doneBytes, info.totalBytes)} done, ${limitText(info)}`, `watch it with: offshoot fill wait ${info.path}`]);
  });
  add('pause', 'Pause a fill. What was filled stays; resume goes on from there.', `
Example:
  offshoot fill pause vms/web.img
`).action(async (target: string, _options: unknown, command: Command) => {
    const context = contextOf(io, command);
    const info = await context.client().fillPause(checkPathInContainer(target));
    context.output.result(info, () => [`the fill of ${info.path} is ${info.state}, ${doneText(info)}`]);
  });
  add('resume', 'Go on with a paused fill, or give a running one another rate.', `
Examples:
  offshoot fill resume vms/web.img
  offshoot fill resume vms/web.img --rate 20M
  offshoot fill resume vms/web.img --rate unlimited
`).option('--rate <bytes>', 'new limit in bytes per second, as in 100M, or unlimited (default: as before)').action(async (target: string, options: { rate?: string }, command: Command) => {
    const context = contextOf(io, command);
    const rateBytesPerSecond = options.rate === undefined ? undefined : parseRate(options.rate);
    const info = await context.client().fillResume(checkPathInContainer(target), { rateBytesPerSecond });
    context.output.result(info, () => [`the fill of ${info.path} is ${info.state}, ${doneText(info)}, ${limitText(info)}`]);
  });
  add('status', 'Say how far a fill is, and how fast.', `
Examples:
  offshoot fill status vms/web.img
  offshoot fill status vms/web.img --json | jq .doneBytes
`).action(async (target: string, _options: unknown, command: Command) => {
    const context = contextOf(io, command);
    const info = await context.client().fillStatus(checkPathInContainer(target));
    context.output.result(info, () => renderFields(info.path, fillFields(info), context.output.bold));
  });
  add('wait', 'Wait until a clone is filled, with a progress bar on a terminal. Fails when the fill fails, is cancelled or is paused.', `
Ctrl-C ends the waiting; the fill goes on.

Examples:
  offshoot fill wait vms/web.img
  offshoot fill start vms/web.img && offshoot fill wait vms/web.img
`).action(async (target: string, _options: unknown, command: Command) => { await wait(contextOf(io, command), target); });
}

function doneText(info: FillInfo): string {
  return `${formatPercent(info.doneBytes, info.totalBytes)} (${formatBytesOf(info.doneBytes, info.totalBytes)}) done`;
}

function limitText(info: FillInfo): string {
  return info.rateBytesPerSecond === null ? 'no limit' : `at most ${formatRate(info.rateBytesPerSecond)}`;
}

/** `running, 42 %, 4.2 of 10 GiB, 512 MiB/s, 12 s left`: one line about a fill. */
export function fillText(info: FillInfo): string {
  const running = info.state === 'running';
  return `${info.state}, ${progressText(info, running ? info.currentBytesPerSecond : null)}${info.rateBytesPerSecond === null ? '' : ` (${limitText(info)})`}`;
}

function fillFields(info: FillInfo): [string, string][] {
  const fields: [string, string][] = [['Fill', info.state], ['Done', `${formatBytesOf(info.doneBytes, info.totalBytes)} (${formatPercent(info.doneBytes, info.totalBytes)})`]];
  if (info.state === 'running') {
    fields.push(['Speed', formatRate(info.currentBytesPerSecond)]);
    if (info.currentBytesPerSecond > 0) fields.push(['Time left', `${formatTimeLeft((info.totalBytes - info.doneBytes) / info.currentBytesPerSecond)} at this speed`]);
  }
  fields.push(['Limit', info.rateBytesPerSecond === null ? 'none' : formatRate(info.rateBytesPerSecond)], ['Started', formatTime(info.startedAt)]);
  if (jobHasEnded(info)) fields.push(['Ended', formatTime(info.updatedAt)]);
  fields.push(['Job', String(info.jobId)]);
  if (info.message !== null) fields.push(['Message', info.message]);
  return fields;
}

async function wait(context: CliContext, target: string): Promise<void> {
  const { io, output } = context;
  checkPathInContainer(target);
  const client = context.client();
  const view = createProgressView(io, output, `fill ${target}`);
  const interrupts = watchInterrupts(io, () => { view.end(); });
  const beganMs = io.nowMs();
  let info: FillInfo;
  try {
    info = await follow(io, {
      first: await client.fillStatus(target),
      ask: async () => await client.fillStatus(target),
      ended: (state) => state.state !== 'running',
      progress: (state) => ({ doneBytes: state.doneBytes, totalBytes: state.totalBytes, bytesPerSecond: state.currentBytesPerSecond }),
      view,
      signal: interrupts.signal,
    });
  } finally {
    view.end();
    interrupts.release();
  }
  if (info.state === 'running') {
    throw new OffshootError('cancelled', `stopped waiting; the fill of ${target} goes on in the daemon, ${doneText(info)}`, { path: target, jobId: info.jobId });
  }
  if (info.state === 'paused') {
    throw new OffshootError('busy', `the fill of ${target} is paused, ${doneText(info)}, and will not end so: offshoot fill resume ${target} lets it go on`, { path: target, jobId: info.jobId });
  }
  if (info.state !== 'completed') refuseUnlessCompleted(await client.job(info.jobId), `the fill of ${target}`, 'what was filled stays');
  const ended = info;
  output.result(ended, () => [`${ended.path} is filled, it needs its source no more (waited ${formatDuration(io.nowMs() - beganMs)})`]);
}
