/**
 * Which names there may be. Pure functions; the same rules for what comes through the mount and through the control
 * API, so that no name exists that one of them could not reach.
 *
 * A name is 1 to 255 bytes of UTF-8 without `/` and control characters: a newline in a name breaks every line-based
 * list, and nothing that a hypervisor stores needs one. Some names are kept back for the views that Offshoot shows at the
 * top of a container.
 */
import { OffshootError } from '../../blockstore/errors.js';

export const NAME_BYTES_MAX = 255;
/** PATH_MAX without its NUL: what Linux takes for a symlink's target. */
export const LINK_TARGET_BYTES_MAX = 4095;

/** Directly below these lies: the containers; what is at the top of a container; everything else. */
export type Place = 'root' | 'container' | 'directory';

/** Names that nobody can make at the top of a container. */
export const RESERVED_NAMES: readonly string[] = ['.snapshots', '.block'];

/** Longest part of a name that a message repeats. */
const SHOWN_CHARACTERS_MAX = 80;

const CONTROL_CHARACTER = /\p{Cc}/u;
const LONE_SURROGATE = /\p{Surrogate}/u;

/** Throws `invalid-name` or `name-too-long`, with the reason, for a name that must not be made there. */
export function assertNewName(name: string, place: Place): void {
  const reason = whyNotAName(name);
  if (reason !== undefined) throw invalid(name, reason);
  assertNameLength(name);
  if (place === 'root' && name.includes('@')) throw invalid(name, 'holds "@", which no container name may: leave it out');
  if (place === 'container' && RESERVED_NAMES.includes(name)) {
    throw invalid(name, 'is kept back for Offshoot at the top of a container: choose another name');
  }
}

/** Throws `name-too-long`, for a name that is made or only looked up. */
export function assertNameLength(name: string): void {
  // Three bytes are the most that a UTF-16 unit takes: the common, short name needs no measuring.
  if (name.length * 3 <= NAME_BYTES_MAX) return;
  const bytes = Buffer.byteLength(name);
  if (bytes <= NAME_BYTES_MAX) return;
  throw new OffshootError('name-too-long', `the name ${shown(name)} has ${bytes} bytes: ${NAME_BYTES_MAX} are the most that a name can have`, { bytes });
}

export function assertLinkTarget(target: string): void {
  if (target === '' || target.includes('\0') || LONE_SURROGATE.test(target)) {
    throw new OffshootError('invalid-argument', 'the target of a symlink must be UTF-8 text without a NUL byte, and not empty: give another one');
  }
  const bytes = Buffer.byteLength(target);
  if (bytes <= LINK_TARGET_BYTES_MAX) return;
  throw new OffshootError('name-too-long', `the target of the symlink has ${bytes} bytes: ${LINK_TARGET_BYTES_MAX} are the most that one can have`, { bytes });
}

/** The name, quoted for a message: control characters as escapes, cut when long. */
export function shown(name: string): string {
  const quoted = JSON.stringify(name.length > SHOWN_CHARACTERS_MAX ? `${name.slice(0, SHOWN_CHARACTERS_MAX)}…` : name);
  // JSON leaves DEL and the second block of control characters as they are.
  return quoted.replace(/\p{Cc}/gu, (character) => `\\u${(character.codePointAt(0) ?? 0).toString(16).padStart(4, '0')}`);
}

function whyNotAName(name: string): string | undefined {
  if (name === '') return 'is empty: give one';
  if (name === '.' || name === '..') return 'means a directory already: choose another name';
  if (name.includes('/')) return 'holds "/", which separates names: leave it out';
  if (CONTROL_CHARACTER.test(name)) return 'holds a control character (a newline, a NUL byte): choose a name without';
  if (LONE_SURROGATE.test(name)) return 'is not valid UTF-8: choose another name';
  return undefined;
}

function invalid(name: string, reason: string): OffshootError {
  return new OffshootError('invalid-name', `the name ${shown(name)} ${reason}`);
}
