/**
 * Exports over iSCSI: one tgtd(8) of ours for each port, one target for each export, the disk as its logical unit 1. ISCSI.md says what clients do.
 *
 * What tgtd shows is asked, and only the difference to what is wanted is changed. A target is made from the inside out: nobody is let in before its disk,
 * its flags and its account are there; and it is made whole or taken away again. The initiators on its list come last, and those who are taken off
 * it lose their connections. tgtd lets in who is on the list of names *or* on the list of addresses, so an export has names alone: a list of addresses
 * beside it would let in more, not fewer. A name is no secret: with `account` and `password-file` clients prove themselves by CHAP.
 *
 * tgtd is given the disk as a link in our directory, named after the export: the store's names never become parameters. It opens the file when
 * the target is made, with O_DIRECT, has it open as long as that is there, and makes a SYNCHRONIZE CACHE an fsync(2).
 *
 * Options: `listen`; `account` with `password-file` (its first line; 12 to 255 characters).
 */
import { createHash } from 'node:crypto';
import { mkdirSync, readlinkSync, rmSync, symlinkSync } from 'node:fs';
import path from 'node:path';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import { runChild } from '../../programs/child.js';
import { ExportProcess, exportProcessesIn, makeExportsDirectory } from '../export-process.js';
import { byListening, checkOptionNames, endedServer, isGivenUp, listeningOf, settledListen, writtenListen, type Listening } from '../listen.js';
import type { PresenterPlace } from '../place.js';
import type { Export, ExportAddress, Presenter, PresenterAbilities, PresenterCall } from '../presenter.js';
import { checkSecretPath, digestOf, isDigestOf, readSecretLines } from '../secrets.js';
import { Tgtd, type ShownTarget } from './tgtd.js';

const PORT = 3260;
const OPTIONS = ['listen', 'account', 'password-file'];
const ACCOUNT = /^[A-Za-z0-9._-]{1,64}$/u;
/** Of CHAP; shorter ones are guessed. */
const PASSWORD = /^[\x21-\x7e]{12,255}$/u;
const INITIATOR = /^(?:iqn|eui|naa)\.[a-z0-9._:-]{1,219}$/u;
const UUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/u;
const NAME_PREFIX = 'iqn.2026-11.offshoot:';
const LUN = 1;
const SECTOR_BYTES = 512;
const SOCKET_PATH_BYTES_MAX = 107;
const PROBE_MS = 10_000;
const START_MS = 30_000;
const END_MS = 10_000;

export function createIscsiPresenter(place: PresenterPlace): Presenter { return new IscsiPresenter(place); }

/** Which password each target was made with: in the configuration file of its server, which tgtd itself has none of. */
type Notes = Readonly<Record<string, { readonly account: string; readonly digest: string }>>;

class IscsiPresenter implements Presenter {
  readonly id = 'iscsi';
  readonly abilities: PresenterAbilities = { directories: false, disks: true, clients: 'initiators', encryption: null, knowsClients: true };
  readonly #place: PresenterPlace;
  readonly #standard: Listening;
  #shown: readonly Export[] | null = null;

  constructor(place: PresenterPlace) {
    this.#place = place;
    this.#standard = { address: place.address, port: PORT };
  }

  async probe({ signal }: PresenterCall): ReturnType<Presenter['probe']> {
    try {
      const { stdout } = await runChild('tgtd', ['--version'], { signal, timeoutMs: PROBE_MS });
      await runChild('tgtadm', ['--version'], { signal, timeoutMs: PROBE_MS });
      return { usable: true, version: `tgt ${stdout.trim()}` };
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind !== 'tool-missing') throw thrown;
      return { usable: false, reason: `${error.message} (tgt)` };
    }
  }

  check(wanted: Export): void {
    const { kind, uuid, sizeBytes, clients, options } = wanted;
    if (kind !== 'disk') throw refused('iSCSI shows disks, one a target: present the disks in it one by one');
    if (!UUID.test(uuid)) throw refused(`'${uuid}' is no UUID`);
    if (sizeBytes === null || sizeBytes < SECTOR_BYTES) throw refused(`a disk of less than ${SECTOR_BYTES} bytes cannot be shown by iSCSI`);
    if (clients.length === 0) throw refused('say for whom: --to iqn.2004-10.com.example:host');
    for (const client of clients) {
      if (!INITIATOR.test(client)) throw refused(`'${client}' is not an initiator name: write it as iqn.2004-10.com.example:host`);
    }
    checkOptionNames(wanted, OPTIONS);
    listeningOf(wanted, this.#standard);
    const { account, 'password-file': passwordFile } = options;
    if ((account === undefined) !== (passwordFile === undefined)) throw refused('the options account and password-file belong together');
    if (account !== undefined && !ACCOUNT.test(account)) throw refused(`'${account}' is no account name: letters, digits, '.', '_' and '-', at most 64`);
    if (passwordFile !== undefined) checkSecretPath(passwordFile, this.#place.mountDir);
  }

  async settle(wanted: Export, shown: readonly Export[]): Promise<Readonly<Record<string, string>>> {
    return await Promise.resolve({ ...wanted.options, listen: settledListen(wanted, shown, this.#standard) });
  }

  async apply(wanted: readonly Export[], { signal }: PresenterCall): Promise<readonly ExportAddress[]> {
    const before = this.#shown;
    try {
      await this.#show(wanted, signal);
      this.#shown = wanted;
    } catch (thrown) {
      // As it was: whoever calls hears why, and not what came of this.
      if (before !== null) await this.#show(before, AbortSignal.timeout(START_MS)).catch(ignoreOperating);
      throw thrown;
    }
    return wanted.map((each) => ({ id: each.id, addresses: [`iscsi://${writtenListen(listeningOf(each, this.#standard))}/${targetName(each)}/${LUN}`] }));
  }

  async #show(wanted: readonly Export[], signal: AbortSignal): Promise<void> {
    const groups = byListening(wanted, this.#standard);
    const passwords = await readPasswords(wanted);
    for (const { at, exports } of groups) await this.#applyTo(at, exports, passwords, signal);
    const names = new Set(groups.map(({ at }) => this.#serverAt(at).name));
    for (const server of exportProcessesIn(this.#place.directory)) if (!names.has(server.name)) await this.#endServer(server);
  }

  async clientsOf(shown: Export, { signal }: PresenterCall): Promise<readonly string[]> {
    const server = this.#serverAt(listeningOf(shown, this.#standard));
    if (server.state().kind !== 'running') return [];
    const target = (await this.#tgtdOf(server).targets(signal)).find(({ name }) => name === targetName(shown));
    return [...new Set(target?.sessions.map(({ initiator, addresses }) => `${initiator} (${addresses.join(', ')})`) ?? [])];
  }

  async lost(shown: readonly Export[]): Promise<string | null> {
    return await Promise.resolve(endedServer('iSCSI', byListening(shown, this.#standard), (at) => this.#serverAt(at)));
  }

  async end(): Promise<void> {
    for (const server of exportProcessesIn(this.#place.directory)) await this.#endServer(server);
  }

  async #applyTo(at: Listening, wanted: readonly Export[], passwords: ReadonlyMap<number, string>, signal: AbortSignal): Promise<void> {
    const server = this.#serverAt(at);
    const tgtd = this.#tgtdOf(server);
    const isNew = server.state().kind !== 'running';
    if (isNew) await this.#start(server, at, signal);
    const shown = await tgtd.targets(signal);
    const notes = isNew ? {} : notesOf(server);
    const kept = new Map(wanted.flatMap((each) => {
      const target = shown.find(({ name }) => name === targetName(each));
      return target !== undefined && isAsWanted(target, each, this.#linkOf(each), notes[each.uuid], passwords.get(each.id)) ? [[each.id, target] as const] : [];
    }));
    // First, for their numbers and names; and because an account that is taken away is taken from every target, which then lets in without one.
    for (const target of shown) if (![...kept.values()].includes(target)) await removeTarget(tgtd, target, signal);
    const accounts = new Set(wanted.filter(({ id }) => kept.has(id)).map(({ options }) => options['account']));
    await forgetAccounts(tgtd, accounts, signal);
    for (const each of wanted) {
      this.#link(each);
      const target = kept.get(each.id);
      if (target === undefined) await this.#make(tgtd, each, passwords.get(each.id), accounts, signal);
      await changeClients(tgtd, target ?? { tid: each.id, clients: [], sessions: [] }, each.clients, signal);
    }
    server.writeConfig(`${JSON.stringify(notesFor(wanted, passwords, notes))}\n`);
  }

  async #start(server: ExportProcess, at: Listening, signal: AbortSignal): Promise<void> {
    const socket = this.#socketOf(server);
    if (Buffer.byteLength(`${socket}.0`) > SOCKET_PATH_BYTES_MAX) throw new OffshootError('name-too-long', `the path of tgtd's socket, ${socket}.0, is too long for the kernel: use a shorter run-time directory`);
    makeExportsDirectory(this.#place.directory);
    server.forget();
    // tgtd does not say when its port is taken. One that was just killed has it a moment longer.
    if (!(await isGivenUp(at, signal))) throw new OffshootError('in-use', `somebody else listens at ${writtenListen(at)} already: choose another port with --listen ${at.address}:PORT`, { port: at.port });
    const tgtd = this.#tgtdOf(server);
    await server.start(
      { program: 'env', arguments: [`TGT_IPC_SOCKET=${socket}`, 'tgtd', '--foreground', '--pid-file', server.pidFile, '--iscsi', `portal=${writtenListen(at)}`] },
      { signal, timeoutMs: START_MS, isUp: async () => await tgtd.hasPortal(signal).catch(ignoreOperating) },
    );
  }

  /** Whole, or not there; nobody is let in yet. `accounts` are those that tgtd has, with the right passwords. */
  async #make(tgtd: Tgtd, wanted: Export, password: string | undefined, accounts: Set<string | undefined>, signal: AbortSignal): Promise<void> {
    const tid = ['--tid', String(wanted.id)];
    const lun = ['--mode', 'logicalunit', ...tid, '--lun', String(LUN)];
    const { account } = wanted.options;
    await tgtd.adm(['--op', 'new', '--mode', 'target', ...tid, '--targetname', targetName(wanted)], signal);
    try {
      await tgtd.adm(['--op', 'new', ...lun, '--backing-store', this.#linkOf(wanted), '--bstype', 'rdwr', '--bsoflags', 'direct', '--device-type', 'disk', '--blocksize', String(SECTOR_BYTES)], signal);
      await tgtd.adm(['--op', 'update', ...lun, '--params', lunParameters(wanted)], signal);
      if (account !== undefined && password !== undefined) {
        if (!accounts.has(account)) await tgtd.addAccount(account, password, signal);
        accounts.add(account);
        await tgtd.adm(['--op', 'bind', '--mode', 'account', ...tid, '--user', account], signal);
      }
    } catch (thrown) {
      await tgtd.adm(['--op', 'delete', '--force', '--mode', 'target', ...tid], AbortSignal.timeout(START_MS)).catch(ignoreOperating);
      const error = toOffshootError(thrown);
      throw new OffshootError(error.kind, `${wanted.path} cannot be shown by iSCSI: ${error.message}`, error.context, thrown);
    }
  }

  async #endServer(server: ExportProcess): Promise<void> {
    // Without targets it has no disk open any more when it is killed: one that is just ending still kept the mount in use. It does not go by being asked while
    // it has some, and holds nothing back that it has acknowledged.
    if (server.state().kind === 'running') await this.#removeTargets(server).catch(ignoreOperating);
    await server.end({ termMs: 0 });
    server.forget();
    for (const suffix of ['0', '0.lock']) rmSync(`${this.#socketOf(server)}.${suffix}`, { force: true });
  }

  async #removeTargets(server: ExportProcess): Promise<void> {
    const signal = AbortSignal.timeout(END_MS);
    const tgtd = this.#tgtdOf(server);
    for (const target of await tgtd.targets(signal)) await removeTarget(tgtd, target, signal);
  }

  #link(wanted: Export): void {
    const link = this.#linkOf(wanted);
    mkdirSync(path.dirname(link), { recursive: true, mode: 0o700 });
    try {
      if (readlinkSync(link) === wanted.mountPath) return;
    } catch {
      // Not there yet.
    }
    rmSync(link, { force: true });
    symlinkSync(wanted.mountPath, link);
  }

  #linkOf({ uuid }: Export): string { return path.join(this.#place.directory, 'disks', uuid); }
  #serverAt({ port }: Listening): ExportProcess { return new ExportProcess({ directory: this.#place.directory, name: `tgtd-${port}` }); }
  #socketOf({ directory, name }: ExportProcess): string { return path.join(directory, name); }
  #tgtdOf(server: ExportProcess): Tgtd { return new Tgtd(this.#socketOf(server)); }
}

export function targetName({ uuid }: Export): string { return `${NAME_PREFIX}${uuid}`; }

/** The same disk is the same to its clients after every restart: serial number, and a name that is the store's to give (NAA type 3). */
export function lunParameters({ uuid, readOnly }: Export): string {
  const digest = createHash('sha256').update(uuid).digest('hex');
  return [
    'vendor_id=OFFSHOOT', 'product_id=disk', 'product_rev=1', `scsi_sn=${uuid}`, `scsi_id=${digest.slice(0, 24)}`,
    'removable=0', 'thin_provisioning=1', `readonly=${readOnly ? 1 : 0}`,
  ].join(',');
}

function isAsWanted(target: ShownTarget, wanted: Export, link: string, note: Notes[string] | undefined, password: string | undefined): boolean {
  const lun = target.luns.find((each) => each.lun === LUN);
  const { account } = wanted.options;
  if (target.tid !== wanted.id || lun?.path !== link || lun.readOnly !== wanted.readOnly) return false;
  if (account === undefined) return target.accounts.length === 0;
  return target.accounts.length > 0 && note?.account === account && password !== undefined && isDigestOf(note.digest, password);
}

async function forgetAccounts(tgtd: Tgtd, kept: ReadonlySet<string | undefined>, signal: AbortSignal): Promise<void> {
  const known = (await tgtd.adm(['--op', 'show', '--mode', 'account'], signal)).split('\n').map((line) => line.trim()).filter((line) => ACCOUNT.test(line));
  for (const account of known) if (!kept.has(account)) await tgtd.adm(['--op', 'delete', '--mode', 'account', '--user', account], signal);
}

async function removeTarget(tgtd: Tgtd, { tid }: ShownTarget, signal: AbortSignal): Promise<void> {
  await tgtd.adm(['--op', 'delete', '--force', '--mode', 'target', '--tid', String(tid)], signal);
}

/** Who comes off the list loses what he has open; the others notice nothing. */
async function changeClients(tgtd: Tgtd, target: Pick<ShownTarget, 'tid' | 'clients' | 'sessions'>, wanted: readonly string[], signal: AbortSignal): Promise<void> {
  const tid = ['--tid', String(target.tid)];
  for (const client of target.clients) if (!wanted.includes(client)) await tgtd.adm(['--op', 'unbind', '--mode', 'target', ...tid, '--initiator-name', client], signal);
  for (const client of wanted) if (!target.clients.includes(client)) await tgtd.adm(['--op', 'bind', '--mode', 'target', ...tid, '--initiator-name', client], signal);
  for (const { initiator, sid, cids } of target.sessions) {
    if (wanted.includes(initiator)) continue;
    for (const cid of cids) await tgtd.adm(['--op', 'delete', '--mode', 'conn', ...tid, '--sid', String(sid), '--cid', String(cid)], signal).catch(ignoreOperating);
  }
}

/** By the ids of the exports. One account is one password. */
async function readPasswords(wanted: readonly Export[]): Promise<ReadonlyMap<number, string>> {
  const byAccount = new Map<string, string>();
  const byExport = new Map<number, string>();
  for (const { id, options: { account, 'password-file': file } } of wanted) {
    if (account === undefined || file === undefined) continue;
    const password = (await readSecretLines(file))[0] ?? '';
    if (!PASSWORD.test(password)) throw refused(`the first line of ${file} must be a password of 12 to 255 letters, digits and signs without blanks`);
    if ((byAccount.get(account) ?? password) !== password) throw refused(`the account ${account} has two different passwords: give each password an account of its own`);
    byAccount.set(account, password);
    byExport.set(id, password);
  }
  return byExport;
}

function notesOf(server: ExportProcess): Notes {
  try {
    return JSON.parse(server.readConfig() ?? '{}') as Notes;
  } catch {
    // Not written whole by us: as if nothing were known, so that all is made again.
    return {};
  }
}

function notesFor(wanted: readonly Export[], passwords: ReadonlyMap<number, string>, before: Notes): Notes {
  return Object.fromEntries(wanted.flatMap(({ id, uuid, options: { account } }) => {
    const password = passwords.get(id);
    if (account === undefined || password === undefined) return [];
    const note = before[uuid];
    return [[uuid, note?.account === account && isDigestOf(note.digest, password) ? note : { account, digest: digestOf(password) }]];
  }));
}

/** For what may fail and is seen to otherwise. */
function ignoreOperating(thrown: unknown): false {
  toOffshootError(thrown);
  return false;
}

function refused(message: string): OffshootError { return new OffshootError('invalid-argument', message); }
