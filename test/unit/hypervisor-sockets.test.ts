/** QMP and the guest agent's protocol against servers on real unix sockets that say what QEMU says, too much, too little, or nothing. */
import { createServer, type Socket } from 'node:net';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';

import { askGuestAgent } from '../../daemon/hypervisor/qemu/guest-agent.js';
import { LINE_BYTES_MAX, type SocketCall } from '../../daemon/hypervisor/qemu/json-lines.js';
import { stateOf } from '../../daemon/hypervisor/qemu/qemu.js';
import { withQmp } from '../../daemon/hypervisor/qemu/qmp.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const GREETING = '{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}\r\n';
const LONG_MS = 20_000;

interface Request { readonly execute: string; readonly id?: string; readonly arguments?: Readonly<Record<string, unknown>> }

const cleanup = createCleanup();
afterEach(() => cleanup.run());

/** `answer` gets each line that is JSON, and the socket; `greeting` is said at once. */
async function serve(greeting: string, answer: (request: Request, socket: Socket) => void): Promise<SocketCall & { readonly heard: readonly Buffer[] }> {
  const socketPath = join(makeTempDir('qmp', cleanup), 's');
  const sockets: Socket[] = [];
  const heard: Buffer[] = [];
  const server = createServer((socket) => {
    sockets.push(socket);
    socket.on('error', () => undefined);
    socket.write(greeting);
    let rest = '';
    socket.on('data', (chunk) => {
      heard.push(chunk);
      const lines = (rest + chunk.toString('latin1').replaceAll('\xff', '')).split('\n');
      rest = lines.pop()!;
      for (const line of lines) answer(JSON.parse(line) as Request, socket);
    });
  });
  await new Promise<void>((resolve) => { server.listen(socketPath, resolve); });
  cleanup.add(async () => {
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => { server.close(resolve); });
  });
  return { socketPath, ownerUid: process.geteuid!(), timeoutMs: LONG_MS, signal: new AbortController().signal, heard };
}

const say = (socket: Socket, message: object): void => { socket.write(`${JSON.stringify(message)}\r\n`); };

describe('QMP', () => {
  it('negotiates, and finds the answer to its command among events and what it did not ask for', async () => {
    const call = await serve(GREETING, ({ execute, id }, socket) => {
      if (execute !== 'qmp_capabilities') {
        say(socket, { event: 'RESUME', timestamp: {} });
        say(socket, { return: { status: 'of another' }, id: 'somebody-elses' });
      }
      // An answer may come in any number of pieces.
      const text = `${JSON.stringify({ return: execute === 'query-status' ? { status: 'running' } : {}, id })}\r\n{"event": "POWERDOWN"}\n`;
      socket.write(text.slice(0, 9));
      setTimeout(() => socket.write(text.slice(9)), 10);
    });
    await withQmp(call, async (qmp) => {
      expect(await qmp.execute('query-status')).toEqual({ status: 'running' });
      await qmp.waitForEvent('RESUME');
      await qmp.waitForEvent('POWERDOWN');
    });
  });

  it('tells what QEMU refuses, and whether it knows the command', async () => {
    const call = await serve(GREETING, ({ execute, id }, socket) => {
      if (execute === 'qmp_capabilities') say(socket, { return: {}, id });
      else say(socket, { error: { class: execute === 'nonsense' ? 'CommandNotFound' : 'GenericError', desc: 'no, I will not' }, id });
    });
    await expect(withQmp(call, (qmp) => qmp.execute('cont'))).rejects.toMatchObject({ kind: 'io-error', message: 'QEMU refused cont: no, I will not' });
    await expect(withQmp(call, (qmp) => qmp.execute('nonsense'))).rejects.toMatchObject({ kind: 'not-supported' });
  });

  it('does not wait for ever: for the greeting, for an answer, for the end of a line', async () => {
    for (const greeting of ['', GREETING, '{"QMP": '] as const) {
      const call = await serve(greeting, () => undefined);
      await expect(withQmp({ ...call, timeoutMs: 100 }, (qmp) => qmp.execute('query-status'))).rejects.toMatchObject({ kind: 'timed-out' });
    }
  });

  it('gives up by signal, before and while it waits', async () => {
    const call = await serve(GREETING, () => undefined);
    const controller = new AbortController();
    setTimeout(() => { controller.abort(); }, 50);
    await expect(withQmp({ ...call, signal: controller.signal }, (qmp) => qmp.execute('query-status'))).rejects.toMatchObject({ kind: 'cancelled' });
    await expect(withQmp({ ...call, signal: AbortSignal.abort() }, (qmp) => qmp.execute('query-status'))).rejects.toMatchObject({ kind: 'cancelled' });
  });

  it('listens to no more than it keeps', async () => {
    const endless = await serve('x'.repeat(LINE_BYTES_MAX + 1), () => undefined);
    await expect(withQmp(endless, (qmp) => qmp.execute('query-status'))).rejects.toMatchObject({ kind: 'too-large' });
    const many = await serve(`${GREETING}${'{"event": "X"}\n'.repeat(5000)}`, () => undefined);
    await expect(withQmp(many, (qmp) => qmp.execute('query-status'))).rejects.toMatchObject({ kind: 'too-large' });
  });

  it('says what is wrong with the other side: gone, not there, not QEMU', async () => {
    const hangsUp = await serve(GREETING, (_request, socket) => { socket.destroy(); });
    await expect(withQmp(hangsUp, (qmp) => qmp.execute('quit'))).rejects.toMatchObject({ kind: 'io-error' });
    await expect(withQmp({ ...hangsUp, socketPath: `${hangsUp.socketPath}-not` }, (qmp) => qmp.execute('quit'))).rejects.toMatchObject({ kind: 'not-found' });
    const other = await serve('{"hello": 1}\n', () => undefined);
    await expect(withQmp(other, (qmp) => qmp.execute('quit'))).rejects.toMatchObject({ kind: 'io-error' });
    const noise = await serve('220 mail.example ESMTP\n', () => undefined);
    await expect(withQmp(noise, (qmp) => qmp.execute('quit'))).rejects.toMatchObject({ kind: 'io-error' });
  });

  it('says not a word to a process of another user', async () => {
    const call = await serve(GREETING, () => undefined);
    await expect(withQmp({ ...call, ownerUid: call.ownerUid + 1 }, (qmp) => qmp.execute('quit'))).rejects.toMatchObject({ kind: 'not-permitted' });
    expect(call.heard).toEqual([]);
  });

  it('takes what is neither running nor at its end for paused', () => {
    const states = ['running', 'paused', 'io-error', 'inmigrate', 'prelaunch', 'suspended', 'shutdown', 'guest-panicked', 'internal-error'];
    expect(states.map((status) => stateOf({ status }))).toEqual(
      ['running', 'paused', 'paused', 'paused', 'paused', 'paused', 'shut-off', 'crashed', 'crashed']);
    expect(stateOf(null)).toBe('paused');
  });
});

describe('the guest agent', () => {
  it('is synchronised first, over what an earlier client left unread', async () => {
    const call = await serve('ut off"}}\n{"return": 7}\n{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n', ({ execute, arguments: given }, socket) => {
      if (execute !== 'guest-sync-delimited') {
        say(socket, { return: 3 });
        return;
      }
      // The answer to somebody else's synchronisation comes before ours.
      say(socket, { return: Number(given!['id']) + 1 });
      socket.write(Buffer.concat([Buffer.from('{"half": \xff', 'latin1'), Buffer.from(`${JSON.stringify({ return: given!['id'] })}\n`)]));
    });
    expect(await askGuestAgent(call, 'guest-fsfreeze-freeze')).toBe(3);
    expect(Buffer.concat(call.heard)[0]).toBe(0xff);
  });

  it('that does not run is told by its silence, and one that refuses by what it says', async () => {
    const silent = await serve('', () => undefined);
    await expect(askGuestAgent({ ...silent, timeoutMs: 100 }, 'guest-ping')).rejects.toMatchObject({ kind: 'timed-out' });
    const refusing = await serve('', ({ execute, arguments: given }, socket) => {
      if (execute === 'guest-sync-delimited') say(socket, { return: given!['id'] });
      else say(socket, { error: { class: 'CommandNotFound', desc: 'it has been disabled' } });
    });
    await expect(askGuestAgent(refusing, 'guest-fsfreeze-freeze')).rejects.toMatchObject({ kind: 'not-supported', message: /it has been disabled/u });
  });
});
