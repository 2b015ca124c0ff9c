/**
 * `offshoot scrub start | pause | resume | status`.
 *
 * The scrub is the daemon's work and goes on after restarts; nothing here waits for it.
 */
import type { Command } from 'commander';
import type { ScrubInfo } from '../../daemon/control/schemas.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { counted, renderFields } from '../output.js';
import { formatBytesOf, formatPercent, formatRate, formatTime, parseRate } from '../sizes.js';

export function addScrubCommands(program: Command, io: CliIo): void {
  const scrub = program.command('scrub').description('Read all sealed layers in the background and compare them with their checksums, so that damage is found before it is needed.')
    .summary('look for damage in the background').helpCommand(false).usage('start|pause|resume|status [OPTIONS]');
  const add = (name: string, description: string, help: string): Command => scrub.command(name).description(description).usage('[OPTIONS]').addHelpText('after', help);
  add('start', 'Begin a scrub. Returns at once; it goes on in the daemon, across restarts, and makes way for guests.', `
One begins by itself 30 days after the last (offshoot daemon start --scrub-rate).

Examples:
  offshoot scrub start
  offshoot scrub start --rate 200M
`).option('--rate <bytes>', 'limit in bytes per second, as in 100M (default: unlimited)').action(async (options: { rate?: string }, command: Command) => {
    const { client, output } = contextOf(io, command);
    const info = await client().scrubStart({ rateBytesPerSecond: options.rate === undefined ? null : parseRate(options.rate) });
    output.result(info, () => [`scrub ${scrubText(info)}`]);
  });
  add('pause', 'Pause the scrub; resume goes on from there.', `
Example:
  offshoot scrub pause
`).action(async (_options: unknown, command: Command) => {
    const { client, output } = contextOf(io, command);
    const info = await client().scrubPause();
    output.result(info, () => [`scrub ${scrubText(info)}`]);
  });
  add('resume', 'Go on with a paused scrub, or give a running one another rate.', `
Examples:
  offshoot scrub resume
  offshoot scrub resume --rate unlimited
`).option('--rate <bytes>', 'new limit in bytes per second, as in 100M, or unlimited (default: as before)').action(async (options: { rate?: string }, command: Command) => {
    const { client, output } = contextOf(io, command);
    const info = await client().scrubResume({ rateBytesPerSecond: options.rate === undefined ? undefined : parseRate(options.rate) });
    output.result(info, () => [`scrub ${scrubText(info)}`]);
  });
  add('status', 'Say how the scrub is, and what is known to be damaged.', `
Examples:
  offshoot scrub status
  offshoot scrub status --json | jq .damagedExtents
`).action(async (_options: unknown, command: Command) => {
    const { client, output } = contextOf(io, command);
    const info = await client().scrubStatus();
    output.result(info, () => renderFields('scrub', [
      ['Now', scrubText(info)],
      ['Started', info.startedAt === null ? 'never' : formatTime(info.startedAt)],
      ['Last completed', info.lastCompletedAt === null ? 'never' : formatTime(info.lastCompletedAt)],
      ['Damaged', info.damagedExtents === 0 ? 'nothing that is known' : `${counted(info.damagedExtents, 'extent')}: offshoot check --data names them`],
      ['Without checksums', counted(info.layersWithoutChecksums, 'sealed layer')],
    ], output.bold));
  });
}

/** `running, 42 %, 4.2 of 10 GiB (at most 32 MiB/s)`: one line about the scrub. */
export function scrubText(info: ScrubInfo): string {
  if (info.state === null) return 'never run';
  const isUnderWay = info.state === 'running' || info.state === 'paused';
  const done = isUnderWay ? `, ${formatPercent(info.doneBytes, info.totalBytes)}, ${formatBytesOf(info.doneBytes, info.totalBytes)}` : '';
  const limit = isUnderWay && info.rateBytesPerSecond !== null ? ` (at most ${formatRate(info.rateBytesPerSecond)})` : '';
  return `${info.state}${done}${limit}`;
}

/** The line of `daemon status`. */
export function scrubStatusText(info: ScrubInfo): string {
  const last = info.lastCompletedAt === null ? 'never completed' : `last completed ${formatTime(info.lastCompletedAt)}`;
  const damaged = info.damagedExtents === 0 ? 'nothing damaged' : counted(info.damagedExtents, 'damaged extent');
  const isUnderWay = info.state === 'running' || info.state === 'paused';
  const waiting = info.layersWithoutChecksums === 0 ? '' : `; ${counted(info.layersWithoutChecksums, 'layer')} without checksums`;
  return `${isUnderWay ? `${scrubText(info)}; ` : ''}${last}, ${damaged}${waiting}`;
}
