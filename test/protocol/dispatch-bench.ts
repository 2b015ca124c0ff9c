/** A dispatcher over a file system in memory, with its replies, its warnings and its end kept for the test to look at. */
import { KernelDispatcher, type KernelDispatcherOptions } from '../../daemon/transport/kernel/dispatch.js';
import type { SessionParameters } from '../../daemon/transport/kernel/negotiation.js';
import { parseReply, request, type Reply, type RequestFields } from './messages.js';
import { ScriptedFileSystem } from './scripted-file-system.js';

export class DispatchBench {
  readonly fileSystem = new ScriptedFileSystem();
  readonly replies: Uint8Array[] = [];
  readonly fatal: Error[] = [];
  readonly warnings: string[] = [];
  readonly sessions: SessionParameters[] = [];
  readonly dispatcher: KernelDispatcher;

  constructor(options: Partial<KernelDispatcherOptions> = {}) {
    this.dispatcher = new KernelDispatcher({
      fileSystem: this.fileSystem,
      reply: (message) => this.replies.push(Uint8Array.from(message)),
      onFatal: (error) => this.fatal.push(error),
      logger: { debug: () => undefined, warn: (_context, message) => this.warnings.push(message) },
      onSession: (parameters) => this.sessions.push(parameters),
      ...options,
    });
  }

  /** Sends a request whose reply must come at once, and gives it. */
  ask(fields: RequestFields): Reply {
    const before = this.replies.length;
    this.dispatcher.handle(request(fields));
    if (this.replies.length !== before + 1) throw new Error(`${this.replies.length - before} replies to one request`);
    return this.lastReply();
  }

  /** Sends a request that may be answered later, and gives the reply. */
  async askLater(fields: RequestFields): Promise<Reply> {
    const before = this.replies.length;
    this.dispatcher.handle(request(fields));
    for (let turn = 0; turn < 20 && this.replies.length === before; turn++) await new Promise(setImmediate);
    if (this.replies.length !== before + 1) throw new Error(`${this.replies.length - before} replies to one request`);
    return this.lastReply();
  }

  lastReply(): Reply {
    const message = this.replies.at(-1);
    if (message === undefined) throw new Error('no reply');
    return parseReply(message);
  }

  /** Makes a file with content directly in the file system; its node id. */
  file(name: string, content = '', parent = 1): bigint {
    const made = this.fileSystem.create(parent, name, 0o644, 0, { uid: 0, gid: 0, pid: 0 });
    this.fileSystem.release(made.open.handle);
    this.fileSystem.released.length = 0;
    this.fileSystem.openFlags.length = 0;
    this.fileSystem.write(made.attributes.nodeId, 0, Buffer.from(content));
    return BigInt(made.attributes.nodeId);
  }

  directory(name: string, parent = 1): bigint {
    return BigInt(this.fileSystem.mkdir(parent, name, 0o755, { uid: 0, gid: 0, pid: 0 }).nodeId);
  }
}
