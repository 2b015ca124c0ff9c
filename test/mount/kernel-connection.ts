/**
 * A FUSE connection served from the test's own process: a dispatcher over a file system in memory, fed by asynchronous reads.
 *
 * Whoever uses the mount must be another process. A server's death is played by keeping requests back: the kernel cannot
 * tell a server that has died from one that does not answer, as long as somebody keeps the descriptor.
 */
import { chmodSync, closeSync, mkdirSync, mkdtempSync, read, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { KernelDispatcher, type KernelDispatcherOptions } from '../../daemon/transport/kernel/dispatch.js';
import { mountFuse, openFuseDevice } from '../../daemon/transport/kernel/mount.js';
import type { SessionParameters } from '../../daemon/transport/kernel/negotiation.js';
import { ScriptedFileSystem } from '../protocol/scripted-file-system.js';
import { removeMount } from '../support/model/mounts.js';

const BUFFER_BYTES = 1024 * 1024 + 4096;

export interface SeenRequest {
  readonly opcode: number;
  readonly resent: boolean;
}

export class KernelConnection {
  readonly scratch = mkdtempSync(join(tmpdir(), 'offshoot-kernel-'));
  readonly mountDir = join(this.scratch, 'mount');
  readonly fileSystem = new ScriptedFileSystem();
  readonly descriptor = openFuseDevice();
  readonly seen: SeenRequest[] = [];
  readonly fatal: Error[] = [];
  readonly sessions: SessionParameters[] = [];
  readonly kept: Buffer[] = [];
  /** Requests for which this says true are read and not answered. */
  keepBack: (opcode: number) => boolean = () => false;
  /** Errors that the kernel gave to a reply. */
  readonly replyErrors: string[] = [];
  #ended: Promise<string> = Promise.resolve('never mounted');
  #isClosed = false;

  constructor() {
    // Ordinary users come by as well.
    chmodSync(this.scratch, 0o755);
    mkdirSync(this.mountDir);
  }

  mount(): void {
    mountFuse(this.descriptor, this.mountDir);
  }

  /** Reads until the mount is gone. */
  serve(options: Partial<KernelDispatcherOptions> = {}): void {
    const dispatcher = this.newDispatcher(options);
    this.#ended = this.#readAll(dispatcher);
  }

  newDispatcher(options: Partial<KernelDispatcherOptions> = {}): KernelDispatcher {
    return new KernelDispatcher({
      fileSystem: this.fileSystem,
      reply: (message) => { this.write(message); },
      onFatal: (error) => this.fatal.push(error),
      logger: { debug: () => undefined, warn: () => undefined },
      onSession: (parameters) => this.sessions.push(parameters),
      ...options,
    });
  }

  write(message: Uint8Array): void {
    try {
      writeSync(this.descriptor, message);
    } catch (thrown) {
      this.replyErrors.push(String((thrown as { readonly code?: unknown }).code));
    }
  }

  opcodes(): number[] {
    return this.seen.map((request) => request.opcode);
  }

  /** What the read that found the mount gone was told. */
  ended(): Promise<string> {
    return this.#ended;
  }

  closeDescriptor(): void {
    if (!this.#isClosed) closeSync(this.descriptor);
    this.#isClosed = true;
  }

  async close(): Promise<void> {
    await removeMount(this.mountDir);
    await this.#ended;
    this.closeDescriptor();
    rmSync(this.scratch, { recursive: true, force: true });
  }

  async #readAll(dispatcher: KernelDispatcher): Promise<string> {
    const buffer = Buffer.alloc(BUFFER_BYTES);
    for (;;) {
      const outcome = await new Promise<number | string>((resolve) => {
        read(this.descriptor, buffer, 0, buffer.byteLength, null, (error, bytes) => { resolve(error === null ? bytes : error.code ?? 'unknown'); });
      });
      if (outcome === 'ENODEV' || outcome === 'ECONNABORTED' || outcome === 'EPERM') return outcome;
      if (typeof outcome === 'string') continue;
      const opcode = buffer.readUInt32LE(4);
      this.seen.push({ opcode, resent: ((buffer[15] ?? 0) & 0x80) !== 0 });
      if (this.keepBack(opcode)) this.kept.push(Buffer.from(buffer.subarray(0, outcome)));
      else dispatcher.handle(buffer.subarray(0, outcome));
    }
  }
}
