/**
 * `offshoot promote CLONE` and `offshoot rebase CLONE IMAGE`: what a clone stands on, without moving data.
 */
import type { Command } from 'commander';
import { OffshootError, type ErrorExtent } from '../../blockstore/errors.js';
import { checkPathInContainer } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';

/** Conflicts that are listed for people; --json lists them all. */
const EXTENTS_SHOWN = 20;

export function addPromoteCommands(program: Command, io: CliIo): void {
  program.command('promote')
    .description('Swap a clone and the disk that it was cloned from: the clone counts as the source from now on, and the other one can be removed. No data moves.')
    .summary('make a clone the source of what it was cloned from')
    .usage('CLONE [OPTIONS]')
    .argument('<clone>', 'the clone, CONTAINER/PATH')
    .addHelpText('after', `
Both go on as before, in use or not. What is different is who is whose clone, as
'offshoot show' says it and 'offshoot rm' heeds it.

Examples:
  offshoot promote vms/web-new.img
  offshoot promote vms/web-new.img && offshoot rm vms/web.img
`)
    .action(async (clone: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const result = await context.client().promote(checkPathInContainer(clone));
      context.output.result(result, () => [`${result.path} is promoted: ${result.origin} counts as a clone of it now, and can be removed`]);
    });
  program.command('rebase')
    .description('Put a closed clone on a newer version of its image: what it has written stays, all else is the new image\'s.')
    .summary('put a clone on a newer version of its image')
    .usage('CLONE IMAGE [OPTIONS]')
    .argument('<clone>', 'the clone, CONTAINER/PATH; nobody may have it open')
    .argument('<image>', 'the newer version: CONTAINER/PATH[@NAME]')
    .option('--force', "keep what the clone has written also where the new image differs from the old one there")
    .addHelpText('after', `
Nothing is changed when the clone has written (or discarded) a block that differs
between the two images: the extents are listed, exit code 17. The clone keeps its
size; where the new image is shorter, zeros follow.

Examples:
  offshoot rebase vms/web.img images/debian-12.6.img
  offshoot rebase vms/web.img images/debian.img@2026-11 --json
`)
    .action(async (clone: string, image: string, options: { readonly force?: boolean }, command: Command) => {
      const context = contextOf(io, command);
      const request = { path: checkPathInContainer(clone), image: checkPathInContainer(image), force: options.force === true };
      const result = await context.client().rebase(request).catch((error: unknown) => { throw context.output.json ? error : withExtents(error); });
      context.output.result(result, () => [`${result.path} stands on ${result.image} now`]);
    });
}

/** The error with its extents as further lines. */
function withExtents(error: unknown): unknown {
  if (!(error instanceof OffshootError) || error.kind !== 'conflict') return error;
  const extents = (error.context['conflicts'] ?? []) as readonly ErrorExtent[];
  const total = Number(error.context['conflictsTotal'] ?? extents.length);
  const lines = extents.slice(0, EXTENTS_SHOWN).map(({ offsetBytes, lengthBytes }) => `${lengthBytes} bytes at ${offsetBytes}`);
  if (total > lines.length) lines.push(`and ${total - lines.length} more${total > extents.length ? `; --json lists the first ${extents.length}` : '; --json lists them'}`);
  return new OffshootError('conflict', [error.message, ...lines].join('\n'), error.context, error);
}
