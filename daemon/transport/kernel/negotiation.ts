/**
 * INIT: what the kernel offers and what Offshoot takes.
 *
 * A pure function from the request's bytes to the reply's payload and the SessionParameters that a restarted server must
 * know, because the kernel sends INIT once in the life of a mount. Which flag is taken, which is left, and why, is in
 * PROTOCOL.md; the list below is that table's column «taken». Only what the kernel offered is echoed.
 */
import { Errno, OffshootError } from '../../../blockstore/errors.js';
import { viewOf } from './codec.js';
import { FUSE_MAJOR, FUSE_MINOR, FUSE_MINOR_MIN, InitBit, InitIn, InitOut } from './protocol.js';

/** What this daemon allows in a session. One set per mount; the defaults suit disks. */
export interface SessionLimits {
  /** Largest WRITE payload. */
  readonly writeBytesMax: number;
  /** Largest READ; equal to the mount option max_read. */
  readonly readBytesMax: number;
  /** Background requests (asynchronous direct I/O is that) in flight: the depth that all guests share. */
  readonly backgroundMax: number;
  /** From here on the kernel calls the mount congested. */
  readonly congestionThreshold: number;
  /** True lets NFS servers make handles of nodes; false shuts open_by_handle_at. Decided once per mount. */
  readonly exportSupport: boolean;
  /** How long a name may be believed without asking. */
  readonly entryValidMs: number;
  /** How long attributes may be believed without asking. */
  readonly attributesValidMs: number;
}

export const DEFAULT_SESSION_LIMITS: SessionLimits = {
  writeBytesMax: 1024 * 1024,
  readBytesMax: 1024 * 1024,
  backgroundMax: 512,
  congestionThreshold: 384,
  exportSupport: false,
  entryValidMs: 1000,
  attributesValidMs: 1000,
};

/** What was agreed. Kept in session.json for the servers that come after. */
export interface SessionParameters {
  readonly kernelMinor: number;
  /** The version spoken: the lower of the kernel's and ours. */
  readonly minor: number;
  /** INIT flag bits 0 to 31 that were taken. */
  readonly flags: number;
  /** INIT flag bits 32 to 63 that were taken, as a 32-bit number. */
  readonly flags2: number;
  readonly readaheadBytesMax: number;
  readonly writeBytesMax: number;
  readonly readBytesMax: number;
  readonly pagesMax: number;
  readonly backgroundMax: number;
  readonly congestionThreshold: number;
  readonly timeGranularityNs: number;
  /** True if OPEN may be answered with a backing file. */
  readonly passthrough: boolean;
  readonly exportSupport: boolean;
}

export type Negotiation =
  /** Agreed: send the payload, keep the parameters. */
  | { readonly outcome: 'agreed'; readonly payload: Uint8Array; readonly parameters: SessionParameters }
  /** The kernel's major version is newer: it is told ours, and sends INIT again in that version. */
  | { readonly outcome: 'asked-again'; readonly payload: Uint8Array }
  /** No session is possible: the kernel gets the errno, people get the error. */
  | { readonly outcome: 'refused'; readonly errno: number; readonly error: OffshootError };

/** Taken whenever offered. */
const BITS_TAKEN: readonly number[] = [
  InitBit.ASYNC_READ, InitBit.BIG_WRITES, InitBit.AUTO_INVAL_DATA, InitBit.DO_READDIRPLUS, InitBit.READDIRPLUS_AUTO,
  InitBit.ASYNC_DIO, InitBit.PARALLEL_DIROPS, InitBit.ABORT_ERROR, InitBit.MAX_PAGES, InitBit.HANDLE_KILLPRIV_V2,
  InitBit.INIT_EXT, InitBit.PASSTHROUGH, InitBit.HAS_RESEND,
];
/** The kernel counts pages of its own size; this many of the smallest make the largest request. */
const PAGE_BYTES_MIN = 4096;
/** Times are kept in microseconds. */
const TIME_GRANULARITY_NS = 1000;
/** A backing file may lie on an ordinary file system, not on a stacked one. */
const STACK_DEPTH_MAX = 1;

/** `body` is INIT's body, without the header. It has at least 16 bytes. */
export function negotiate(body: Uint8Array, limits: SessionLimits): Negotiation {
  const request = viewOf(body);
  const kernelMajor = request.getUint32(InitIn.major, true);
  const kernelMinor = request.getUint32(InitIn.minor, true);
  const readaheadBytesMax = request.getUint32(InitIn.maxReadahead, true);
  if (kernelMajor > FUSE_MAJOR) return { outcome: 'asked-again', payload: versionPayload() };

  const offered = [request.getUint32(InitIn.flags, true), body.byteLength >= InitIn.bytes ? request.getUint32(InitIn.flags2, true) : 0] as const;
  const isOffered = (bit: number): boolean => hasBit(offered[bit < 32 ? 0 : 1], bit % 32);
  if (kernelMajor < FUSE_MAJOR || kernelMinor < FUSE_MINOR_MIN || !isOffered(InitBit.HAS_RESEND) || !isOffered(InitBit.INIT_EXT)) {
    return {
      outcome: 'refused',
      errno: Errno.EIO,
      error: new OffshootError(
        'not-supported',
        `This kernel speaks FUSE ${kernelMajor}.${kernelMinor}${kernelMinor >= FUSE_MINOR_MIN ? ' without RESEND' : ''}; the kernel transport needs ` +
          `${FUSE_MAJOR}.${FUSE_MINOR_MIN} with RESEND, which is Linux 6.9 or newer. Boot a newer kernel, or start the daemon with --transport fuse-native.`,
        { kernelMajor, kernelMinor },
      ),
    };
  }

  const taken = [...BITS_TAKEN, limits.exportSupport ? InitBit.EXPORT_SUPPORT : InitBit.NO_EXPORT_SUPPORT].filter(isOffered);
  const wordOf = (bits: readonly number[]): number => bits.reduce((word, bit) => word + 2 ** (bit % 32), 0);
  const parameters: SessionParameters = {
    kernelMinor,
    minor: Math.min(kernelMinor, FUSE_MINOR),
    flags: wordOf(taken.filter((bit) => bit < 32)),
    flags2: wordOf(taken.filter((bit) => bit >= 32)),
    readaheadBytesMax,
    writeBytesMax: limits.writeBytesMax,
    readBytesMax: limits.readBytesMax,
    pagesMax: Math.ceil(Math.max(limits.writeBytesMax, limits.readBytesMax) / PAGE_BYTES_MIN),
    backgroundMax: limits.backgroundMax,
    congestionThreshold: limits.congestionThreshold,
    timeGranularityNs: TIME_GRANULARITY_NS,
    passthrough: taken.includes(InitBit.PASSTHROUGH),
    exportSupport: taken.includes(InitBit.EXPORT_SUPPORT),
  };
  return { outcome: 'agreed', payload: agreedPayload(parameters), parameters };
}

/** True if INIT flag `bit` (0 to 63) was taken. */
export function isTaken(parameters: SessionParameters, bit: number): boolean {
  return hasBit(bit < 32 ? parameters.flags : parameters.flags2, bit % 32);
}

/** Bit `bit` (0 to 31) of an unsigned 32-bit number; by division, so that bit 31 is not a sign. */
function hasBit(word: number, bit: number): boolean {
  return Math.floor(word / 2 ** bit) % 2 === 1;
}

function versionPayload(): Uint8Array {
  const payload = new Uint8Array(InitOut.bytes);
  const view = viewOf(payload);
  view.setUint32(InitOut.major, FUSE_MAJOR, true);
  view.setUint32(InitOut.minor, FUSE_MINOR, true);
  return payload;
}

function agreedPayload(parameters: SessionParameters): Uint8Array {
  const payload = versionPayload();
  const view = viewOf(payload);
  view.setUint32(InitOut.minor, parameters.minor, true);
  view.setUint32(InitOut.maxReadahead, parameters.readaheadBytesMax, true);
  view.setUint32(InitOut.flags, parameters.flags, true);
  view.setUint32(InitOut.flags2, parameters.flags2, true);
  view.setUint16(InitOut.maxBackground, parameters.backgroundMax, true);
  view.setUint16(InitOut.congestionThreshold, parameters.congestionThreshold, true);
  view.setUint32(InitOut.maxWrite, parameters.writeBytesMax, true);
  view.setUint32(InitOut.timeGranularity, parameters.timeGranularityNs, true);
  view.setUint16(InitOut.maxPages, parameters.pagesMax, true);
  view.setUint32(InitOut.maxStackDepth, parameters.passthrough ? STACK_DEPTH_MAX : 0, true);
  return payload;
}
