/** Where the control socket may lie, and what is done with what lies there already. */
import { chmodSync, existsSync, lstatSync, mkdirSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { connect, createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createControlClient } from '../../daemon/control/client.js';
import { startControlServer, type ControlServer } from '../../daemon/control/server.js';
import { checkSocketPath, claimSocketPath } from '../../daemon/control/socket-path.js';
import { makeDirectory, recordingLogger } from '../support/control-fixture.js';
import { MemoryService } from '../support/control-memory-service.js';

let directory: ReturnType<typeof makeDirectory>;
const servers: (Server | ControlServer)[] = [];

beforeEach(() => { directory = makeDirectory(); });
afterEach(async () => {
  for (const server of servers.splice(0)) {
    if ('socketPath' in server) await server.close();
    else await new Promise<void>((resolve) => { server.close(() => { resolve(); }); });
  }
  directory.remove();
});

async function start(socketPath: string): Promise<ControlServer> {
  const server = await startControlServer({ service: new MemoryService(), socketPath, version: '1', logger: recordingLogger([]), onInternalError: () => undefined });
  servers.push(server);
  return server;
}

async function listenAt(path: string): Promise<Server> {
  const server = createServer();
  await new Promise<void>((resolve) => { server.listen(path, resolve); });
  return server;
}

/** Leaves the socket file behind, as a killed server does. */
async function staleSocket(path: string): Promise<void> {
  const server = await listenAt(path);
  renameSync(path, `${path}.kept`);
  await new Promise<void>((resolve) => { server.close(() => { resolve(); }); });
  renameSync(`${path}.kept`, path);
}

/** A path of exactly so many bytes in the directory. */
function pathOfBytes(bytes: number): string {
  return `${directory.path}/${'s'.repeat(bytes - Buffer.byteLength(directory.path) - 1)}`;
}

describe('the path', () => {
  it('may have 107 bytes and serves then; 108 are refused with a clear message', async () => {
    const longest = pathOfBytes(107);
    await start(longest);
    expect((await createControlClient({ socketPath: longest }).status()).version).toBe('1.2.3');
    expect(() => checkSocketPath(pathOfBytes(108))).toThrow(/^the path of the control socket has 108 bytes, 107 are the most that Linux allows: give a shorter one with --socket or OFFSHOOT_SOCKET \(/u);
  });

  it('is counted in bytes, not characters', () => {
    expect(() => checkSocketPath(`/run/${'ü'.repeat(52)}`)).toThrow(/has 109 bytes/u);
  });

  it('is neither empty, nor with a NUL, nor a directory', () => {
    expect(() => checkSocketPath('')).toThrow(/empty/u);
    expect(() => checkSocketPath('/run/a\0b')).toThrow(/NUL/u);
    expect(() => checkSocketPath('/run/')).toThrow(/ends with '\/': name the socket itself/u);
  });
});

describe('what lies there', () => {
  it('gets a private directory when there is none', async () => {
    await start(join(directory.path, 'run', 'offshoot', 'o.sock'));
    expect(statSync(join(directory.path, 'run', 'offshoot')).mode & 0o777).toBe(0o700);
  });

  it('is replaced when it is the socket of a dead daemon', async () => {
    const path = join(directory.path, 'o.sock');
    await staleSocket(path);
    await staleSocket(join(directory.path, 'o.soc~'));
    await start(path);
    expect((await createControlClient({ socketPath: path }).status()).version).toBe('1.2.3');
    expect(existsSync(join(directory.path, 'o.soc~'))).toBe(false);
  });

  it('is left alone when another daemon answers', async () => {
    const path = join(directory.path, 'o.sock');
    await start(path);
    const inode = lstatSync(path).ino;
    await expect(start(path)).rejects.toMatchObject({ kind: 'in-use', message: expect.stringMatching(/^another daemon answers on .*: stop it \(offshoot daemon stop --socket /u) as string });
    expect(lstatSync(path).ino).toBe(inode);
    expect((await createControlClient({ socketPath: path }).status()).version).toBe('1.2.3');
  });

  it('is left alone when it is no socket', async () => {
    const path = join(directory.path, 'o.sock');
    writeFileSync(path, 'precious');
    await expect(start(path)).rejects.toMatchObject({ kind: 'already-exists' });
    expect(readFileSync(path, 'utf8')).toBe('precious');
    const folder = join(directory.path, 'd');
    mkdirSync(folder);
    await expect(start(folder)).rejects.toMatchObject({ kind: 'already-exists' });
  });

  it('is not taken away by a server that is closed after another took its place', async () => {
    const path = join(directory.path, 'o.sock');
    const first = await claimSocketPath(path);
    servers.push(await listenAt(first.bindPath));
    first.publish();
    renameSync(path, `${path}.old`);
    const second = await claimSocketPath(path);
    servers.push(await listenAt(second.bindPath));
    second.publish();
    first.withdraw();
    expect(existsSync(path)).toBe(true);
    second.withdraw();
    expect(existsSync(path)).toBe(false);
  });

  it('is never open to others, whatever the umask', async () => {
    const path = join(directory.path, 'o.sock');
    const place = await claimSocketPath(path);
    servers.push(await listenAt(place.bindPath));
    chmodSync(place.bindPath, 0o777);
    expect(existsSync(path)).toBe(false);
    place.publish();
    expect(lstatSync(path).mode & 0o777).toBe(0o600);
    await new Promise<void>((resolve, reject) => {
      const socket = connect({ path }, () => { socket.destroy(); resolve(); });
      socket.on('error', reject);
    });
  });
});
