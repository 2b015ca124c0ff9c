/**
 * `offshoot vm ...`: virtual machines. A machine is a directory in a container, with one configuration and its disks. `clone` and `import`
 * are in files of their own.
 */
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkContainerName, checkStorePath } from '../../daemon/control/paths.js';
import type { MachineInfo, MachineSetting } from '../../daemon/control/machine-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { counted, renderFields, renderTable } from '../output.js';
import { formatBytes, formatTime } from '../sizes.js';
import { machineTable, parseSeconds, parseSetting } from './vm-options.js';
import { addVmCloneCommand } from './vm-clone.js';
import { addVmImportCommand } from './vm-import.js';

const STOP_SECONDS_DEFAULT = 120;
export const HYPERVISORS = ['libvirt', 'qemu', 'vsphere'] as const;

export function addVmCommands(program: Command, io: CliIo): void {
  const vm = program.command('vm').description('Virtual machines: import, clone and customise them, register them with a hypervisor, start and stop them.')
    .summary('clone, customise, register and start virtual machines').helpCommand(false).usage('import|ls|show|clone|get|set|register|unregister|start|stop|status|rm [OPTIONS]');
  addVmImportCommand(vm, io);
  vm.command('ls')
    .description('List machines. With a container, also those in it that Offshoot neither made nor registered yet.')
    .usage('[CONTAINER] [OPTIONS]')
    .argument('[container]', 'only those in this container')
    .option('--power', 'ask the hypervisors whether each is running')
    .addHelpText('after', `
Examples:
  offshoot vm ls
  offshoot vm ls lab --power
  offshoot vm ls --json | jq -r '.[] | select(.registration == "registered").name'
`)
    .action(async (container: string | undefined, options: { power?: boolean }, command: Command) => {
      if (container !== undefined) checkContainerName(container);
      const context = contextOf(io, command);
      const found = await context.client().machines.list({ ...(container === undefined ? {} : { container }), power: options.power === true });
      context.output.result(found, () => machineTable(context, found, options.power === true));
      for (const reason of new Set(found.flatMap((info) => info.powerError ?? []))) context.output.note(`not known: ${reason}`);
    });
  addVmCloneCommand(vm, io);
  one(vm, io, 'show', 'Say all about one machine: who it is, its files, where it is registered, how it is.', ['offshoot vm show lab/web1', 'offshoot vm show golden/debian@v1'], async (context, path) => await context.client().machines.show(path));
  one(vm, io, 'status', 'Say whether a machine is running, as its hypervisor says.', ['offshoot vm status lab/web1', 'offshoot vm status lab/web1 --json | jq -r .power'],
    async (context, path) => await context.client().machines.show(path), (info) => [powerText(info)]);
  vm.command('get')
    .description("Print parameters of a machine's configuration, by the names that its format has for them.")
    .usage('PATH [KEY]')
    .argument('<path>', 'CONTAINER/PATH[@NAME] of the machine')
    .argument('[key]', 'this one only')
    .addHelpText('after', `
Examples:
  offshoot vm get lab/web1
  offshoot vm get lab/web1 memory
`)
    .action(async (path: string, key: string | undefined, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const settings = await context.client().machines.get(checkStorePath(path), key ?? null);
      context.output.result(settings, () => key === undefined
        ? renderTable([{ header: 'KEY' }, { header: 'VALUE' }], settings.map((each) => [each.key, each.value]), context.output.bold)
        : settings.map((each) => each.value));
    });
  vm.command('set')
    .description('Change parameters of a machine that is off, all of them or none. Its hypervisor is told.')
    .usage('PATH KEY=VALUE...')
    .argument('<path>', 'CONTAINER/PATH of the machine')
    .argument('<setting...>', 'KEY=VALUE, as offshoot vm get shows them', (text: string, before: readonly MachineSetting[] | undefined) => [...(before ?? []), parseSetting(text)])
    .addHelpText('after', `
Examples:
  offshoot vm set lab/web1 memory=4GiB
  offshoot vm set lab/web1 vcpu=4 memory=8GiB
`)
    .action(async (path: string, settings: readonly MachineSetting[], _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().machines.set(checkStorePath(path), settings);
      context.output.result(info, () => [`${info.path}: ${settings.map(({ key, value }) => `${key}=${value}`).join(', ')}`]);
    });
  vm.command('register')
    .description('Make a machine known to a hypervisor. It is not started.')
    .usage('PATH [OPTIONS]')
    .argument('<path>', 'CONTAINER/PATH of the machine')
    .addOption(new Option('--hypervisor <name>', "which; the usual one of the configuration's format when left out").choices(HYPERVISORS))
    .addHelpText('after', `
Examples:
  offshoot vm register lab/web1
  offshoot vm register lab/web1 --hypervisor qemu
`)
    .action(async (path: string, options: { hypervisor?: (typeof HYPERVISORS)[number] }, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().machines.register(checkStorePath(path), options.hypervisor ?? null);
      context.output.result(info, () => [`${info.path} is registered with ${info.hypervisor ?? ''} as ${info.externalId ?? ''}`]);
    });
  one(vm, io, 'unregister', 'Make its hypervisor forget a machine that is off. Its files stay.', ['offshoot vm unregister lab/web1'],
    async (context, path) => await context.client().machines.unregister(path), (info) => [`${info.path} is registered with no hypervisor any more`]);
  one(vm, io, 'start', 'Start a machine that is registered.', ['offshoot vm start lab/web1'], async (context, path) => await context.client().machines.start(path), (info) => [powerText(info)]);
  vm.command('stop')
    .description('Shut a machine down, and wait until it is off.')
    .usage('PATH [OPTIONS]')
    .argument('<path>', 'CONTAINER/PATH of the machine')
    .option('--force', 'take its power, at once')
    .addOption(new Option('--timeout <seconds>', 'how long it may take to shut down').argParser(parseSeconds).default(STOP_SECONDS_DEFAULT, String(STOP_SECONDS_DEFAULT)))
    .addHelpText('after', `
Examples:
  offshoot vm stop lab/web1
  offshoot vm stop lab/web1 --timeout 300 || offshoot vm stop lab/web1 --force
`)
    .action(async (path: string, options: { force?: boolean; timeout: number }, command: Command) => {
      if (options.timeout <= 0) throw new OffshootError('invalid-argument', '--timeout must be more than 0 seconds');
      const context = contextOf(io, command);
      const info = await context.client().machines.stop(checkStorePath(path), { force: options.force === true, timeoutSeconds: options.timeout });
      context.output.result(info, () => [powerText(info)]);
    });
  vm.command('rm')
    .description('Unregister a machine and remove its directory with all that is in it. Clones of it stay whole.')
    .usage('PATH [OPTIONS]')
    .argument('<path>', 'CONTAINER/PATH of the machine')
    .option('--force', 'also when it runs: take its power first')
    .addHelpText('after', `
Examples:
  offshoot vm rm lab/web1
  offshoot vm ls lab --json | jq -r '.[].path' | xargs -n 1 offshoot vm rm --force
`)
    .action(async (path: string, options: { force?: boolean }, command: Command) => {
      const context = contextOf(io, command);
      const removed = await context.client().machines.remove(checkStorePath(path), { force: options.force === true });
      context.output.result(removed, () => [`removed ${removed.path}: ${counted(removed.nodesRemoved, 'name')}, ${formatBytes(removed.freedBytes)} freed`]);
    });
}

/** A command about one machine that takes nothing else. */
function one(
  vm: Command, io: CliIo, name: string, description: string, examples: readonly string[], ask: (context: CliContext, path: string) => Promise<MachineInfo>,
  lines?: (info: MachineInfo) => readonly string[],
): void {
  vm.command(name)
    .description(description)
    .usage('PATH')
    .argument('<path>', 'CONTAINER/PATH of the machine')
    .addHelpText('after', `\nExamples:\n${examples.map((each) => `  ${each}\n`).join('')}`)
    .action(async (path: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const info = await ask(context, checkStorePath(path));
      context.output.result(info, () => lines?.(info) ?? machineFields(context, info));
    });
}

function fileLines({ slot, role, file, sizeBytes, ownedBytes }: MachineInfo['files'][number]): string[] {
  const sizes = sizeBytes === null ? '' : `, ${formatBytes(sizeBytes)}${ownedBytes === null ? '' : `, ${formatBytes(ownedBytes)} of its own`}`;
  return [`${slot} (${role}${sizes})`, `  ${file}`];
}

function powerText(info: MachineInfo): string {
  if (info.power === 'unknown') return `${info.hypervisor ?? ''} does not say how ${info.path} is: ${info.powerError ?? ''}`;
  return info.power === null ? `${info.path} is registered with no hypervisor` : `${info.path} is ${info.power} (${info.hypervisor ?? ''})`;
}

function machineFields(context: CliContext, info: MachineInfo): string[] {
  return renderFields(info.path, [
    ['Name', info.name ?? '-'], ['UUID', info.uuid ?? '-'], ['MAC', info.macs.length === 0 ? '-' : info.macs.map((mac) => mac ?? '(made by the hypervisor)')],
    ['State', info.state], ['Power', `${info.power ?? '-'}${info.powerError === null ? '' : `: ${info.powerError}`}`], ['Agent', info.agent === null ? '-' : info.agent ? 'answers' : 'does not answer'],
    ['Registered', info.registration === 'none' ? 'no' : `${info.hypervisor ?? ''}${info.registration === 'asked' ? ' (not known: register or unregister it again)' : `, ${info.externalId ?? ''}`}`],
    ['Configuration', `${info.configuration} (${info.format})`], ['Memory', info.memoryBytes === null ? '-' : formatBytes(info.memoryBytes)], ['Processors', info.processors === null ? '-' : String(info.processors)],
    ['Files', info.files.length === 0 ? '-' : info.files.flatMap(fileLines)],
    ['Mounted at', info.mountPath], ['Made', info.createdAt === null ? '-' : formatTime(info.createdAt)], ['Operation', info.operationId ?? '-'],
  ], context.output.bold);
}
