/**
 * `offshoot vm import DIR CONTAINER/NAME`: a machine that lies in a directory of this host.
 */
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { checkPathInContainer } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { followOperation } from './vm-options.js';

export function addVmImportCommand(vm: Command, io: CliIo): void {
  vm.command('import')
    .description('Import a machine: its disks (images of other formats are converted), its configuration with the new paths, and what else lies in its directory.')
    .usage('DIR CONTAINER/NAME [OPTIONS]')
    .argument('<directory>', 'on this host, with one configuration: NAME.xml of libvirt, NAME.vmx, or machine.json')
    .argument('<target>', 'CONTAINER/NAME')
    .option('--allow <file>', 'the configuration may name this file outside of the directory; may be given again', (text: string, before: readonly string[]) => [...before, text], [])
    .addHelpText('after', `
A configuration from elsewhere may name any file of this host. What lies outside of
DIR is refused unless --allow names it: a disk is then imported too, anything
else (a firmware) stays where it is.

Examples:
  offshoot vm import /srv/templates/debian golden/debian
  offshoot vm import ./win11 golden/win11 --allow /usr/share/OVMF/OVMF_CODE.fd
`)
    .action(async (directory: string, target: string, options: { readonly allow: readonly string[] }, command: Command) => {
      const context = contextOf(io, command);
      const cwd = context.io.cwd();
      const client = context.client();
      const job = await followOperation(context, await client.machines.startImport({
        directory: resolve(cwd, directory), target: checkPathInContainer(target), allow: options.allow.map((file) => resolve(cwd, file)),
      }));
      const info = await client.machines.show(target);
      context.output.result({ operationId: String(job.id), machine: info }, () => [`imported ${info.path}: ${job.message ?? ''} (operation ${job.id})`]);
    });
}
