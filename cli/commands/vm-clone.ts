/**
 * `offshoot vm clone SOURCE TARGET...`: machines with an identity of their own, all or none, in one operation.
 */
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { CLONE_TARGETS_MAX } from '../../daemon/control/limits.js';
import { checkStorePath } from '../../daemon/control/paths.js';
import type { HypervisorName, MachineSetting } from '../../daemon/control/machine-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { formatCount, formatDuration } from '../sizes.js';
import { followOperation, machineTable, parseSeconds, parseSetting } from './vm-options.js';

export interface VmCloneOptions {
  readonly set: readonly MachineSetting[];
  readonly seed?: string;
  readonly register?: boolean;
  readonly hypervisor?: HypervisorName;
  readonly as?: string;
  readonly wait?: number;
}

export function addVmCloneCommand(vm: Command, io: CliIo): void {
  vm.command('clone')
    .description('Clone a machine: its files as they are at one instant, with a name, a UUID and MAC addresses of its own. All clones are made, or none.')
    .usage('SOURCE TARGET... [OPTIONS]')
    .argument('<source>', 'CONTAINER/PATH[@NAME] of a machine, or a container with all its machines')
    .argument('<target...>', `the clones to make, each CONTAINER/NAME; up to ${formatCount(CLONE_TARGETS_MAX)}`)
    .option('--set <key=value>', 'change this in each configuration; may be given again', (text: string, before: readonly MachineSetting[]) => [...before, parseSetting(text)], [])
    .option('--seed <text>', 'UUIDs and MACs follow from it and from the paths: the same command makes the same machines')
    .option('--register', 'register each with a hypervisor')
    .addOption(new Option('--hypervisor <name>', "with --register: which; the usual one of the configuration's format when left out").choices(['libvirt', 'qemu', 'vsphere']))
    .option('--as <user>', 'the user whose permissions count, and to whom the clones belong (somebody else: root only)')
    .addOption(new Option('--wait <seconds>', 'wait for so long until the source is off, or the agent in it makes it quiet').argParser(parseSeconds))
    .addHelpText('after', `
A clone is called as its directory. A source that is running is cloned as it is, as
after a power cut, and the answer says so; --wait waits for better. What fails, or is
interrupted, is undone: names, files, registrations.

Examples:
  offshoot vm clone golden/debian lab/web1 --register
  offshoot vm clone golden/debian@v1 lab/web{001..100} --register --set memory=1GiB
  offshoot vm clone golden/debian lab/db --wait 60 --seed exercise-7 --as alice
`)
    .action(async (source: string, targets: string[], options: VmCloneOptions, command: Command) => { await cloneMachines(contextOf(io, command), source, targets, options); });
}

export async function cloneMachines(context: CliContext, source: string, targets: readonly string[], options: VmCloneOptions): Promise<void> {
  checkStorePath(source);
  for (const target of targets) checkStorePath(target);
  if (targets.length > CLONE_TARGETS_MAX) throw new OffshootError('too-large', `${formatCount(targets.length)} targets are more than one request can hold (${formatCount(CLONE_TARGETS_MAX)}): use several`, { targets: targets.length });
  if (options.hypervisor !== undefined && options.register !== true) throw new OffshootError('invalid-argument', '--hypervisor goes with --register');
  const client = context.client();
  const beganMs = context.io.nowMs();
  const job = await followOperation(context, await client.machines.clone({
    source, targets: [...targets], settings: [...options.set], seed: options.seed ?? null, register: options.register === true, hypervisor: options.hypervisor ?? null,
    user: options.as ?? null, waitSeconds: options.wait ?? null,
  }));
  const machines = await client.machines.list({ operationId: String(job.id) });
  context.output.result({ operationId: String(job.id), message: job.message, machines }, () => [
    ...machineTable(context, machines), `${job.message ?? ''} (operation ${job.id}, ${formatDuration(context.io.nowMs() - beganMs)})`,
  ]);
}
