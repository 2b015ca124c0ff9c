/**
 * `offshoot container create | ls`. A container is a directory under the mount, and what a hypervisor sees as a datastore.
 */
import { Option, InvalidArgumentError, type Command } from 'commander';
import { checkContainerName } from '../../daemon/control/paths.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { renderTable } from '../output.js';
import { formatBytes, formatTime } from '../sizes.js';

export function addContainerCommands(program: Command, io: CliIo): void {
  const container = program.command('container').description('Make and list containers: the directories that hold disks.').summary('make and list the directories that hold disks')
    .helpCommand(false).usage('create|ls [OPTIONS]');
  container.command('create')
    .description('Make an empty container. It is a directory under the mount; disks and other files live in it.')
    .usage('NAME [OPTIONS]')
    .argument('<name>', 'its name: one word, without /')
    .addOption(new Option('--mode <octal>', 'permission bits of the directory').argParser(parseMode).default(0o755, '0755'))
    .addHelpText('after', `
Examples:
  offshoot container create vms
  offshoot container create private --mode 0700
`)
    .action(async (name: string, options: { mode: number }, command: Command) => { await create(contextOf(io, command), name, options.mode); });
  container.command('ls')
    .description('List the containers: what is in them, and what that takes in the store.')
    .usage('[OPTIONS]')
    .addHelpText('after', `
SIZE is what the disks and files seem to hold, TAKES what they and the snapshots
take in the store, what several of them share once.

Examples:
  offshoot container ls
  offshoot container ls --json | jq -r '.[].name'
`)
    .action(async (_options: unknown, command: Command) => { await list(contextOf(io, command)); });
}

function parseMode(text: string): number {
  if (!/^0?[0-7]{3,4}$/u.test(text)) throw new InvalidArgumentError('It must be three or four octal digits, as in 0755.');
  return Number.parseInt(text, 8);
}

async function create(context: CliContext, name: string, mode: number): Promise<void> {
  const made = await context.client().createContainer(checkContainerName(name), { mode });
  context.output.result(made, () => [`made the container ${made.name}`]);
}

async function list(context: CliContext): Promise<void> {
  const found = await context.client().listContainers();
  context.output.result(found, () => found.length === 0 ? ['no containers yet: offshoot container create NAME makes one'] : renderTable(
    [{ header: 'NAME' }, { header: 'DISKS', right: true }, { header: 'FILES', right: true }, { header: 'SNAPSHOTS', right: true }, { header: 'SIZE', right: true }, { header: 'TAKES', right: true }, { header: 'CREATED' }],
    found.map((each) => [each.name, String(each.disks), String(each.files), String(each.snapshots), formatBytes(each.sizeBytes), formatBytes(each.allocatedBytes), formatTime(each.createdAt)]),
    context.output.bold,
  ));
}
