/**
 * A small service manager: receives what sd_notify(3) sends, keeps descriptors as systemd's store does, and starts a service with them.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { closeSync } from 'node:fs';
import koffi from 'koffi';

import { waitUntil } from './processes.js';
import type { Cleanup } from './temp.js';

const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x40000000;
const BODY_BYTES = 4096;

const libc = koffi.load('libc.so.6');
const sysSocket = libc.func('int socket(int domain, int type, int protocol)') as unknown as (domain: number, type: number, protocol: number) => number;
const sysBind = libc.func('int bind(int socket, const void *address, unsigned int length)') as unknown as (socket: number, address: Buffer, length: number) => number;
const sysReceive = libc.func('long recvmsg(int socket, void *header, int flags)') as unknown as (socket: number, header: Buffer, flags: number) => number;

export class FakeServiceManager {
  readonly #socket: number;
  readonly #socketPath: string;
  readonly #messages: string[] = [];
  readonly #stored = new Map<string, number>();

  constructor(socketPath: string, cleanup: Cleanup) {
    this.#socketPath = socketPath;
    // AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC
    this.#socket = sysSocket(1, 2 | 0o2000000, 0);
    const address = Buffer.concat([Buffer.from([1, 0]), Buffer.from(`${socketPath}\0`)]);
    if (sysBind(this.#socket, address, address.length) !== 0) throw new Error(`bind failed with errno ${koffi.errno()}`);
    cleanup.add(() => {
      this.#receiveAll();
      for (const fd of this.#stored.values()) closeSync(fd);
      closeSync(this.#socket);
    });
  }

  /** Everything that was said so far, a line each. */
  lines(): readonly string[] {
    this.#receiveAll();
    return this.#messages.flatMap((message) => message.split('\n'));
  }

  storedNames(): readonly string[] {
    this.#receiveAll();
    return [...this.#stored.keys()];
  }

  async waitFor(line: string, count: number, timeoutMs: number): Promise<void> {
    const came = await waitUntil(() => this.lines().filter((each) => each === line).length >= count, timeoutMs);
    if (!came) throw new Error(`'${line}' was not said ${count} times within ${timeoutMs} ms, only:\n${this.lines().join('\n')}`);
  }

  /** As a service of Type=notify, with everything that is stored. */
  start(program: string, args: readonly string[], environment: Readonly<Record<string, string>>): ChildProcess {
    const stored = [...this.#stored];
    return spawn('sh', ['-c', 'LISTEN_PID=$$ exec "$0" "$@"', program, ...args], {
      env: {
        ...process.env, ...environment, NOTIFY_SOCKET: this.#socketPath,
        ...(stored.length === 0 ? {} : { LISTEN_FDS: String(stored.length), LISTEN_FDNAMES: stored.map(([name]) => name).join(':') }),
      },
      stdio: ['ignore', 'ignore', 'pipe', ...stored.map(([, fd]) => fd)],
    });
  }

  #receiveAll(): void {
    for (let message = this.#receive(); message !== null; message = this.#receive()) {
      this.#messages.push(message.text);
      const lines = message.text.split('\n');
      const name = lines.find((line) => line.startsWith('FDNAME='))?.slice('FDNAME='.length) ?? 'stored';
      if (lines.includes('FDSTORE=1') && message.fd !== null) this.#stored.set(name, message.fd);
      const dropped = this.#stored.get(name);
      if (lines.includes('FDSTOREREMOVE=1') && dropped !== undefined) {
        closeSync(dropped);
        this.#stored.delete(name);
      }
    }
  }

  #receive(): { readonly text: string; readonly fd: number | null } | null {
    const body = Buffer.alloc(BODY_BYTES);
    const control = Buffer.alloc(24);
    const vector = Buffer.alloc(16);
    vector.writeBigUInt64LE(koffi.address(body), 0);
    vector.writeBigUInt64LE(BigInt(body.length), 8);
    const header = Buffer.alloc(56);
    header.writeBigUInt64LE(koffi.address(vector), 16);
    header.writeBigUInt64LE(1n, 24);
    header.writeBigUInt64LE(koffi.address(control), 32);
    header.writeBigUInt64LE(BigInt(control.length), 40);
    const bytes = sysReceive(this.#socket, header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (bytes < 0) return null;
    const hasDescriptor = header.readBigUInt64LE(40) > 0n && control.readInt32LE(8) === 1 && control.readInt32LE(12) === 1;
    return { text: body.toString('utf8', 0, bytes), fd: hasDescriptor ? control.readInt32LE(16) : null };
  }
}
