/**
 * `offshoot check [TARGET]`: of the store that a daemon serves, or with `--store` of one that none serves.
 *
 * The verdict is the exit code. Ctrl-C ends the check, waits until nothing of it is left, and gives 130.
 */
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkStorePath } from '../../daemon/control/paths.js';
import type { CheckFinding, CheckInfo, CheckResult } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { CheckExit, checkExitCodes } from '../errors.js';
import { follow, watchInterrupts } from '../follow.js';
import type { CliIo } from '../io.js';
import { counted } from '../output.js';
import { createProgressView } from '../progress.js';
import { formatBytes, formatDuration } from '../sizes.js';

interface CheckOptions {
  readonly data?: boolean;
  readonly repair?: boolean;
  readonly store?: string;
}

const DISKS_SHOWN_MAX = 10;

export function addCheckCommand(program: Command, io: CliIo): void {
  program.command('check')
    .description('Hold the metadata against the files of the store, and say what is damaged and what is only wasted space.')
    .summary('find damage and wasted space, take the latter away')
    .usage('[TARGET] [OPTIONS]')
    .argument('[target]', 'CONTAINER[/PATH][@NAME] whose content and faults are concerned (default: all content, no fault)')
    .option('--data', 'read the content of sealed layers too, and compare it with its checksums')
    .option('--repair', 'take away what nothing refers to; with a TARGET also lift the faults of its disks')
    .option('--store <dir>', 'a store that no daemon serves')
    .addHelpText('after', `
The metadata of all of the store is always checked. A repair never touches what a
disk needs. Lifting a fault reads everything that the disk owns from its device; what was
acknowledged since the disk's last completed flush is not promised. The disk must
be closed.

Exit codes: 0 clean, ${checkExitCodes.corruption} corruption, ${checkExitCodes.leaks} only leaks, ${checkExitCodes.incomplete} the check could not be completed,
9 a disk is faulted (and all else is clean), 130 ended by Ctrl-C.

Examples:
  offshoot check
  offshoot check vms --data
  offshoot check --repair
  offshoot check vms/web.img --repair
  offshoot check --store /srv/offshoot --data
`)
    .action(async (target: string | undefined, options: CheckOptions, command: Command) => { await check(contextOf(io, command), target ?? null, options); });
}

async function check(context: CliContext, target: string | null, options: CheckOptions): Promise<void> {
  const { io, output } = context;
  if (target !== null) checkStorePath(target);
  const request = { target, data: options.data === true, repair: options.repair === true };
  const beganMs = io.nowMs();
  const result = options.store === undefined ? await checkOnline(context, request) : await checkOffline(context, request, options.store);
  output.result(result, () => resultLines(result, request.repair, io.nowMs() - beganMs));
  const code = exitCodeOf(result);
  if (code !== 0) throw new CheckExit(code);
}

interface Request {
  readonly target: string | null;
  readonly data: boolean;
  readonly repair: boolean;
}

async function checkOnline(context: CliContext, request: Request): Promise<CheckResult> {
  const { io, output } = context;
  const client = context.client();
  const view = createProgressView(io, output, 'check');
  // Before it is begun: who interrupts while the answer is under way must not leave it running.
  const interrupts = watchInterrupts(io, () => { view.end(); });
  let last: CheckInfo;
  try {
    const first = await client.checkStart(request);
    last = await follow(io, {
      first, ask: async () => await client.checkStatus(first.checkId), ended: (info) => info.state !== 'running',
      progress: ({ doneBytes, totalBytes }) => ({ doneBytes, totalBytes }), view, signal: interrupts.signal,
    });
    if (last.state === 'running') last = await client.checkCancel(first.checkId);
  } catch (thrown) {
    throw incomplete(thrown);
  } finally {
    view.end();
    interrupts.release();
  }
  if (last.state === 'cancelled') throw new OffshootError('cancelled', 'the check was ended');
  if (last.result === null) throw incomplete(new OffshootError(last.error?.kind ?? 'io-error', last.error?.message ?? 'it failed'));
  return last.result;
}

async function checkOffline(context: CliContext, request: Request, store: string): Promise<CheckResult> {
  const { io, output } = context;
  const view = createProgressView(io, output, 'check');
  const interrupts = watchInterrupts(io, () => { view.end(); });
  try {
    return await io.checkOffline({ ...request, storeDir: resolve(io.cwd(), store) }, {
      signal: interrupts.signal,
      progress: (_phase, doneBytes, totalBytes) => { view.update({ doneBytes, totalBytes }); },
    });
  } catch (thrown) {
    throw incomplete(thrown);
  } finally {
    view.end();
    interrupts.release();
  }
}

/** What kept a check from its end, apart from what has an exit code that says more. */
function incomplete(thrown: unknown): unknown {
  if (!(thrown instanceof OffshootError) || (thrown.kind !== 'io-error' && thrown.kind !== 'no-space' && thrown.kind !== 'not-found')) return thrown;
  if (thrown.kind === 'not-found' && thrown.context['checkId'] === undefined) return thrown;
  return new CheckExit(checkExitCodes.incomplete, new OffshootError(thrown.kind, `the check could not be completed: ${thrown.message}`, thrown.context, thrown));
}

function exitCodeOf(result: CheckResult): number {
  if (result.verdict === 'corruption') return checkExitCodes.corruption;
  if (result.notLifted.length > 0 || result.faulted.length > 0) return checkExitCodes.faulted;
  return result.verdict === 'leaks' ? checkExitCodes.leaks : 0;
}

function resultLines(result: CheckResult, repair: boolean, tookMs: number): string[] {
  const corruption = result.findings.filter((finding) => finding.severity === 'corruption');
  const leaks = result.findings.filter((finding) => finding.severity === 'leak');
  const left = leaks.filter((leak) => !leak.repaired);
  const lines: string[] = [];
  for (const finding of corruption) lines.push(`corruption: ${finding.message}`, ...diskLines(finding));
  for (const leak of leaks) lines.push(`${leak.repaired ? 'leak, taken away' : 'leak'}: ${leak.message}`);
  for (const { path, lostBytes } of result.lifted) {
    lines.push(`lifted: ${path} takes writes again; what was acknowledged since its last completed flush is not promised${lostBytes === 0 ? '' : `, and ${formatBytes(lostBytes)} of it are lost`}`);
  }
  for (const { path, reason } of result.notLifted) lines.push(`still faulted: ${path}: ${reason}`);
  for (const { path, reason } of result.faulted) {
    if (!result.notLifted.some((one) => one.path === path)) lines.push(`faulted: ${path}: ${reason}; offshoot check ${path} --repair lifts it`);
  }
  const parts = [
    corruption.length === 0 ? 'nothing is damaged' : counted(corruption.length, 'damage'),
    ...(left.length === 0 ? [] : [`${counted(left.length, 'leak')}${repair ? '' : ' (--repair takes leaks away)'}`]),
    ...(result.layersChecked === 0 ? [] : [`content of ${counted(result.layersChecked, 'sealed layer')} read (${formatBytes(result.bytesRead)})${
      result.layersWithoutChecksums === 0 ? '' : `, ${result.layersWithoutChecksums} of them without checksums yet`}`]),
  ];
  lines.push(`checked in ${formatDuration(tookMs)}: ${parts.join('; ')}`);
  return lines;
}

function diskLines(finding: CheckFinding): string[] {
  if (finding.disks.length === 0) return [];
  const more = finding.disks.length - DISKS_SHOWN_MAX;
  return [`  it is read by ${finding.disks.slice(0, DISKS_SHOWN_MAX).join(', ')}${more > 0 ? `, … and ${more} more` : ''}`];
}
