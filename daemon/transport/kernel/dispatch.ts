/**
 * One request's bytes in, one reply's bytes out.
 *
 * Main thread. Takes what the I/O workers hand on: everything but the hot path. It finds the operation's row, checks what
 * all rows share, runs it, and turns what it throws into an errno. Promises:
 * - Bad input never throws and never ends anything; it gets an error reply of exactly 16 bytes with all 64 bits of its
 *   `unique`, unless its kind takes no reply or it is too short to have a `unique`.
 * - The message may be reused as soon as `handle` returns, also by operations that answer later.
 * - Crash-only: a fault of the program (anything thrown that is no operating error) is reported through `onFatal` and
 *   not answered, so that the kernel sends the request again to the next server and the guest sees no error. If it was such
 *   a second delivery already, it is answered EIO first, or one request could bring down every server there is.
 * After `onFatal` nothing more is handled or answered.
 */
import { endianness } from 'node:os';
import { Errno, errnoOf, isOperatingError, OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import type { FileSystem } from '../../filesystem/types.js';
import { decodeRequest, errorReply, isMalformed, WireError, type Malformed, type Request } from './codec.js';
import type { ExchangeIntents } from './exchange-intents.js';
import { DEFAULT_SESSION_LIMITS, type SessionLimits, type SessionParameters } from './negotiation.js';
import type { Operation, OperationHost } from './operation.js';
import { operations } from './operations.js';

/** The part of a pino logger that is used here. */
export interface TransportLogger {
  debug(context: object, message: string): void;
  warn(context: object, message: string): void;
}

export interface KernelDispatcherOptions {
  readonly fileSystem: FileSystem;
  /** Writes one whole reply to /dev/fuse before it returns, and ignores that the request is gone (ENOENT). */
  readonly reply: (message: Uint8Array) => void;
  /** Ends the server. Called at most once. */
  readonly onFatal: (error: Error) => void;
  readonly logger: TransportLogger;
  readonly sessionLimits?: SessionLimits;
  /** Keeps what INIT agreed (saveSession); called before INIT is answered. */
  readonly onSession?: (parameters: SessionParameters) => void;
  /** Left out: RENAME_EXCHANGE is refused. */
  readonly exchangeIntents?: ExchangeIntents;
}

export class KernelDispatcher {
  readonly #options: KernelDispatcherOptions;
  readonly #host: OperationHost;
  readonly #unknownOpcodes = new Set<number>();
  #isEnded = false;
  #givenUpFor: Error | null = null;

  constructor(options: KernelDispatcherOptions) {
    if (endianness() !== 'LE') {
      throw new OffshootError('not-supported', 'This machine is big-endian; the kernel transport is for little-endian machines. Use --transport fuse-native.');
    }
    const limits = options.sessionLimits ?? DEFAULT_SESSION_LIMITS;
    this.#options = options;
    this.#host = {
      fileSystem: options.fileSystem,
      limits,
      validity: { entryMs: limits.entryValidMs, attributesMs: limits.attributesValidMs },
      exchanges: options.exchangeIntents ?? null,
      keepSession: (parameters) => options.onSession?.(parameters),
      giveUp: (error) => { this.#givenUpFor = error; },
    };
  }

  /** Handles one request. Never throws. */
  handle(message: Uint8Array): void {
    if (this.#isEnded) return;
    try {
      const decoded = decodeRequest(message);
      if (isMalformed(decoded)) this.#refuseMalformed(decoded);
      else this.#run(decoded);
    } catch (thrown) {
      this.#end(thrown);
    }
  }

  #run(request: Request): void {
    const operation = operations.get(request.opcode);
    if (operation === undefined) {
      this.#warnUnknown(request.opcode);
      this.#reply(errorReply(request.unique, Errno.ENOSYS));
      return;
    }
    if (request.body.byteLength < operation.bodyBytesMin) {
      this.#refuse(operation, request, new WireError(Errno.EINVAL, 'the body is too short'));
      return;
    }
    if (!Number.isSafeInteger(request.nodeId)) {
      this.#refuse(operation, request, new WireError(operation.absent, 'the node cannot exist'));
      return;
    }
    try {
      const answer = operation.run(this.#host, request);
      if (answer === null) return;
      if (answer instanceof Uint8Array) this.#reply(answer);
      else void this.#answerLater(operation, request, answer);
    } catch (thrown) {
      this.#refuse(operation, request, thrown);
    }
  }

  async #answerLater(operation: Operation, request: Request, answer: Promise<Uint8Array>): Promise<void> {
    try {
      let message: Uint8Array;
      try {
        message = await answer;
      } catch (thrown) {
        this.#refuse(operation, request, thrown);
        return;
      }
      this.#reply(message);
    } catch (thrown) {
      this.#end(thrown);
    }
  }

  #refuse(operation: Operation, request: Request, thrown: unknown): void {
    const errno = errnoFor(operation, thrown);
    if (errno === null) {
      if (request.resent && operation.answered) this.#reply(errorReply(request.unique, Errno.EIO));
      throw thrown;
    }
    if (errno === Errno.EIO || thrown instanceof WireError) this.#log(operation, request, errno, thrown);
    if (operation.answered) this.#reply(errorReply(request.unique, errno));
  }

  #refuseMalformed(malformed: Malformed): void {
    const operation = malformed.opcode === null ? undefined : operations.get(malformed.opcode);
    this.#options.logger.warn({ opcode: malformed.opcode, operation: operation?.name }, `malformed FUSE message: ${malformed.reason}`);
    if (malformed.unique === null || operation?.answered === false) return;
    this.#reply(errorReply(malformed.unique, Errno.EIO));
  }

  #reply(message: Uint8Array): void {
    if (this.#isEnded) return;
    this.#options.reply(message);
    if (this.#givenUpFor !== null) this.#end(this.#givenUpFor);
  }

  #end(thrown: unknown): void {
    if (this.#isEnded) return;
    this.#isEnded = true;
    this.#options.onFatal(thrown instanceof Error ? thrown : new Error(`something that is no error was thrown: ${String(thrown)}`));
  }

  /** An I/O error is news; what a caller may ask for in vain is not, unless the kernel itself sent nonsense. */
  #log(operation: Operation, request: Request, errno: number, thrown: unknown): void {
    const context = { operation: operation.name, nodeId: request.nodeId, errno, resent: request.resent, err: thrown };
    const isNews = errno === Errno.EIO || errno === Errno.EINVAL;
    if (isNews) this.#options.logger.warn(context, `${operation.name} failed`);
    else this.#options.logger.debug(context, `${operation.name} refused`);
  }

  #warnUnknown(opcode: number): void {
    if (this.#unknownOpcodes.has(opcode) || this.#unknownOpcodes.size >= UNKNOWN_OPCODES_MAX) return;
    this.#unknownOpcodes.add(opcode);
    this.#options.logger.warn({ opcode }, 'the kernel sent an operation that is not known; it is answered ENOSYS');
  }
}

/** Opcodes that are remembered as reported already. */
const UNKNOWN_OPCODES_MAX = 64;

/** The errno for what an operation threw; null if that is a fault of the program. */
function errnoFor(operation: Operation, thrown: unknown): number | null {
  if (thrown instanceof WireError) return thrown.errno;
  // What a system call said is how the world is, whoever forgot to say it better.
  const error = toOffshootError(thrown);
  if (!isOperatingError(error)) return null;
  if (error.context['enxio'] === true) return Errno.ENXIO;
  if (error.context['readOnly'] === true) return Errno.EROFS;
  // A name or node that is not there is said by those who look for it; the store's own missing file is not the caller's ENOENT.
  if (error !== thrown && error.kind === 'not-found') return Errno.EIO;
  return error.kind === 'not-found' ? operation.absent : errnoOf[error.kind];
}
