/**
 * One tgtd of ours, by its control socket: what it shows, and the changes to that, through tgtadm(8). Main thread of the server.
 *
 * tgtd finds its control socket by `TGT_IPC_SOCKET`, so it has nothing to do with the tgtd of the host. Its parameters are lists with commas, so nothing
 * that a user named ever becomes one: the backing store is given as a link of ours, which is named after the export. A password is not given to tgtadm,
 * whose command line everybody may read, but said to the socket directly.
 */
import { connect } from 'node:net';

import { OffshootError } from '../../../blockstore/errors.js';
import { runChild } from '../../programs/child.js';

export interface ShownLun {
  readonly lun: number;
  readonly path: string;
  readonly readOnly: boolean;
}

export interface ShownSession {
  readonly sid: number;
  readonly cids: readonly number[];
  readonly initiator: string;
  readonly addresses: readonly string[];
}

export interface ShownTarget {
  readonly tid: number;
  readonly name: string;
  readonly luns: readonly ShownLun[];
  readonly accounts: readonly string[];
  readonly clients: readonly string[];
  readonly sessions: readonly ShownSession[];
}

const CALL_MS = 20_000;
/** What tgtd has no more room for is cut off silently. */
const PARAMETERS_BYTES_MAX = 900;
const REQUEST_BYTES = 120;
const REQUEST_LLD_BYTES = 64;
const MODE_ACCOUNT = 7;
const OP_NEW = 0;

export class Tgtd {
  /** As `TGT_IPC_SOCKET`; tgtd appends `.0`. */
  readonly #socket: string;

  constructor(socket: string) {
    this.#socket = socket;
  }

  /** tgtadm with these arguments; gives what it said, or throws it. */
  async adm(args: readonly string[], signal: AbortSignal): Promise<string> {
    const result = await runChild('env', [`TGT_IPC_SOCKET=${this.#socket}`, 'tgtadm', '--lld', 'iscsi', ...args], { signal, timeoutMs: CALL_MS });
    if (result.code !== 0) {
      throw new OffshootError('io-error', `tgtadm ${args.join(' ')}: ${result.stderr.trim() === '' ? `exit code ${result.code ?? 'none'}` : result.stderr.trim()}`, { program: 'tgtadm' });
    }
    return result.stdout;
  }

  async targets(signal: AbortSignal): Promise<readonly ShownTarget[]> {
    const targets = parseTargets(await this.adm(['--op', 'show', '--mode', 'target'], signal));
    // A client may have written one more; tgtd knows no connections of a target that it has not. Without a client nobody has written anything.
    if (targets.some(({ sessions }) => sessions.length > 0)) {
      for (const { tid } of targets) await this.adm(['--op', 'show', '--mode', 'conn', '--tid', String(tid)], signal).catch((thrown: unknown) => { throw forged(`target ${tid}`, thrown); });
    }
    return targets;
  }

  /** It listens: a tgtd that could not have its port runs on without one. */
  async hasPortal(signal: AbortSignal): Promise<boolean> {
    return (await this.adm(['--op', 'show', '--mode', 'portal'], signal)).startsWith('Portal:');
  }

  /** Looked at afterwards: what is said to the socket is no interface that tgt promises. */
  async addAccount(user: string, password: string, signal: AbortSignal): Promise<void> {
    const code = await sendRequest(`${this.#socket}.0`, accountRequest(user, password));
    const accounts = (await this.adm(['--op', 'show', '--mode', 'account'], signal)).split('\n').map((line) => line.trim());
    if (code !== 0 || !accounts.includes(user)) throw new OffshootError('io-error', `tgtd does not take the account ${user}: error ${code}`, { user });
  }
}

/** In this order, each once. */
const PARTS = ['System information', 'I_T nexus information', 'LUN information', 'Account information', 'ACL information'];

/**
 * What `tgtadm --op show --mode target` says, which is indented by fours. A client chooses its alias, which may have lines of its own. They come before all that the target
 * itself has, so what they pretend is there twice, or not in its order: then nothing of it is believed.
 */
export function parseTargets(text: string): readonly ShownTarget[] {
  const targets: { tid: number; name: string; luns: ShownLun[]; accounts: string[]; clients: string[]; sessions: { sid: number; cids: number[]; initiator: string; addresses: string[] }[] }[] = [];
  let part = '';
  for (const line of text.split('\n')) {
    const target = /^Target (\d+): (.*)$/u.exec(line);
    if (target !== null) {
      if (targets.some(({ tid, name }) => tid === Number(target[1]) || name === target[2])) throw forged(line);
      targets.push({ tid: Number(target[1]), name: target[2]!, luns: [], accounts: [], clients: [], sessions: [] });
      part = '';
      continue;
    }
    const current = targets.at(-1);
    if (current === undefined) continue;
    const heading = /^ {4}(\S.*):$/u.exec(line);
    if (heading !== null) {
      if (PARTS.indexOf(heading[1]!) <= PARTS.indexOf(part)) throw forged(line.trim());
      part = heading[1]!;
      continue;
    }
    const [, label = '', value = ''] = /^ +([^:]+): ?(.*)$/u.exec(line) ?? [];
    if (part === 'LUN information') {
      if (label === 'LUN' && current.luns.some(({ lun }) => lun === Number(value))) throw forged(line.trim());
      if (label === 'LUN') current.luns.push({ lun: Number(value), path: '', readOnly: false });
      const lun = current.luns.at(-1);
      if (lun !== undefined && label === 'Readonly') current.luns[current.luns.length - 1] = { ...lun, readOnly: value === 'Yes' };
      if (lun !== undefined && label === 'Backing store path') current.luns[current.luns.length - 1] = { ...lun, path: value };
    } else if (part === 'I_T nexus information') {
      const session = current.sessions.at(-1);
      if (label === 'I_T nexus' && current.sessions.some(({ sid }) => sid === Number(value))) throw forged(line.trim());
      if (label === 'I_T nexus') current.sessions.push({ sid: Number(value), cids: [], initiator: '', addresses: [] });
      else if (label === 'Initiator' && session !== undefined) session.initiator = value.replace(/ alias: .*$/u, '');
      else if (label === 'Connection') session?.cids.push(Number(value));
      else if (label === 'IP Address') session?.addresses.push(value);
    } else if (part === 'Account information' && line.trim() !== '') {
      current.accounts.push(line.trim());
    } else if (part === 'ACL information' && line.trim() !== '') {
      current.clients.push(line.trim());
    }
  }
  return targets;
}

function forged(what: string, cause?: unknown): OffshootError {
  return new OffshootError('io-error', `what tgtd shows is not its own alone (${what.slice(0, 100)}): a client may have an alias with lines in it; look at tgtadm --op show --mode target, and disconnect it`, { program: 'tgtadm' }, cause);
}

/**
 * The request of tgtadm (`struct tgtadm_req`, and its parameters behind it), in the order of this machine: mode and operation as 32 bits, the driver's name in
 * 64 bytes, the whole length at 72, no target at 76, no logical unit at 88, and numbers that an account has no use for.
 */
export function accountRequest(user: string, password: string): Buffer {
  const parameters = Buffer.from(`user=${user},password=${password}\0`, 'latin1');
  if (parameters.length > PARAMETERS_BYTES_MAX) throw new OffshootError('invalid-argument', 'the name and the password of the account are too long for tgtd', { user });
  const request = Buffer.alloc(REQUEST_BYTES + parameters.length);
  request.writeUInt32LE(MODE_ACCOUNT, 0);
  request.writeUInt32LE(OP_NEW, 4);
  request.write('iscsi', 8, REQUEST_LLD_BYTES, 'latin1');
  request.writeUInt32LE(request.length, 72);
  request.writeInt32LE(-1, 76);
  request.writeBigInt64LE(-1n, 88);
  parameters.copy(request, REQUEST_BYTES);
  return request;
}

async function sendRequest(path: string, request: Buffer): Promise<number> {
  return await new Promise((resolve, reject) => {
    const socket = connect({ path, timeout: CALL_MS });
    const chunks: Buffer[] = [];
    const fail = (why: string, cause?: unknown): void => {
      socket.destroy();
      reject(new OffshootError('io-error', `tgtd does not answer: ${why}`, { path }, cause));
    };
    socket.once('connect', () => { socket.write(request); });
    socket.once('error', (error) => { fail(error.message, error); });
    socket.once('timeout', () => { fail('too slow'); });
    socket.on('data', (chunk: Buffer) => { chunks.push(chunk); });
    socket.once('close', () => {
      const answer = Buffer.concat(chunks);
      if (answer.length < 8) fail('it closed the connection');
      else resolve(answer.readUInt32LE(0));
    });
  });
}
