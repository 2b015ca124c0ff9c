/**
 * `offshoot snapshot create | ls | rm | revert`; `diff` is in a file of its own. A snapshot shows a container, or one disk, as it was at one instant.
 */
import { InvalidArgumentError, Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkContainerName, checkStorePath } from '../../daemon/control/paths.js';
import type { SnapshotInfo } from '../../daemon/control/snapshot-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { counted, renderTable } from '../output.js';
import { formatBytes, formatTime } from '../sizes.js';

const QUIESCE_SECONDS_DEFAULT = 30;

interface CreateOptions {
  readonly quiesceCmd?: string;
  readonly quiesceTimeout: number;
}

export function addSnapshotCommands(program: Command, io: CliIo): void {
  const snapshot = program.command('snapshot').description('Take snapshots of containers and disks, list and remove them, go back to them.').summary('take, list and remove snapshots, go back to one')
    .helpCommand(false).usage('create|ls|rm|revert|diff [OPTIONS]');
  snapshot.command('create')
    .description('Take a snapshot: of every disk and file in a container at one instant, or of one of them. Guests go on writing.')
    .usage('CONTAINER[/PATH]@NAME [OPTIONS]')
    .argument('<reference>', 'CONTAINER@NAME: all that is in it; CONTAINER/PATH@NAME: one disk or file')
    .option('--quiesce-cmd <command>', 'run it with "freeze" before and "thaw" after the snapshot (root only)')
    .addOption(new Option('--quiesce-timeout <seconds>', 'how long each of the two may take').argParser(parseSeconds).default(QUIESCE_SECONDS_DEFAULT, String(QUIESCE_SECONDS_DEFAULT)))
    .addHelpText('after', `
It is seen read-only under MOUNT/CONTAINER/.snapshots/NAME, and can be cloned:
offshoot clone CONTAINER@NAME NEW, offshoot clone CONTAINER/PATH@NAME TARGET.

The command of --quiesce-cmd is run by sh -c; "$1" is freeze or thaw. When
the freeze fails or takes too long, the snapshot is taken all the same and is
crash-consistent, as after a power cut; the thaw is run in any case.

Examples:
  offshoot snapshot create vms@monday
  offshoot snapshot create vms/db.img@before-upgrade
  offshoot snapshot create vms@night --quiesce-cmd 'guest-freeze "$1"' --quiesce-timeout 10
`)
    .action(async (reference: string, options: CreateOptions, command: Command) => { await create(contextOf(io, command), reference, options); });
  snapshot.command('ls')
    .description('List the snapshots of a container, or of all.')
    .usage('[CONTAINER] [OPTIONS]')
    .argument('[container]', 'only those of this container')
    .addHelpText('after', `
Examples:
  offshoot snapshot ls
  offshoot snapshot ls vms --json | jq -r '.[].reference'
`)
    .action(async (container: string | undefined, _options: unknown, command: Command) => { await list(contextOf(io, command), container ?? null); });
  snapshot.command('rm')
    .description('Remove a snapshot, and give back what only it needed.')
    .usage('CONTAINER[/PATH]@NAME [OPTIONS]')
    .argument('<reference>', 'as offshoot snapshot ls shows it')
    .option('--keep-data', 'although clones stand on it; its layers stay for as long as they need them')
    .addHelpText('after', `
Examples:
  offshoot snapshot rm vms@monday
  offshoot snapshot rm golden@v1 --keep-data
`)
    .action(async (reference: string, options: { keepData?: boolean }, command: Command) => {
      const context = contextOf(io, command);
      const removed = await context.client().removeSnapshot(checkStorePath(reference), { keepData: options.keepData === true });
      context.output.result(removed, () => [
        `removed ${removed.name}, ${counted(removed.nodesRemoved, 'name')} and ${counted(removed.layersRemoved, 'layer')}${removed.clonesKept === 0 ? '' : `; ${counted(removed.clonesKept, 'clone')} read on through layers of it`}`,
      ]);
    });
  snapshot.command('revert')
    .description('Go back: the container, or the disk, is again what it was. What was made or written since is lost, for good.')
    .usage('CONTAINER[/PATH]@NAME --yes')
    .argument('<reference>', 'as offshoot snapshot ls shows it')
    .option('--yes', 'what came since the snapshot may be lost')
    .addHelpText('after', `
Nothing of it may be in use. Other snapshots stay as they are: take one first to
be able to come back.

Examples:
  offshoot snapshot revert vms/db.img@before-upgrade --yes
  offshoot snapshot create vms@now && offshoot snapshot revert vms@monday --yes
`)
    .action(async (reference: string, options: { yes?: boolean }, command: Command) => {
      checkStorePath(reference);
      if (options.yes !== true) {
        throw new OffshootError('invalid-argument', `what was made or written since ${reference} would be lost: add --yes if that is meant, or take a snapshot of the present state first`, { path: reference });
      }
      const context = contextOf(io, command);
      const done = await context.client().revertSnapshot(reference);
      context.output.result(done, () => [
        `went back to ${done.name}: ${counted(done.nodesReverted, 'disk or file', 'disks and files')} as before, ${done.nodesRemoved} removed, ${done.nodesRestored} brought back`,
      ]);
    });
}

function parseSeconds(text: string): number {
  const seconds = Number(text);
  if (!/^\d+(\.\d+)?$/u.test(text) || seconds <= 0 || seconds > 600) throw new InvalidArgumentError('It must be seconds, more than 0 and at most 600.');
  return seconds;
}

async function create(context: CliContext, reference: string, options: CreateOptions): Promise<void> {
  const quiesce = options.quiesceCmd === undefined ? null : { command: options.quiesceCmd, timeoutSeconds: options.quiesceTimeout };
  const made = await context.client().createSnapshot(checkStorePath(reference), { quiesce });
  context.output.result(made, () => {
    const content = [made.disks > 0 ? counted(made.disks, 'disk') : '', made.files > 0 ? counted(made.files, 'file') : ''].filter((each) => each !== '').join(' and ');
    return [`took the snapshot ${made.reference}${content === '' ? '' : `: ${content}`}, ${made.consistency}-consistent${made.message === null ? '' : ` (${made.message})`}`];
  });
}

async function list(context: CliContext, container: string | null): Promise<void> {
  const found: SnapshotInfo[] = await context.client().listSnapshots(container === null ? null : checkContainerName(container));
  context.output.result(found, () => found.length === 0 ? ['no snapshots yet: offshoot snapshot create CONTAINER@NAME takes one'] : renderTable(
    [{ header: 'SNAPSHOT' }, { header: 'DISKS', right: true }, { header: 'FILES', right: true }, { header: 'SIZE', right: true }, { header: 'CONSISTENCY' }, { header: 'CREATED' }],
    found.map((each) => [each.reference, String(each.disks), String(each.files), formatBytes(each.sizeBytes), each.consistency, formatTime(each.createdAt)]),
    context.output.bold,
  ));
}
