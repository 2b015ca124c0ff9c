/**
 * The machines that QEMU's adapter knows: a file for each, in a directory that outlives the power.
 *
 *   UUID.json          what `register` was given, with the description's text; written beside its place, synced and renamed
 *   by-name/HASH       a symbolic link whose text is the UUID: made in one system call, so that a name is taken by one machine
 *
 * Registering: 1 the name's link, 2 the file. A death between the two leaves a link to a machine that is not known; whoever wants the name next takes
 * it over. Forgetting: 1 the link, 2 the file, so that a death between the two leaves a machine that is known: forgetting it again leaves nothing.
 * Nothing is kept in memory. Only the daemon's user can read or write there.
 */
import { createHash } from 'node:crypto';
import { closeSync, fsyncSync, lstatSync, mkdirSync, openSync, readFileSync, readlinkSync, renameSync, symlinkSync, unlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import type { MachineToRegister } from '../hypervisor.js';

const VERSION = 1;
const UUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/u;
const UNFINISHED = '.new';
const DIRECTORY_MODE = 0o700;
const FILE_MODE = 0o600;

export class Registrations {
  readonly #directory: string;

  constructor(directory: string) {
    this.#directory = directory;
  }

  /** Null when it is not known. */
  find(externalId: string): MachineToRegister | null {
    if (!UUID.test(externalId)) throw new OffshootError('invalid-argument', `'${externalId}' is no id of a machine: ids are UUIDs in lower case`, { externalId });
    let text: string;
    try {
      text = readFileSync(this.#file(externalId), 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
      throw toOffshootError(error);
    }
    return parse(text, this.#file(externalId));
  }

  /** Throws `already-exists` when another machine has its name or its UUID. What the same machine had before is replaced. */
  add(machine: MachineToRegister): string {
    const known = this.find(machine.uuid);
    if (known !== null && (known.name !== machine.name || known.directory !== machine.directory)) {
      throw new OffshootError('already-exists', `machine '${known.name}' in ${known.directory} has the UUID ${machine.uuid} already`, { uuid: machine.uuid });
    }
    this.#make();
    this.#takeName(machine);
    const file = this.#file(machine.uuid);
    const unfinished = `${file}${UNFINISHED}`;
    const fd = openSync(unfinished, 'w', FILE_MODE);
    try {
      writeFileSync(fd, `${JSON.stringify({ version: VERSION, ...machine }, null, 2)}\n`);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(unfinished, file);
    syncDirectory(this.#directory);
    return machine.uuid;
  }

  remove(machine: MachineToRegister): void {
    if (this.#holderOf(machine.name) === machine.uuid) {
      removeIfThere(this.#link(machine.name));
      syncDirectory(this.#names());
    }
    removeIfThere(`${this.#file(machine.uuid)}${UNFINISHED}`);
    removeIfThere(this.#file(machine.uuid));
    syncDirectory(this.#directory);
  }

  #takeName(machine: MachineToRegister): void {
    const holder = this.#holderOf(machine.name);
    if (holder === machine.uuid) return;
    if (holder !== null) {
      if (UUID.test(holder) && this.find(holder)?.name === machine.name) {
        throw new OffshootError('already-exists', `a machine named '${machine.name}' is registered already, with the UUID ${holder}`, { name: machine.name });
      }
      removeIfThere(this.#link(machine.name));
    }
    symlinkSync(machine.uuid, this.#link(machine.name));
    syncDirectory(this.#names());
  }

  #holderOf(name: string): string | null {
    try {
      return readlinkSync(this.#link(name));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
      throw toOffshootError(error);
    }
  }

  #make(): void {
    mkdirSync(this.#names(), { recursive: true, mode: DIRECTORY_MODE });
    const found = lstatSync(this.#directory);
    if (found.uid === process.geteuid?.() && found.isDirectory() && (found.mode & 0o022) === 0) return;
    throw new OffshootError('not-permitted', `${this.#directory} is not a directory that only this user may write to`, { path: this.#directory });
  }

  #names(): string {
    return join(this.#directory, 'by-name');
  }

  #file(uuid: string): string {
    return join(this.#directory, `${uuid}.json`);
  }

  #link(name: string): string {
    return join(this.#names(), createHash('sha256').update(name).digest('hex'));
  }
}

function parse(text: string, file: string): MachineToRegister {
  let value: Partial<MachineToRegister & { readonly version: number }>;
  try {
    value = JSON.parse(text) as typeof value;
  } catch (error) {
    throw new OffshootError('store-damaged', `${file} is not JSON: unregister the machine and register it again`, { path: file }, error);
  }
  if (value.version !== VERSION) {
    throw new OffshootError('store-version', `${file} was written by another version of Offshoot (${String(value.version)})`, { path: file });
  }
  const { name, uuid, directory, configuration, text: description, owner } = value;
  if (name === undefined || uuid === undefined || directory === undefined || configuration === undefined || description === undefined || owner === undefined) {
    throw new OffshootError('store-damaged', `${file} does not say all of a machine: unregister it and register it again`, { path: file });
  }
  return { name, uuid, directory, configuration, text: description, owner };
}

function removeIfThere(path: string): void {
  try {
    unlinkSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw toOffshootError(error);
  }
}

function syncDirectory(path: string): void {
  const fd = openSync(path, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
