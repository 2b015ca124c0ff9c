/**
 * `offshoot clone SOURCE TARGET...`: any number of clones in one request, one transaction. With `--range`: see clone-ranges.ts.
 */
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { CLONE_TARGETS_MAX } from '../../daemon/control/limits.js';
import { checkStorePath, visible } from '../../daemon/control/paths.js';
import type { CloneResult } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { counted } from '../output.js';
import { formatBytes, formatCount, formatDuration } from '../sizes.js';
import { cloneRanges } from './clone-ranges.js';

/** So many clones are listed one by one. */
const LISTED_MAX = 10;
/** Of more than that, so many are shown as examples. */
const EXAMPLES = 3;

interface CloneOptions {
  readonly fill?: boolean;
  readonly copyOnRead?: boolean;
  readonly range?: readonly string[];
  readonly size?: string;
  readonly registerAll?: boolean;
}

export function addCloneCommand(program: Command, io: CliIo): void {
  program.command('clone')
    .description('Clone a disk, or a whole container. The clones exist at once, whole and writable; what they do not own yet is read from the source.')
    .summary('clone a disk or container any number of times, at once')
    .usage('SOURCE TARGET... [OPTIONS]')
    .argument('<source>', 'CONTAINER[/PATH][@NAME]: a disk, or a container with all that is in it; @NAME: as in that snapshot')
    .argument('<target...>', `the clones to make, each CONTAINER[/PATH]; up to ${formatCount(CLONE_TARGETS_MAX)}`)
    .option('--fill', 'start to fill each clone in the background')
    .option('--copy-on-read', 'let each clone keep what it had to read from the source')
    .option('--range <from:to:length>', 'clone these blocks only, into a disk that exists or a new one; may be given again', (text: string, before: readonly string[]) => [...before, text], [])
    .option('--size <size>', 'with --range: the size of a new disk')
    .option('--register-all', 'of a container: each virtual machine in it gets a name, a UUID and MACs of its own, and is registered with its hypervisor')
    .addHelpText('after', `
All clones are made in one transaction: if one cannot be made, none is. The
directories in TARGET must exist. The shell's own braces do the counting.

With --range only these bytes of SOURCE are cloned, into a TARGET that exists or a
new one, all ranges or none: where in SOURCE, where in TARGET, how many bytes. All
three are multiples of 4 KiB, but a length may end where SOURCE does. Up to 1,024.

Examples:
  offshoot clone vms/debian.img vms/web.img
  offshoot clone vms/debian.img vms/vm{001..100}.img
  offshoot clone vms/debian.img vms/db.img --fill
  offshoot clone vms/db.img@monday vms/db-monday.img
  offshoot clone golden@v1 web7 web8
  offshoot clone golden@v1 lab7 --register-all
  offshoot clone vms/old.img vms/new.img --range 1M:1M:9G --range 0:10G:512M
`)
    .action(async (source: string, targets: string[], options: CloneOptions, command: Command) => {
      const ranges = options.range ?? [];
      if (options.registerAll === true) {
        if (ranges.length > 0 || options.fill === true || options.copyOnRead === true) throw new OffshootError('invalid-argument', '--register-all goes with none of --range, --fill and --copy-on-read');
        const { cloneMachines } = await import('./vm-clone.js');
        await cloneMachines(contextOf(io, command), source, targets, { set: [], register: true });
        return;
      }
      if (ranges.length > 0) {
        await cloneRanges(contextOf(io, command), source, targets, { ...options, ranges });
        return;
      }
      if (options.size !== undefined) throw new OffshootError('invalid-argument', '--size goes with --range: a clone has the size of its source');
      await clone(contextOf(io, command), source, targets, options);
    });
}

async function clone(context: CliContext, source: string, targets: readonly string[], options: CloneOptions): Promise<void> {
  checkStorePath(source);
  if (targets.length > CLONE_TARGETS_MAX) {
    throw new OffshootError('too-large', `${formatCount(targets.length)} targets are more than one request can hold (${formatCount(CLONE_TARGETS_MAX)}): use several`, { targets: targets.length });
  }
  for (const target of targets) checkStorePath(target);
  const made = await context.client().clone({ source, targets: [...targets], fill: options.fill === true, copyOnRead: options.copyOnRead === true });
  context.output.result(made, () => cloneLines(made, source, options.fill === true));
}

function cloneLines(made: CloneResult, source: string, fill: boolean): string[] {
  const total = made.clones.length;
  const shown = made.clones.slice(0, total <= LISTED_MAX ? total : EXAMPLES).map((each) => visible(each.mountPath));
  const rest = total - shown.length;
  const last = made.clones.at(-1);
  if (rest > 0) shown.push(rest === 1 ? '…' : `… ${formatCount(rest - 1)} more`, visible(last?.mountPath ?? ''));
  const size = last === undefined ? '' : `${formatBytes(last.sizeBytes)}${total === 1 ? '' : ' each'}, `;
  return [
    ...shown,
    `${formatCount(total)} ${total === 1 ? 'clone' : 'clones'} of ${source}, ${size}made in ${formatDuration(made.durationMs)}${fill ? `; ${counted(total, 'fill')} started` : ''}`,
  ];
}
