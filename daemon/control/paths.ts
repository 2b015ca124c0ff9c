/**
 * Paths inside the store as people write them: CONTAINER, or CONTAINER/PATH. Exactly what is seen under the mount.
 *
 * Checks what can be known from the text alone. The command line asks before it sends and the HTTP layer asks again
 * before the service sees the path, so that a wrong name is refused with the same sentence everywhere. Whether a path
 * exists, and what it is, is not known here. Control characters are refused although Linux allows them in names: what
 * has such a name can only have been made under the mount, and is handled there.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { NAME_BYTES_MAX, PATH_BYTES_MAX } from './limits.js';

// eslint-disable-next-line no-control-regex -- control characters are exactly what is looked for
const CONTROL_CHARACTER = /[\u0000-\u001f\u007f\u0080-\u009f]/u;
const LONE_SURROGATE = /\p{Surrogate}/u;
/** Longest piece of a refused name that a message repeats. */
const SHOWN_CHARACTERS_MAX = 80;

/** Printable ASCII: nearly every text, and what needs no look at its characters. */
const PLAIN = /^[ -~]*$/u;

/** Text as it may be shown in a message or on a terminal: control characters become visible escapes. */
export function visible(text: string): string {
  if (PLAIN.test(text)) return text;
  let shown = '';
  for (const character of text) {
    if (character === '\n') shown += '\\n';
    else if (character === '\t') shown += '\\t';
    else if (CONTROL_CHARACTER.test(character)) shown += `\\x${codeOf(character, 2)}`;
    else if (LONE_SURROGATE.test(character)) shown += `\\u${codeOf(character, 4)}`;
    else shown += character;
  }
  return shown;
}

function codeOf(character: string, digits: number): string {
  return (character.codePointAt(0) ?? 0).toString(16).padStart(digits, '0');
}

function quoted(text: string): string {
  const shown = visible(text);
  return shown.length <= SHOWN_CHARACTERS_MAX ? `'${shown}'` : `'${shown.slice(0, SHOWN_CHARACTERS_MAX)}…'`;
}

function refuse(path: string, reason: string): never {
  throw new OffshootError('invalid-name', `${quoted(path)} ${reason}`, { path: visible(path).slice(0, PATH_BYTES_MAX) });
}

function refuseLength(path: string, reason: string): never {
  throw new OffshootError('name-too-long', `${quoted(path)} ${reason}`, { bytes: Buffer.byteLength(path) });
}

function checkText(path: string): void {
  if (path.includes('\0')) refuse(path, 'holds a NUL byte: no name may');
  if (CONTROL_CHARACTER.test(path)) refuse(path, 'holds a control character (a newline, for example): choose a name without');
  if (LONE_SURROGATE.test(path)) refuse(path, 'is not valid Unicode: choose a name in UTF-8');
}

function checkComponent(path: string, name: string): void {
  if (name === '.' || name === '..') refuse(path, `holds '${name}': write the whole path, CONTAINER/PATH`);
  const bytes = Buffer.byteLength(name);
  if (bytes > NAME_BYTES_MAX) {
    refuseLength(path, `has a name of ${bytes} bytes in it: ${NAME_BYTES_MAX} bytes are the most that a name can have`);
  }
}

/** The name of a container: one component. */
export function checkContainerName(name: string): string {
  if (name === '') throw new OffshootError('invalid-name', 'the name of a container is empty: give it one');
  checkText(name);
  if (name.includes('/')) refuse(name, "holds '/': a container is named by one word; directories in it are made under the mount");
  checkComponent(name, name);
  return name;
}

/** A container, or anything in one. */
export function checkStorePath(path: string): string {
  if (path === '') throw new OffshootError('invalid-name', 'the path is empty: write CONTAINER/PATH');
  checkText(path);
  const bytes = Buffer.byteLength(path);
  if (bytes > PATH_BYTES_MAX) refuseLength(path, `has ${bytes} bytes: ${PATH_BYTES_MAX} are the most that a path can have`);
  if (path.startsWith('/')) {
    refuse(path, "begins with '/': write CONTAINER/PATH, that is, what follows the mount point (MOUNT/vms/a.img is vms/a.img)");
  }
  if (path.endsWith('/')) refuse(path, "ends with '/': leave that out");
  for (const name of path.split('/')) {
    if (name === '') refuse(path, "holds '//': write one '/' between two names");
    checkComponent(path, name);
  }
  return path;
}

/** Something in a container: a disk always is. */
export function checkPathInContainer(path: string): string {
  checkStorePath(path);
  if (!path.includes('/')) refuse(path, 'names a container, or a disk outside any: write CONTAINER/PATH');
  return path;
}
