/**
 * `offshoot quota set | rm | ls`: how much the layers of a container may take.
 */
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkContainerName, visible } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { renderTable } from '../output.js';
import { formatBytes, formatBytesExactly, formatPercent, parseSize } from '../sizes.js';

const LIMIT_BYTES_MIN = 4096;

export function addQuotaCommands(program: Command, io: CliIo): void {
  const quota = program.command('quota').description('Limit what the layers of a container may take in the store.').summary('limit what containers may take')
    .helpCommand(false).usage('set|rm|ls [OPTIONS]');
  quota.command('set')
    .description('Give a container a limit, or another one.')
    .usage('CONTAINER SIZE [OPTIONS]')
    .argument('<container>', 'the container')
    .argument('<size>', 'bytes that its layers may take, as in 500G')
    .addHelpText('after', `
What counts is what is allocated: by the disks and files in the container, its
snapshots, and sealed layers that its disks wrote. At the limit, writes that
need room fail (disks: ENOSPC, files: EDQUOT), and clones, imports and
snapshots are refused; what is owned can still be overwritten. A limit below
what is used takes nothing away.

Examples:
  offshoot quota set vms 500G
  offshoot quota set vms 536870912000 --json
`)
    .action(async (container: string, size: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().quotaSet(checkContainerName(container), parseLimit(size));
      context.output.result(info, () => [
        `${info.container} may take ${formatBytes(info.limitBytes)}; ${formatBytes(info.usedBytes)} are used${info.usedBytes >= info.limitBytes ? ': the limit is reached' : ''}`,
      ]);
    });
  quota.command('rm')
    .description("Take a container's limit away.")
    .usage('CONTAINER [OPTIONS]')
    .argument('<container>', 'the container')
    .addHelpText('after', `
Example:
  offshoot quota rm vms
`)
    .action(async (container: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().quotaRemove(checkContainerName(container));
      context.output.result(info, () => [`${info.container} has no limit any more; it was ${formatBytesExactly(info.limitBytes)}`]);
    });
  quota.command('ls')
    .description('List the containers that have a limit.')
    .usage('[OPTIONS]')
    .addHelpText('after', `
Example:
  offshoot quota ls --json | jq -r '.[] | select(.isReached) | .container'
`)
    .action(async (_options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const all = await context.client().quotaList();
      context.output.result(all, () => all.length === 0 ? ['no container has a limit: offshoot quota set CONTAINER SIZE gives it one'] : renderTable(
        [{ header: 'CONTAINER' }, { header: 'LIMIT', right: true }, { header: 'USED', right: true }, { header: 'FREE', right: true }, { header: '', right: true }, { header: 'STATE' }],
        all.map((each) => [
          each.container, formatBytes(each.limitBytes), formatBytes(each.usedBytes), formatBytes(each.freeBytes), formatPercent(each.usedBytes, each.limitBytes), each.isReached ? 'reached' : 'ok',
        ]),
        context.output.bold,
      ));
    });
}

function parseLimit(text: string): number {
  const bytes = parseSize(text);
  if (bytes < LIMIT_BYTES_MIN) throw new OffshootError('invalid-argument', `'${visible(text)}' is too small for a limit: it must be a block at least, 4096 bytes (offshoot quota rm takes a limit away)`);
  return bytes;
}
