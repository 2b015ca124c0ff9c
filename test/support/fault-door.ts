/**
 * A door with a decision in front of it: fails, shortens, delays or counts exactly the system calls that it chooses.
 *
 * The same interface above and below, so it stands wherever a door stands, and nothing behind it knows. `decide` sees
 * each call before it is made: what it does itself (count, wait, run somebody else's step in between) happens before the
 * call, and what it returns says what becomes of the call. For tests and drills; allocates an object a call, which the
 * doors that serve guests do not. Worker-safe.
 */
import type { Door } from '../../blockstore/hot/door.js';

/** A system call that is about to be made. What a call does not have is 0. */
export interface DoorCall {
  readonly operation: keyof Door;
  /** Names the call site. */
  readonly label: string;
  readonly fd: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

export type Fault =
  /** The call is not made; its result is this errno (given positive). */
  | { readonly kind: 'fail'; readonly errno: number }
  /** A read or write is made with at most this many bytes. */
  | { readonly kind: 'shorten'; readonly lengthBytes: number }
  /** The call is made, and this runs before its caller goes on. */
  | { readonly kind: 'then'; readonly run: (result: number) => void };

/** What becomes of the call; undefined: nothing special. */
export type Decide = (call: DoorCall) => Fault | undefined;

export function faultDoor(inner: Door, decide: Decide): Door {
  const through = (call: DoorCall, make: (lengthBytes: number) => number): number => {
    const fault = decide(call);
    if (fault?.kind === 'fail') return -fault.errno;
    const result = make(fault?.kind === 'shorten' ? Math.min(fault.lengthBytes, call.lengthBytes) : call.lengthBytes);
    if (fault?.kind === 'then') fault.run(result);
    return result;
  };
  return {
    pread: (label, fd, address, lengthBytes, offsetBytes) =>
      through({ operation: 'pread', label, fd, offsetBytes, lengthBytes }, (length) => inner.pread(label, fd, address, length, offsetBytes)),
    pwrite: (label, fd, address, lengthBytes, offsetBytes) =>
      through({ operation: 'pwrite', label, fd, offsetBytes, lengthBytes }, (length) => inner.pwrite(label, fd, address, length, offsetBytes)),
    read: (label, fd, address, lengthBytes) =>
      through({ operation: 'read', label, fd, offsetBytes: 0, lengthBytes }, (length) => inner.read(label, fd, address, length)),
    write: (label, fd, address, lengthBytes) =>
      through({ operation: 'write', label, fd, offsetBytes: 0, lengthBytes }, (length) => inner.write(label, fd, address, length)),
    fallocate: (label, fd, mode, offsetBytes, lengthBytes) =>
      through({ operation: 'fallocate', label, fd, offsetBytes, lengthBytes }, () => inner.fallocate(label, fd, mode, offsetBytes, lengthBytes)),
    seek: (label, fd, offsetBytes, whence) =>
      through({ operation: 'seek', label, fd, offsetBytes, lengthBytes: 0 }, () => inner.seek(label, fd, offsetBytes, whence)),
    fdatasync: (label, fd) =>
      through({ operation: 'fdatasync', label, fd, offsetBytes: 0, lengthBytes: 0 }, () => inner.fdatasync(label, fd)),
  };
}
