/** `offshoot discover`: libvirt, vSphere or the iSCSI initiator of this host look again at what is there. */
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import type { DiscoverBody } from '../../daemon/control/export-schemas.js';
import { checkStorePath } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';

interface DiscoverOptions {
  readonly libvirt?: string;
  readonly vsphere?: boolean;
  readonly iscsi?: string;
  readonly mount?: string;
  readonly path?: string;
  readonly server?: string;
  readonly nfs?: '3' | '4';
}

export function addDiscoverCommand(program: Command, io: CliIo): void {
  program.command('discover')
    .description('Have the other side look again: a storage pool of libvirt, the datastores of vSphere, the iSCSI initiator of this host.')
    .summary('have hypervisors and initiators look again')
    .usage('--libvirt POOL | --vsphere | --iscsi PORTAL [OPTIONS]')
    .option('--libvirt <pool>', "libvirt's pool whose volumes are listed anew")
    .option('--vsphere', 'every host of vSphere rescans its storage')
    .option('--iscsi <portal>', 'ADDRESS[:PORT]: its targets are asked for, and sessions look for new disks (needs open-iscsi)')
    .option('--mount <name>', 'with --vsphere: make an NFS export a datastore of this name on every host')
    .option('--path <path>', 'with --mount: which; may be left out where one is presented as nfs')
    .option('--server <address>', "with --mount: what vSphere's hosts call this host")
    .addOption(new Option('--nfs <version>', 'with --mount: the version of NFS').choices(['3', '4']))
    .addHelpText('after', `
Examples:
  offshoot discover --libvirt offshoot
  offshoot discover --vsphere --mount offshoot --server 192.0.2.1
  offshoot discover --iscsi 192.0.2.1
`)
    .action(async (options: DiscoverOptions, command: Command) => {
      const context = contextOf(io, command);
      const result = await context.client().exports.discover(bodyOf(options));
      context.output.result(result, () => [result.message, ...result.found.map((each) => `  ${each}`)]);
    });
}

function bodyOf({ libvirt, vsphere, iscsi, mount, path, server, nfs }: DiscoverOptions): DiscoverBody {
  if ([libvirt, vsphere, iscsi].filter((each) => each !== undefined).length !== 1) throw new OffshootError('invalid-argument', 'say one of --libvirt POOL, --vsphere, --iscsi PORTAL');
  if (mount === undefined && (path !== undefined || server !== undefined || nfs !== undefined)) throw new OffshootError('invalid-argument', '--path, --server and --nfs belong to --mount NAME');
  if (mount !== undefined && vsphere === undefined) throw new OffshootError('invalid-argument', '--mount belongs to --vsphere');
  if (libvirt !== undefined) return { with: 'libvirt', pool: libvirt };
  if (iscsi !== undefined) return { with: 'iscsi', portal: iscsi };
  return {
    with: 'vsphere', ...(mount === undefined ? {} : { mount }), ...(path === undefined ? {} : { path: checkStorePath(path) }), ...(server === undefined ? {} : { server }),
    ...(nfs === undefined ? {} : { version: nfs === '3' ? 3 : 4 }),
  };
}
