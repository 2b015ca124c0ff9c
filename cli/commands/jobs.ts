/**
 * `offshoot jobs [ID]`: the operations that are remembered, or all about one.
 */
import { InvalidArgumentError, Option, type Command } from 'commander';
import type { JobInfo, JobState } from '../../daemon/control/schemas.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { renderFields, renderTable } from '../output.js';
import { progressText } from '../progress.js';
import { formatPercent, formatTime } from '../sizes.js';

const STATES = ['running', 'paused', 'completed', 'failed', 'cancelled'] as const satisfies readonly JobState[];

export function addJobsCommand(program: Command, io: CliIo): void {
  program.command('jobs')
    .description('List operations, the oldest first, or say all about one: clones, imports, fills, scrubs. The last 1000 that have ended are remembered.')
    .summary('list clones, imports and fills, and how they went')
    .usage('[ID] [OPTIONS]')
    .argument('[id]', 'the number of an operation', parseJobId)
    .addOption(new Option('--state <state>', 'only those in this state').choices(STATES))
    .addHelpText('after', `
Examples:
  offshoot jobs
  offshoot jobs --state failed
  offshoot jobs $(offshoot clone vms/a.img vms/b.img --json | jq -r .operationId)
`)
    .action(async (id: number | undefined, options: { readonly state?: JobState }, command: Command) => {
      const context = contextOf(io, command);
      if (id !== undefined) {
        const found = await context.client().job(id);
        context.output.result(found, () => renderFields(`job ${found.id}`, jobFields(found), context.output.bold));
        return;
      }
      const all = await context.client().jobs(options.state ?? null);
      context.output.result(all, () => all.length === 0 ? ['no operations are remembered'] : renderTable(
        [{ header: 'ID', right: true }, { header: 'KIND' }, { header: 'STATE' }, { header: 'DONE', right: true }, { header: 'TARGET' }, { header: 'STARTED' }, { header: 'LAST CHANGE' }, { header: 'REASON' }],
        all.map(row),
        context.output.bold,
      ));
    });
}

export function parseJobId(text: string): number {
  if (!/^[1-9][0-9]{0,14}$/u.test(text)) throw new InvalidArgumentError('It must be the number of a job.');
  return Number(text);
}

export function jobFields(job: JobInfo): [string, string][] {
  const fields: [string, string][] = [
    ['Kind', job.kind],
    ['State', job.state],
    ['Works on', job.path ?? '(gone)'],
    ['Progress', hasProgress(job) ? progressText({ doneBytes: job.progressDoneBytes, totalBytes: job.progressTotalBytes }, null) : '-'],
    ['Started', formatTime(job.createdAt)],
    ['Last change', formatTime(job.updatedAt)],
  ];
  if (job.message !== null && job.error === null) fields.push(['Message', job.message]);
  if (job.error !== null) fields.push(['Error', `${job.error.message} (${job.error.kind})`]);
  return fields;
}

function row(job: JobInfo): string[] {
  return [
    String(job.id), job.kind, job.state, hasProgress(job) ? formatPercent(job.progressDoneBytes, job.progressTotalBytes) : '-', job.path ?? '(gone)',
    formatTime(job.createdAt), formatTime(job.updatedAt), job.error?.message ?? job.message ?? '',
  ];
}

/** A clone has no bytes to count. */
function hasProgress(job: JobInfo): boolean {
  return job.kind !== 'clone' && !job.kind.startsWith('machine-') && job.progressTotalBytes > 0;
}
