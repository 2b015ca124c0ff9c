/** What several commands about machines have in common: options, tables, and how an operation is followed. */
import { InvalidArgumentError } from 'commander';
import { OffshootError, exitCodeOf } from '../../blockstore/errors.js';
import type { MachineInfo, MachineSetting } from '../../daemon/control/machine-schemas.js';
import type { JobInfo } from '../../daemon/control/schemas.js';
import type { CliContext } from '../context.js';
import { AWAY_MS_MAX, mayComeBack, watchInterrupts } from '../follow.js';
import { createStepView } from '../steps.js';
import { renderTable } from '../output.js';

const POLL_MS_FIRST = 20;
const POLL_MS_MAX = 250;
/** Of the time that it has taken: a short one is not made longer by the asking, a long one is not asked about all the time. */
const POLL_SHARE = 0.05;

/** `KEY=VALUE`; the first `=` counts. */
export function parseSetting(text: string): MachineSetting {
  const at = text.indexOf('=');
  if (at <= 0) throw new InvalidArgumentError('It must be KEY=VALUE.');
  return { key: text.slice(0, at), value: text.slice(at + 1) };
}

export function parseSeconds(text: string): number {
  const seconds = Number(text);
  if (text.trim() === '' || !Number.isFinite(seconds) || seconds < 0) throw new InvalidArgumentError('It must be a number of seconds.');
  return seconds;
}

/**
 * Waits for the end of an operation and says its steps as they come; an interrupt cancels it, and leaves nothing of it. A server that died
 * meanwhile is waited for: the next one undoes the operation, and says so.
 */
export async function followOperation(context: CliContext, first: JobInfo): Promise<JobInfo> {
  const { io, output } = context;
  const client = context.client();
  const view = createStepView(io, output);
  const interrupts = watchInterrupts(io, () => {
    view.end();
    output.note(`operation ${first.id} is still being undone: offshoot jobs ${first.id}`);
  });
  try {
    let job = first;
    let awaySinceMs: number | null = null;
    const beganMs = io.nowMs();
    while (job.state === 'running') {
      view.say(job.message ?? '');
      await io.sleep(Math.min(Math.max(POLL_MS_FIRST, (io.nowMs() - beganMs) * POLL_SHARE), POLL_MS_MAX), interrupts.signal);
      try {
        job = interrupts.signal.aborted ? await client.cancelJob(first.id) : await client.job(first.id);
        awaySinceMs = null;
      } catch (error) {
        if (!mayComeBack(error)) throw error;
        awaySinceMs ??= io.nowMs();
        if (io.nowMs() - awaySinceMs > AWAY_MS_MAX) throw error;
      }
    }
    if (job.error !== null) throw new OffshootError(job.error.kind, job.error.message, { operationId: String(job.id) });
    if (job.state !== 'completed') throw new OffshootError('cancelled', `operation ${job.id} is ${job.state}`, { operationId: String(job.id), exitCode: exitCodeOf.cancelled });
    return job;
  } finally {
    view.end();
    interrupts.release();
  }
}

/** What fits into 80 columns; the rest is in `vm show`, and with --json. `isAsked`: hypervisors were asked for states. */
export function machineTable(context: CliContext, found: readonly MachineInfo[], isAsked = false): string[] {
  if (found.length === 0) return ['no machines'];
  return renderTable(
    [{ header: 'PATH' }, { header: 'NAME' }, { header: 'STATE' }, { header: 'HYPERVISOR' }, ...(isAsked ? [{ header: 'POWER' }] : []), { header: 'MAC' }],
    found.map((info) => [
      info.path, info.name ?? '-', info.state, info.registration === 'none' ? '-' : `${info.hypervisor ?? '-'}${info.registration === 'asked' ? '?' : ''}`, ...(isAsked ? [info.power ?? '-'] : []),
      `${info.macs[0] ?? '-'}${info.macs.length > 1 ? ` +${info.macs.length - 1}` : ''}`,
    ]),
    context.output.bold,
  );
}
