/**
 * What an operation is: one row of the opcode table.
 *
 * A row translates one kind of request into a call of the file system and the result into a reply. It runs in the main
 * thread, reads the message only before it returns (what comes later keeps no view of it), and throws WireError or
 * OffshootError for what must become an errno; anything else that it throws is a fault of the program. Whether it is
 * answered at all, how long its body must be, and what «no such node» means to its caller are data in the row, checked
 * and applied in one place, the dispatcher.
 */
import type { FileSystem, OpenResult } from '../../filesystem/types.js';
import type { Request, Validity } from './codec.js';
import type { ExchangeIntents } from './exchange-intents.js';
import type { SessionLimits, SessionParameters } from './negotiation.js';
import { OpenFlag } from './protocol.js';

/** What rows may use. */
export interface OperationHost {
  readonly fileSystem: FileSystem;
  readonly limits: SessionLimits;
  readonly validity: Validity;
  /** Null: names are not exchanged (EINVAL), because an exchange could not be told from one done twice. */
  readonly exchanges: ExchangeIntents | null;
  /** Keeps what INIT agreed; called before INIT is answered. */
  keepSession(parameters: SessionParameters): void;
  /** Ends the server after the reply at hand: no session is possible. */
  giveUp(error: Error): void;
}

/** The whole reply message; later for operations that wait; null for none. */
export type Answer = Uint8Array | Promise<Uint8Array> | null;

export interface Operation {
  readonly opcode: number;
  readonly name: string;
  /** A shorter body is EINVAL. */
  readonly bodyBytesMin: number;
  /** False: the kernel expects no reply, not even an error. */
  readonly answered: boolean;
  /**
   * The errno of `not-found`. ENOENT where the request names an entry of a directory. ESTALE where it gives a node id that
   * the kernel remembered: a path walk then begins anew and asks for the names again, so that a disk that was removed
   * through the control API, and perhaps made again under its old name, is not mistaken for the one in the cache.
   */
  readonly absent: number;
  readonly run: (host: OperationHost, request: Request) => Answer;
}

/**
 * What OPEN answers. Disks are direct: one cache (the store's) and parallel writes. Ordinary files are cached, and keep
 * their cache from open to open, since all that changes their content goes through this mount or is announced; but not over
 * what puts an older content in its place.
 * Neither wants FLUSH at close: it would say nothing, and a killed hypervisor could not exit while no server runs,
 * because the kernel sends FLUSH so that it cannot be interrupted.
 */
export function openFlagsFor({ mode, dropsPages }: Pick<OpenResult, 'mode' | 'dropsPages'>): number {
  if (mode === 'direct') return OpenFlag.DIRECT_IO | OpenFlag.PARALLEL_DIRECT_WRITES | OpenFlag.NOFLUSH;
  return dropsPages === true ? OpenFlag.NOFLUSH : OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH;
}
