/**
 * `offshoot present`, `withdraw`, `exports`: a container, directory or disk shown to others by NFS, SMB, iSCSI, NBD, or as a block device of this host.
 */
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { checkStorePath, visible } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { renderTable } from '../output.js';

const KINDS = ['nfs', 'smb', 'iscsi', 'nbd', 'block'] as const;
type Kind = (typeof KINDS)[number];

interface PresentOptions {
  readonly as: Kind;
  readonly to?: readonly string[];
  readonly readOnly?: boolean;
  readonly listen?: string;
  readonly option?: Readonly<Record<string, string>>;
}

export function addPresentCommand(program: Command, io: CliIo): void {
  program.command('present')
    .description('Show a container, a directory or a disk to others, until it is withdrawn: also after a restart.')
    .summary('show a container or disk to others')
    .usage('CONTAINER[/PATH] --as KIND [OPTIONS]')
    .argument('<path>', 'CONTAINER or CONTAINER/PATH; with @SNAPSHOT only --read-only')
    .addOption(new Option('--as <kind>', 'nfs, smb: directories; iscsi, nbd, block: disks; block: a device of this host').choices(KINDS).makeOptionMandatory())
    .addOption(new Option('--to <clients>', 'who is let in: addresses and networks, initiator or user names; with commas, or given again. Nobody else is').argParser(parseClients))
    .option('--read-only', 'refuse writes')
    .option('--listen <address>', 'ADDRESS or ADDRESS:PORT to listen on (default: as the daemon was told, and a port that is free)')
    .addOption(new Option('--option <key=value>', 'of the kind, given again for more').argParser(parseOption))
    .addHelpText('after', `
Everybody is --to 0.0.0.0/0,::/0, written out. Unless the daemon was started with
--export-address, servers listen on this host's own address alone.

Options of a kind: nbd: name, tls (a directory with certificates), verify=yes;
block: user (who alone may open the device); nfs (needs daemon start --nfs): squash
(root, none, all), versions (4 or 3,4), security (sys, krb5, krb5i, krb5p), port;
iscsi: account with password-file; smb: password-file (lines USER:PASSWORD), hosts
(addresses with commas), share, encryption=desired.

Examples:
  offshoot present vms/web001.img --as nbd --to 127.0.0.1
  offshoot present vms/web001.img --as nbd --to 192.0.2.0/24 --listen 192.0.2.1:10809
  offshoot present vms/web001.img@v1 --as block --read-only
  offshoot present vms --as nfs --to 192.0.2.7,192.0.2.8 --option squash=none
  offshoot present vms/web001.img --as iscsi --to iqn.2004-10.com.example:host
  offshoot present vms --as smb --to alice --option password-file=/etc/offshoot/smb
`)
    .action(async (path: string, options: PresentOptions, command: Command) => {
      const context = contextOf(io, command);
      const info = await context.client().exports.present({
        path: checkStorePath(path), kind: options.as, clients: [...options.to ?? []], readOnly: options.readOnly === true,
        options: { ...options.option, ...(options.listen === undefined ? {} : { listen: options.listen }) },
      });
      context.output.result(info, () => [`${info.path} is presented as ${info.kind}${info.clients.length === 0 ? '' : ` to ${info.clients.join(', ')}`}${info.readOnly ? ', read-only' : ''}`, ...info.addresses]);
    });
}

export function addWithdrawCommand(program: Command, io: CliIo): void {
  program.command('withdraw')
    .description('Show something no longer. Refused while somebody uses it.')
    .summary('show something no longer')
    .usage('CONTAINER[/PATH]|ID [--as KIND] [OPTIONS]')
    .argument('<what>', 'CONTAINER or CONTAINER/PATH, or the ID that offshoot exports gives')
    .addOption(new Option('--as <kind>', 'as what it is presented; may be left out where it is in one way only').choices(KINDS))
    .option('--force', 'also while somebody uses it: they get errors')
    .addHelpText('after', `
Examples:
  offshoot withdraw vms/web001.img --as nbd
  offshoot withdraw 7 --force
`)
    .action(async (what: string, options: { as?: Kind; force?: boolean }, command: Command) => {
      const context = contextOf(io, command);
      const isId = /^[1-9][0-9]*$/u.test(what) && options.as === undefined;
      const info = await context.client().exports.withdraw({
        ...(isId ? { id: what } : { path: checkStorePath(what) }), ...(options.as === undefined ? {} : { kind: options.as }), force: options.force === true,
      });
      context.output.result(info, () => [`${info.path} is presented as ${info.kind} no longer`]);
    });
}

export function addExportsCommand(program: Command, io: CliIo): void {
  program.command('exports')
    .description('List what is presented: as what, for whom, at which address, and who uses it.')
    .summary('list what is presented')
    .usage('[OPTIONS]')
    .addHelpText('after', `
Examples:
  offshoot exports
  offshoot exports --json | jq -r '.[] | select(.kind == "nbd").addresses[]'
`)
    .action(async (_options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const all = await context.client().exports.list();
      context.output.result(all, () => all.length === 0 ? ['nothing is presented: offshoot present CONTAINER[/PATH] --as KIND'] : renderTable(
        [{ header: 'ID', right: true }, { header: 'PATH' }, { header: 'AS' }, { header: 'TO' }, { header: 'ADDRESS' }, { header: 'USED BY' }, { header: 'STATE' }],
        all.map((each) => [String(each.id), each.path, `${each.kind}${each.readOnly ? ', read-only' : ''}`, listed(each.clients), listed(each.addresses), usedBy(each), each.state]),
        context.output.bold,
      ));
      for (const failure of new Set(all.flatMap(({ failure: each }) => each ?? []))) context.output.note(`failing: ${visible(failure)}`);
    });
}

function listed(texts: readonly string[]): string { return texts.length === 0 ? '-' : texts.join(' '); }
function usedBy({ connected }: ExportInfo): string { return connected === null ? '?' : listed(connected); }

function parseClients(text: string, before: readonly string[] | undefined): readonly string[] {
  return [...before ?? [], ...text.split(',').map((each) => each.trim()).filter((each) => each !== '')];
}

function parseOption(text: string, before: Readonly<Record<string, string>> | undefined): Readonly<Record<string, string>> {
  const at = text.indexOf('=');
  const key = text.slice(0, at);
  if (at <= 0) throw new OffshootError('invalid-argument', `'${visible(text)}' is no option: write KEY=VALUE`);
  if (before?.[key] !== undefined) throw new OffshootError('invalid-argument', `the option ${visible(key)} is given twice`);
  return { ...before, [key]: text.slice(at + 1) };
}
