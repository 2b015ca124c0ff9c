/**
 * `offshoot stage | deploy | decommission | staged | deployed` and `attach | detach | attached`: machines in container files, and disks as block devices of this host.
 */
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkStorePath } from '../../daemon/control/paths.js';
import type { AttachedInfo, DeployedInfo, StagedInfo } from '../../daemon/control/vdisk-schemas.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { renderTable } from '../output.js';
import { formatBytes, formatDuration } from '../sizes.js';
import { followOperation, parseSeconds } from './vm-options.js';
import { HYPERVISORS } from './vm.js';

const STOP_SECONDS_DEFAULT = 120;
const FILE_SYSTEMS = ['ext4', 'xfs'] as const;

interface DeployOptions {
  readonly name: string;
  readonly to?: string;
  /** commander's way of --no-start. */
  readonly start: boolean;
  readonly hypervisor?: (typeof HYPERVISORS)[number];
}

export function addStageCommand(program: Command, io: CliIo): void {
  program.command('stage')
    .description('Copy a machine that is off into one file, from which it is deployed in a moment. The machine stays as it is.')
    .summary('copy a machine into a container file')
    .usage('VM CONTAINER/FILE [OPTIONS]')
    .argument('<vm>', 'CONTAINER/PATH[@NAME] of the machine')
    .argument('<file>', 'CONTAINER/PATH of the container file, which is made')
    .addOption(new Option('--fs <name>', 'the file system in it').choices(FILE_SYSTEMS).default('ext4'))
    .addHelpText('after', `
The container file has the virtual size of the machine's files and a tenth more; it takes
what is in them. What fails, or is interrupted, is undone.

Examples:
  offshoot stage lab/web1 depot/web1.vdisk
  offshoot stage lab/web1@monday depot/web1-monday.vdisk --fs xfs
`)
    .action(async (source: string, target: string, options: { fs: (typeof FILE_SYSTEMS)[number] }, command: Command) => {
      const context = contextOf(io, command);
      const client = context.client();
      const beganMs = io.nowMs();
      const job = await followOperation(context, await client.vdisks.stage({ source: checkStorePath(source), target: checkStorePath(target), fileSystem: options.fs }));
      const staged = (await client.vdisks.staged()).find(({ path }) => path === target) ?? null;
      context.output.result({ operationId: String(job.id), message: job.message, staged }, () => [
        ...(staged === null ? [] : stagedTable([staged], context.output.bold)), `${job.message ?? ''} (operation ${job.id}, ${formatDuration(io.nowMs() - beganMs)})`,
      ]);
    });
  program.command('staged')
    .description('List the container files of the store, and what is deployed from them.')
    .summary('list container files')
    .usage('[OPTIONS]')
    .addHelpText('after', `
Examples:
  offshoot staged
  offshoot staged --json | jq -r '.[] | select(.deployed == []).path'
`)
    .action(async (_options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const found = await context.client().vdisks.staged();
      context.output.result(found, () => stagedTable(found, context.output.bold));
    });
}

export function addDeployCommands(program: Command, io: CliIo): void {
  program.command('deploy')
    .description('Make a machine of a container file, by a clone of it, register it with a hypervisor and start it. The file itself is never written.')
    .summary('make a running machine of a container file')
    .usage('CONTAINER/FILE --name NAME [OPTIONS]')
    .argument('<file>', 'CONTAINER/PATH of a container file')
    .requiredOption('--name <name>', 'of the machine: letters, digits, "_", "." and "-"')
    .option('--to <container>', 'where the clone goes (default: beside the container file)')
    .addOption(new Option('--hypervisor <name>', "which; the usual one of the configuration's format when left out").choices(HYPERVISORS))
    .option('--no-start', 'register it only; offshoot deployed NAME --start starts it')
    .addHelpText('after', `
Examples:
  offshoot deploy depot/web1.vdisk --name web1
  offshoot deploy depot/web1.vdisk --name web1b --to lab --hypervisor qemu --no-start
`)
    .action(async (source: string, options: DeployOptions, command: Command) => {
      const context = contextOf(io, command);
      const client = context.client();
      const beganMs = io.nowMs();
      const job = await followOperation(context, await client.vdisks.deploy({
        source: checkStorePath(source), name: options.name, container: options.to === undefined ? null : checkStorePath(options.to), start: options.start, hypervisor: options.hypervisor ?? null,
      }));
      const deployed = (await client.vdisks.deployed({ name: options.name }))[0] ?? null;
      context.output.result({ operationId: String(job.id), message: job.message, deployed }, () => [
        ...(deployed === null ? [] : deployedTable([deployed], context.output.bold)), `${job.message ?? ''} (operation ${job.id}, ${formatDuration(io.nowMs() - beganMs)})`,
      ]);
    });
  program.command('deployed')
    .description('List the deployed machines, with what their hypervisors say of them; or start one.')
    .summary('list deployed machines, or start one')
    .usage('[NAME] [OPTIONS]')
    .argument('[name]', 'this one only')
    .option('--start', 'start it')
    .addHelpText('after', `
Examples:
  offshoot deployed
  offshoot deployed web1 --start
  offshoot deployed --json | jq -r '.[] | select(.power == "running").name'
`)
    .action(async (name: string | undefined, options: { start?: boolean }, command: Command) => {
      const context = contextOf(io, command);
      const client = context.client();
      if (options.start === true && name === undefined) throw new OffshootError('invalid-argument', '--start goes with the name of a deployed machine');
      if (options.start === true) await client.vdisks.start(name ?? '');
      // An agent that does not answer is waited for, and only --json shows what it said.
      const found = await client.vdisks.deployed({ ...(name === undefined ? {} : { name }), agent: context.output.json });
      if (name !== undefined && found.length === 0) throw new OffshootError('not-found', `no deployed machine is called ${JSON.stringify(name)}: offshoot deployed lists those that there are`);
      context.output.result(found, () => deployedTable(found, context.output.bold));
    });
  program.command('decommission')
    .description('Undo a deployment: shut the machine down, unregister it, unmount and detach its clone of the container file, and destroy that. What the machine wrote is gone.')
    .summary('undo a deployment')
    .usage('NAME [OPTIONS]')
    .argument('<name>', 'of the deployed machine')
    .option('--force', 'take its power, at once')
    .addOption(new Option('--timeout <seconds>', 'how long it may take to shut down').argParser(parseSeconds).default(STOP_SECONDS_DEFAULT, String(STOP_SECONDS_DEFAULT)))
    .addHelpText('after', `
A machine that does not shut down stays as it is. From then on there is no way back: what is
interrupted goes on when the daemon does.

Examples:
  offshoot decommission web1
  offshoot decommission web1 --timeout 300 || offshoot decommission web1 --force
`)
    .action(async (name: string, options: { force?: boolean; timeout: number }, command: Command) => {
      if (options.timeout <= 0) throw new OffshootError('invalid-argument', '--timeout must be more than 0 seconds');
      const context = contextOf(io, command);
      const job = await followOperation(context, await context.client().vdisks.decommission(name, { force: options.force === true, timeoutSeconds: options.timeout }));
      context.output.result({ operationId: String(job.id), message: job.message }, () => [`${job.message ?? ''} (operation ${job.id})`]);
    });
}

export function addAttachCommands(program: Command, io: CliIo): void {
  program.command('attach')
    .description('Attach a disk as a block device of this host, until offshoot detach. In a snapshot, read-only.')
    .summary('attach a disk as a block device of this host')
    .usage('CONTAINER/PATH[@NAME] [OPTIONS]')
    .argument('<disk>', 'CONTAINER/PATH[@NAME] of the disk')
    .option('--read-only', 'nobody can write to it')
    .addHelpText('after', `
The device has owner and mode of the disk. Without this command: opening CONTAINER/.block/NAME
under the mount attaches the disk, and the last close gives it back.

Examples:
  offshoot attach vms/data.img
  offshoot attach vms/data.img@monday --read-only --json | jq -r .device
`)
    .action(async (disk: string, options: { readOnly?: boolean }, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().vdisks.attach(checkStorePath(disk), options.readOnly === true);
      context.output.result(info, () => [info.device ?? '']);
    });
  program.command('detach')
    .description('Give the block device of a disk back. One that is open goes with its last close; then this fails, and says so.')
    .summary('give a block device back')
    .usage('CONTAINER/PATH[@NAME]')
    .argument('<disk>', 'CONTAINER/PATH[@NAME] of the disk')
    .addHelpText('after', `
Examples:
  offshoot detach vms/data.img
`)
    .action(async (disk: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().vdisks.detach(checkStorePath(disk));
      context.output.result(info, () => [`${asReference(info.path)} is not attached any more`]);
    });
  program.command('attached')
    .description('List what is attached as block devices of this host, and for what. daemon start --attach-limit says how many there may be.')
    .summary('list block devices')
    .usage('[OPTIONS]')
    .addHelpText('after', `
Examples:
  offshoot attached
`)
    .action(async (_options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const found = await context.client().vdisks.attached();
      context.output.result(found, () => attachedTable(found, context.output.bold));
    });
}

function stagedTable(found: readonly StagedInfo[], bold: (text: string) => string): string[] {
  if (found.length === 0) return ['no container files'];
  return renderTable([{ header: 'FILE' }, { header: 'MACHINE' }, { header: 'FS' }, { header: 'SIZE', right: true }, { header: 'STATE' }, { header: 'DEPLOYED' }],
    found.map((info) => [info.path, info.machine, info.fileSystem, formatBytes(info.sizeBytes), info.state, info.deployed.join(' ') || '-']), bold);
}

function deployedTable(found: readonly DeployedInfo[], bold: (text: string) => string): string[] {
  if (found.length === 0) return ['no deployed machines'];
  return renderTable([{ header: 'NAME' }, { header: 'FROM' }, { header: 'STATE' }, { header: 'HYPERVISOR' }, { header: 'POWER' }, { header: 'MOUNTED AT' }],
    found.map((info) => [info.name, info.from ?? '-', info.state, info.hypervisor ?? '-', info.power ?? '-', info.mounted ? info.mountPoint : 'not mounted']), bold);
}

function attachedTable(found: readonly AttachedInfo[], bold: (text: string) => string): string[] {
  if (found.length === 0) return ['nothing is attached'];
  return renderTable([{ header: 'DISK' }, { header: 'DEVICE' }, { header: 'FOR' }, { header: 'MODE' }],
    found.map((info) => [asReference(info.path), info.device ?? '-', info.purpose, `${info.readOnly ? 'read-only' : 'writable'}${info.leaving ? ', goes with its last close' : ''}`]), bold);
}

/** What lies in a snapshot as people name it: `vms/.snapshots/monday/data.img` is `vms/data.img@monday`. */
function asReference(path: string): string {
  const [container = '', directory, snapshot, ...inside] = path.split('/');
  return directory === '.snapshots' && snapshot !== undefined && inside.length > 0 ? `${container}/${inside.join('/')}@${snapshot}` : path;
}
