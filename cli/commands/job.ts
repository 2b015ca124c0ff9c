/**
 * `offshoot job show | cancel ID`: for imports and fills whose command has gone away.
 */
import type { Command } from 'commander';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { renderFields } from '../output.js';
import { jobFields, parseJobId } from './jobs.js';

export function addJobCommands(program: Command, io: CliIo): void {
  const job = program.command('job').description('Look at and cancel long work of the daemon: imports and fills.').summary('look at and cancel imports and fills')
    .helpCommand(false).usage('show|cancel ID [OPTIONS]');
  job.command('show')
    .description('Say how far a job is and, when it failed, why.')
    .usage('ID [OPTIONS]')
    .argument('<id>', 'the number of the job', parseJobId)
    .addHelpText('after', `
Examples:
  offshoot job show 12
  offshoot job show 12 --json | jq -r .state
`)
    .action(async (id: number, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const found = await context.client().job(id);
      context.output.result(found, () => renderFields(`job ${found.id}`, jobFields(found), context.output.bold));
    });
  job.command('cancel')
    .description('Cancel a job and wait until nothing of it is left running. A cancelled import leaves nothing; a cancelled fill keeps what it filled.')
    .usage('ID [OPTIONS]')
    .argument('<id>', 'the number of the job', parseJobId)
    .addHelpText('after', `
Example:
  offshoot job cancel 12
`)
    .action(async (id: number, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const found = await context.client().cancelJob(id);
      context.output.result(found, () => [found.state === 'cancelled' ? `job ${found.id} is cancelled` : `job ${found.id} had ended before: ${found.state}`]);
    });
}
