/**
 * Exports over SMB: one smbd(8) of ours for each port, one share for each export, with directories and users of its own. SMB.md says what clients do.
 *
 * Its configuration is written whole, shown to testparm(1) first, and then put in place of the one before; smbd is told to read it again, and those whom it
 * does not let in any more lose what they have open. Others notice nothing. Users are accounts of this host, as whom smbd opens files: modes and
 * owners under the mount count, and root is nobody's name here. Passwords come from a file of the administrator's and go to smbpasswd(8) by its
 * standard input; Samba's digests of them lie in our own directory on tmpfs.
 *
 * Options: `listen`; `share` (the last part of the path when left out); `hosts` (addresses and networks with commas; this host when left out);
 * `password-file` (lines `USER:PASSWORD`); `encryption` (`required`, or `desired`).
 */
import { mkdirSync, readFileSync, rmSync } from 'node:fs';
import { isIP } from 'node:net';
import path from 'node:path';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import { runChild, type ChildResult } from '../../programs/child.js';
import { ExportProcess, exportProcessesIn, makeExportsDirectory, writeWhole } from '../export-process.js';
import { byListening, checkOptionNames, endedServer, isGivenUp, isListening, listeningOf, settledListen, writtenListen, type Listening } from '../listen.js';
import type { PresenterPlace } from '../place.js';
import type { Export, ExportAddress, Presenter, PresenterAbilities, PresenterCall } from '../presenter.js';
import { checkSecretPath, digestOf, isDigestOf, readSecretLines } from '../secrets.js';
import { isSafeValue, isShareName, isUserName, shareLines, shareNameOf, smbConf, type SmbShare } from './smb-conf.js';

const PORT = 445;
const OPTIONS = ['listen', 'share', 'hosts', 'password-file', 'encryption'];
const ENCRYPTIONS = ['required', 'desired'];
const HOSTS_DEFAULT = ['127.0.0.0/8', '::1'];
const HOSTS_MAX = 256;
const PASSWORD_CHARACTERS_MIN = 8;
const SOCKET_PATH_BYTES_MAX = 107;
const CALL_MS = 30_000;
const START_MS = 60_000;
const RADIX = 36;

export function createSmbPresenter(place: PresenterPlace): Presenter { return new SmbPresenter(place); }

class SmbPresenter implements Presenter {
  readonly id = 'smb';
  readonly abilities: PresenterAbilities = { directories: true, disks: false, clients: 'users', encryption: 'smb3', knowsClients: true };
  readonly #place: PresenterPlace;
  readonly #standard: Listening;
  #shown: readonly Export[] | null = null;

  constructor(place: PresenterPlace) {
    this.#place = place;
    this.#standard = { address: place.address, port: PORT };
  }

  async probe({ signal }: PresenterCall): ReturnType<Presenter['probe']> {
    try {
      const { stdout } = await runChild('smbd', ['--version'], { signal, timeoutMs: CALL_MS });
      for (const program of ['testparm', 'smbpasswd', 'smbcontrol', 'smbstatus', 'pdbedit']) await runChild(program, ['--help'], { signal, timeoutMs: CALL_MS });
      return { usable: true, version: `Samba ${stdout.trim()}` };
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind !== 'tool-missing') throw thrown;
      return { usable: false, reason: `${error.message} (samba)` };
    }
  }

  check(wanted: Export): void {
    const { kind, clients, options, mountPath } = wanted;
    if (kind !== 'directory') throw refused('SMB shows directories: present the container, or the directory, that the disk lies in');
    if (!isSafeValue(mountPath)) throw refused(`${JSON.stringify(mountPath)} cannot be said to Samba: it has a control character, '%', '"' or '\\', two blanks in a row, or one at an end; rename it, or present a directory above it`);
    if (clients.length === 0) throw refused('say for whom: --to USER');
    for (const client of clients) {
      if (!isUserName(client)) throw refused(`'${client}' is not a user name; addresses are given with --option hosts=ADDRESS,NETWORK`);
    }
    if (clients.includes('root')) throw refused('root is not let in by SMB: make the files belong to a user, and name that one');
    checkOptionNames(wanted, OPTIONS);
    listeningOf(wanted, this.#standard);
    hostsOf(wanted);
    const { share, encryption, 'password-file': passwordFile } = options;
    if (share !== undefined && !isShareName(share)) throw refused(`'${share}' is no name for a share: small letters, digits, '.', '_' and '-', at most 64, and none that Samba means something else by`);
    if (encryption !== undefined && !ENCRYPTIONS.includes(encryption)) throw refused(`encryption is ${ENCRYPTIONS.join(' or ')}`);
    if (passwordFile === undefined) throw refused('say where the passwords are: --option password-file=FILE, with lines USER:PASSWORD, for nobody but root');
    checkSecretPath(passwordFile, this.#place.mountDir);
  }

  async settle(wanted: Export, shown: readonly Export[]): Promise<Readonly<Record<string, string>>> {
    const listen = settledListen(wanted, shown, this.#standard);
    const taken = new Set(shown.filter((each) => settledListen(each, [], this.#standard) === listen).map(shareOf));
    const asked = wanted.options['share'];
    if (asked !== undefined && taken.has(asked)) throw new OffshootError('already-exists', `there is a share ${asked} at ${listen} already: choose another name with --option share=NAME`, { share: asked });
    const name = shareOf(wanted);
    let share = name;
    for (let number = 2; taken.has(share); number += 1) share = `${name}-${number}`;
    return await Promise.resolve({ ...wanted.options, listen, share });
  }

  async apply(wanted: readonly Export[], { signal }: PresenterCall): Promise<readonly ExportAddress[]> {
    const before = this.#shown;
    try {
      await this.#show(wanted, signal);
      this.#shown = wanted;
    } catch (thrown) {
      // As it was: whoever calls hears why, and not what came of this.
      if (before !== null) await this.#show(before, AbortSignal.timeout(START_MS)).catch(toOffshootError);
      throw thrown;
    }
    return wanted.map((each) => ({ id: each.id, addresses: [`smb://${writtenListen(listeningOf(each, this.#standard))}/${shareOf(each)}`] }));
  }

  async clientsOf(shown: Export, { signal }: PresenterCall): Promise<readonly string[]> {
    const server = this.#serverAt(listeningOf(shown, this.#standard));
    if (server.state().kind !== 'running') return [];
    const { stdout } = await said('smbstatus', ['--configfile', server.configFile, '--shares'], signal);
    return [...new Set(stdout.split('\n').map((line) => line.trim().split(/\s+/u)).filter(([share, pid]) => share === shareOf(shown) && /^\d+$/u.test(pid ?? '')).map(([, , machine = '']) => machine))];
  }

  async lost(shown: readonly Export[]): Promise<string | null> {
    return await Promise.resolve(endedServer('SMB', byListening(shown, this.#standard), (at) => this.#serverAt(at)));
  }

  async end(): Promise<void> {
    for (const server of exportProcessesIn(this.#place.directory)) await this.#endServer(server);
  }

  async #show(wanted: readonly Export[], signal: AbortSignal): Promise<void> {
    const groups = byListening(wanted, this.#standard);
    const passwords = await Promise.all(groups.map(async ({ exports }) => await readPasswords(exports)));
    await checkAccounts(wanted.flatMap(({ clients }) => clients), signal);
    for (const [index, { at, exports }] of groups.entries()) {
      try {
        await this.#applyTo(at, exports.map(toShare), passwords[index]!, signal);
      } catch (thrown) {
        // Passwords of a server that does not run are nobody's.
        if (this.#serverAt(at).state().kind !== 'running') await this.#endServer(this.#serverAt(at));
        throw thrown;
      }
    }
    const names = new Set(groups.map(({ at }) => this.#serverAt(at).name));
    for (const server of exportProcessesIn(this.#place.directory)) if (!names.has(server.name)) await this.#endServer(server);
  }

  async #applyTo(at: Listening, shares: readonly SmbShare[], passwords: ReadonlyMap<string, string>, signal: AbortSignal): Promise<void> {
    const server = this.#serverAt(at);
    const directory = this.#keptOf(server);
    makeExportsDirectory(this.#place.directory);
    for (const name of ['', 'private', 'state', 'cache', 'rpc']) mkdirSync(path.join(directory, name), { recursive: true, mode: 0o700 });
    const text = smbConf(at, directory, shares);
    await validate(`${server.configFile}.new`, text, signal);
    const before = server.readConfig() ?? '';
    const isRunning = server.state().kind === 'running';
    // Users who come are known before they are let in; those who go are forgotten after.
    const digests = await addUsers(server, directory, text, passwords, signal);
    if (!isRunning) {
      const longest = `${directory}/msg.sock/${readFileSync('/proc/sys/kernel/pid_max', 'latin1').trim()}`;
      if (Buffer.byteLength(longest) > SOCKET_PATH_BYTES_MAX) throw new OffshootError('name-too-long', `the paths of Samba's sockets (${longest}) are too long for the kernel: use a shorter run-time directory`);
      if (!(await isGivenUp(at, signal))) throw new OffshootError('in-use', `somebody else listens at ${writtenListen(at)} already: choose another port with --listen ${at.address}:PORT`, { port: at.port });
      server.writeConfig(text);
      await server.start({ program: 'smbd', arguments: ['--foreground', '--no-process-group', '--debug-stdout', '--configfile', server.configFile] }, { signal, timeoutMs: START_MS, isUp: async () => await isListening(at) });
    } else if (server.writeConfig(text)) {
      await smbcontrol(server, ['reload-config'], signal);
      await sendAway(server, before, shares, signal);
    }
    await forgetUsers(server, directory, digests, passwords, signal);
  }

  async #endServer(server: ExportProcess): Promise<void> {
    await server.end();
    server.forget();
    rmSync(`${server.configFile}.new`, { force: true });
    rmSync(this.#keptOf(server), { recursive: true, force: true });
  }

  #serverAt({ port }: Listening): ExportProcess { return new ExportProcess({ directory: this.#place.directory, name: `smbd-${port}` }); }
  #keptOf({ name }: ExportProcess): string { return path.join(this.#place.directory, Number(name.slice('smbd-'.length)).toString(RADIX)); }
}

function shareOf({ options, path: at }: Export): string { return options['share'] ?? shareNameOf(at); }

function toShare(wanted: Export): SmbShare {
  const { mountPath, clients, readOnly, options } = wanted;
  return { name: shareOf(wanted), path: mountPath, users: clients, hosts: hostsOf(wanted), readOnly, encryption: options['encryption'] === 'desired' ? 'desired' : 'required' };
}

function hostsOf({ options }: Export): readonly string[] {
  const text = options['hosts'];
  if (text === undefined) return HOSTS_DEFAULT;
  const hosts = text.split(',');
  if (hosts.length > HOSTS_MAX) throw refused(`${hosts.length} addresses are too many: at most ${HOSTS_MAX}; name networks instead`);
  for (const host of hosts) {
    const [address = '', prefix, ...more] = host.split('/');
    const version = isIP(address);
    const isPrefix = prefix === undefined || (/^[0-9]{1,3}$/u.test(prefix) && Number(prefix) <= (version === 4 ? 32 : 128));
    if (version === 0 || address.includes('%') || !isPrefix || more.length > 0) throw refused(`'${host}' is neither an address nor a network: write hosts=192.0.2.7,192.0.2.0/24`);
  }
  return hosts;
}

/** Of all users of one server. */
async function readPasswords(exports: readonly Export[]): Promise<ReadonlyMap<string, string>> {
  const found = new Map<string, string>();
  for (const { clients, options } of exports) {
    const file = options['password-file'] ?? '';
    const lines = new Map((await readSecretLines(file)).map((line) => [line.slice(0, line.indexOf(':')), line.slice(line.indexOf(':') + 1)] as const));
    for (const user of clients) {
      const password = lines.get(user);
      if (password === undefined) throw refused(`${file} has no line '${user}:PASSWORD'`);
      // eslint-disable-next-line no-control-regex
      if (password.length < PASSWORD_CHARACTERS_MIN || /[\u0000-\u001f]/u.test(password)) throw refused(`the password of ${user} in ${file} must have ${PASSWORD_CHARACTERS_MIN} characters at least`);
      if ((found.get(user) ?? password) !== password) throw refused(`${user} has two different passwords: one password file is enough for both exports`);
      found.set(user, password);
    }
  }
  return found;
}

/** smbd opens files as the account of that name. */
async function checkAccounts(users: readonly string[], signal: AbortSignal): Promise<void> {
  for (const user of new Set(users)) {
    const { code, stdout } = await runChild('getent', ['passwd', user], { signal, timeoutMs: CALL_MS });
    if (code !== 0) throw refused(`there is no user ${user} on this host: make one, as whom files are opened ('useradd --no-create-home --shell /usr/sbin/nologin ${user}')`);
    if (stdout.split(':')[2] === '0') throw refused(`${user} is root, who is not let in by SMB`);
  }
}

async function validate(file: string, text: string, signal: AbortSignal): Promise<void> {
  writeWhole(file, text);
  const { code, stderr } = await runChild('testparm', ['--suppress-prompt', file], { signal, timeoutMs: CALL_MS });
  // testparm goes on where a setting is wrong, which would leave out what it was to forbid. What it only warns of (old names, browsing) is well.
  const complaint = stderr.split('\n').find((line) => /unknown parameter|ignoring|invalid|error:/iu.test(line));
  if (code !== 0 || complaint !== undefined) throw new OffshootError('io-error', `Samba does not take its configuration: ${complaint ?? stderr.trim()}`, { file });
}

type Digests = Readonly<Record<string, string>>;

/** Gives what is known of all that Samba knows then. */
async function addUsers(server: ExportProcess, directory: string, text: string, passwords: ReadonlyMap<string, string>, signal: AbortSignal): Promise<Digests> {
  if (server.readConfig() === null) server.writeConfig(text);
  const file = path.join(directory, 'users.json');
  const digests = { ...readDigests(file) };
  for (const [user, password] of passwords) {
    const digest = digests[user];
    if (digest !== undefined && isDigestOf(digest, password)) continue;
    await said('smbpasswd', ['-c', server.configFile, '-s', '-a', user], signal, `${password}\n${password}\n`);
    digests[user] = digestOf(password);
    writeWhole(file, JSON.stringify(digests));
  }
  return digests;
}

async function forgetUsers(server: ExportProcess, directory: string, digests: Digests, passwords: ReadonlyMap<string, string>, signal: AbortSignal): Promise<void> {
  const gone = Object.keys(digests).filter((user) => !passwords.has(user));
  for (const user of gone) await said('smbpasswd', ['-c', server.configFile, '-x', user], signal);
  if (gone.length > 0) writeWhole(path.join(directory, 'users.json'), JSON.stringify(Object.fromEntries(Object.entries(digests).filter(([user]) => passwords.has(user)))));
}

function readDigests(file: string): Digests {
  try {
    return JSON.parse(readFileSync(file, 'utf8')) as Digests;
  } catch {
    // The first time, or not written by us: all passwords are set again.
    return {};
  }
}

/** After the new configuration was read: shares that are gone or another, and users who may not use one any more. */
async function sendAway(server: ExportProcess, before: string, shares: readonly SmbShare[], signal: AbortSignal): Promise<void> {
  const sections = new Map(before.split('\n\n').slice(1).map((section) => [/^\[(.*)\]/u.exec(section)?.[1] ?? '', section.trim()]));
  for (const [name, section] of sections) {
    const share = shares.find((each) => each.name === name);
    if (share === undefined) await smbcontrol(server, ['close-share', name], signal);
    else if (shareLines(share).join('\n') !== section) await smbcontrol(server, [isNarrower(share, section) ? 'close-denied-share' : 'close-share', name], signal);
  }
}

/** Only its users have changed. */
function isNarrower(share: SmbShare, section: string): boolean {
  const without = (text: string): string => text.replace(/^\tvalid users = .*$/mu, '');
  return without(shareLines(share).join('\n')) === without(section);
}

async function smbcontrol(server: ExportProcess, message: readonly string[], signal: AbortSignal): Promise<void> {
  await said('smbcontrol', ['--configfile', server.configFile, 'smbd', ...message], signal);
}

async function said(program: string, args: readonly string[], signal: AbortSignal, input?: string): Promise<ChildResult> {
  const result = await runChild(program, args, { signal, timeoutMs: CALL_MS, ...(input === undefined ? {} : { input }) });
  if (result.code !== 0) throw new OffshootError('io-error', `${program}: ${(result.stderr.trim() === '' ? result.stdout.trim() : result.stderr.trim()).slice(0, 500)}`, { program });
  return result;
}

function refused(message: string): OffshootError { return new OffshootError('invalid-argument', message); }
