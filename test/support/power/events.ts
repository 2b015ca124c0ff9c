/**
 * What a recorded process did to its files, as events on inodes and names: descriptors of the kernel are gone.
 *
 * Follows descriptors from open to close, so that each write and each sync belongs to an inode and not to a name. Only what
 * lies below the watched directories counts. A call that changes a watched file and is not known here ends the test.
 * A write takes effect on the (volatile) file when its call begins, because from then on any part of it may reach the
 * disk; a sync promises what was written before it began, and promises it when it has ended.
 */
import path from 'node:path';

import { parseTrace, type Argument, type Call } from './trace.js';

export type FileEvent =
  | { readonly kind: 'create'; readonly path: string; readonly inode: number; readonly directory: boolean }
  | { readonly kind: 'write'; readonly inode: number; readonly offsetBytes: number; readonly data: Buffer }
  | { readonly kind: 'zero'; readonly inode: number; readonly offsetBytes: number; readonly lengthBytes: number }
  | { readonly kind: 'truncate'; readonly inode: number; readonly sizeBytes: number }
  /** Makes the file at least this long. */
  | { readonly kind: 'extend'; readonly inode: number; readonly sizeBytes: number }
  | { readonly kind: 'unlink'; readonly path: string }
  | { readonly kind: 'rename'; readonly path: string; readonly target: string }
  | { readonly kind: 'sync-begin'; readonly inode: number; readonly sync: number; readonly call: string }
  | { readonly kind: 'sync-end'; readonly inode: number; readonly sync: number; readonly call: string }
  | { readonly kind: 'marker'; readonly marker: unknown };

export interface EventOptions {
  /** Directories whose files are watched. */
  readonly roots: readonly string[];
  /** What is written to this file are markers, one JSON a write. */
  readonly markerPath: string;
}

interface OpenFile {
  readonly inode: number;
  readonly path: string;
  /** Everything is written at the end. */
  readonly appends: boolean;
  position: number;
}

const MARKERS = -1;
/** Of open calls in strace's names. */
const CREATES = /\bO_CREAT\b/u;
const TRUNCATES = /\bO_TRUNC\b/u;
const WRITES = /\bO_(?:WRONLY|RDWR)\b/u;

export class EventReader {
  private readonly options: EventOptions;
  private readonly files = new Map<number, OpenFile>();
  private readonly names: Map<string, number>;
  private readonly syncs = new Map<Call, { readonly sync: number; readonly inode: number }>();
  private readonly events: FileEvent[] = [];
  /** Of files that were made in this recording: where an appending write goes. */
  private readonly sizes = new Map<number, number>();
  private nextSync: number;
  private nextInode: number;

  /** `names`: what lies below the roots as the recording begins. Numbers of new inodes and syncs begin at `firstNumber`. */
  constructor(options: EventOptions, names: ReadonlyMap<string, number>, firstNumber: number) {
    this.options = options;
    this.names = new Map(names);
    this.nextInode = firstNumber;
    this.nextSync = firstNumber;
  }

  read(log: string): FileEvent[] {
    for (const event of parseTrace(log)) {
      if (event.kind === 'enter') this.enter(event.call);
      else this.exit(event.call, event.result);
    }
    return this.events;
  }

  private enter(call: Call): void {
    const { args } = call;
    const file = this.fileOf(args[0]);
    if (file === undefined) return;
    switch (call.name) {
      case 'pwrite64':
        if (file.appends) throw new Error(`a write at an offset of a file that is opened for appending: ${describe(call)}`);
        this.write(file.inode, numberOf(call, 3), bytesOf(call, 1));
        return;
      case 'write': {
        const data = bytesOf(call, 1);
        if (file.inode === MARKERS) {
          this.events.push({ kind: 'marker', marker: JSON.parse(data.toString('utf8')) });
          return;
        }
        if (file.appends) file.position = this.sizes.get(file.inode) ?? 0;
        this.write(file.inode, file.position, data);
        file.position += data.length;
        return;
      }
      case 'fsync':
      case 'fdatasync':
        this.syncs.set(call, { sync: this.nextSync, inode: file.inode });
        this.events.push({ kind: 'sync-begin', inode: file.inode, sync: this.nextSync, call: call.name });
        this.nextSync += 1;
        return;
      case 'ftruncate':
        this.truncate(file.inode, numberOf(call, 1));
        return;
      case 'fallocate':
        this.fallocate(file, call);
        break;
      default:
    }
  }

  private exit(call: Call, result: number): void {
    const { args } = call;
    switch (call.name) {
      case 'openat': this.opened(call, result); return;
      case 'close': if (result === 0) this.files.delete(Number(args[0])); return;
      case 'mkdir': {
        const name = this.watched(args[0]);
        if (name !== undefined && result === 0) this.create(name, true);
        return;
      }
      case 'unlink':
      case 'rmdir': {
        const name = this.watched(args[0]);
        if (name === undefined || result !== 0) return;
        if (!this.names.delete(name)) throw new Error(`${name} was removed and never made: the recording misses something`);
        this.events.push({ kind: 'unlink', path: name });
        return;
      }
      case 'rename': this.renamed(call, result); return;
      case 'pwrite64':
      case 'write':
        if (this.fileOf(args[0]) !== undefined && result !== bytesOf(call, 1).length) throw new Error(`a write was short or failed: ${describe(call)} = ${result}`);
        return;
      case 'fsync':
      case 'fdatasync': {
        const begun = this.syncs.get(call);
        if (begun === undefined) return;
        if (result !== 0) throw new Error(`a sync failed: ${describe(call)} = ${result}`);
        this.events.push({ kind: 'sync-end', inode: begun.inode, sync: begun.sync, call: call.name });
        return;
      }
      case 'ftruncate':
      case 'fallocate':
        if (this.fileOf(args[0]) !== undefined && result !== 0) throw new Error(`a call failed: ${describe(call)} = ${result}`);
        return;
      case 'mmap': {
        const file = this.fileOf(args[4]);
        if (file === undefined || !String(args[3]).includes('MAP_SHARED') || !String(args[2]).includes('PROT_WRITE')) return;
        if (!isMemory(file.path)) throw new Error(`${file.path} is mapped for writing, which the recorder cannot see`);
        return;
      }
      default:
        // Calls that the store is not known to make: they may not touch what is watched.
        if (args.some((argument) => this.watched(argument) !== undefined) || this.fileOf(args[0]) !== undefined) {
          throw new Error(`a call that the recorder does not know touches the store: ${describe(call)} = ${result}`);
        }
    }
  }

  private opened(call: Call, result: number): void {
    if (result < 0) return;
    const name = this.watched(call.args[1]);
    const flags = String(call.args[2]);
    if (isName(call.args[1], this.options.markerPath)) {
      this.files.set(result, { inode: MARKERS, path: this.options.markerPath, appends: false, position: 0 });
      return;
    }
    if (name === undefined) {
      this.files.delete(result);
      return;
    }
    let inode = this.names.get(name);
    if (inode === undefined) {
      if (!CREATES.test(flags)) throw new Error(`${name} was opened and never made: the recording misses something`);
      inode = this.create(name, false);
    } else if (TRUNCATES.test(flags) && WRITES.test(flags)) {
      this.truncate(inode, 0);
    }
    const appends = flags.includes('O_APPEND');
    if (appends && !this.sizes.has(inode)) throw new Error(`${name} is opened for appending and was made by an earlier run: the recorder does not know its size`);
    this.files.set(result, { inode, path: name, appends, position: 0 });
  }

  private create(name: string, directory: boolean): number {
    const inode = this.nextInode;
    this.nextInode += 1;
    this.names.set(name, inode);
    this.sizes.set(inode, 0);
    this.events.push({ kind: 'create', path: name, inode, directory });
    return inode;
  }

  private write(inode: number, offsetBytes: number, data: Buffer): void {
    this.grow(inode, offsetBytes + data.length);
    this.events.push({ kind: 'write', inode, offsetBytes, data });
  }

  private truncate(inode: number, sizeBytes: number): void {
    if (this.sizes.has(inode)) this.sizes.set(inode, sizeBytes);
    this.events.push({ kind: 'truncate', inode, sizeBytes });
  }

  private grow(inode: number, sizeBytes: number): void {
    const before = this.sizes.get(inode);
    if (before !== undefined) this.sizes.set(inode, Math.max(before, sizeBytes));
  }

  private renamed(call: Call, result: number): void {
    const from = this.watched(call.args[0]);
    const to = this.watched(call.args[1]);
    if ((from === undefined && to === undefined) || result !== 0) return;
    const inode = from === undefined ? undefined : this.names.get(from);
    if (from === undefined || to === undefined || inode === undefined) throw new Error(`a rename that the recorder does not know: ${describe(call)}`);
    this.names.delete(from);
    this.names.set(to, inode);
    this.events.push({ kind: 'rename', path: from, target: to });
  }

  private fallocate(file: OpenFile, call: Call): void {
    const mode = String(call.args[1]);
    const offsetBytes = numberOf(call, 2);
    const lengthBytes = numberOf(call, 3);
    if (mode === '0') {
      this.grow(file.inode, offsetBytes + lengthBytes);
      this.events.push({ kind: 'extend', inode: file.inode, sizeBytes: offsetBytes + lengthBytes });
    } else if (mode.includes('FALLOC_FL_KEEP_SIZE') && mode.includes('FALLOC_FL_PUNCH_HOLE')) {
      this.events.push({ kind: 'zero', inode: file.inode, offsetBytes, lengthBytes });
    } else {
      throw new Error(`an fallocate that the recorder does not know: ${describe(call)}`);
    }
  }

  private fileOf(argument: Argument | undefined): OpenFile | undefined {
    return typeof argument === 'string' && /^\d+$/u.test(argument) ? this.files.get(Number(argument)) : undefined;
  }

  /** The path, when it lies below a root. The recorded process has its working directory elsewhere. */
  private watched(argument: Argument | undefined): string | undefined {
    if (!Buffer.isBuffer(argument)) return undefined;
    const name = argument.toString('utf8');
    if (!path.isAbsolute(name)) return undefined;
    const normal = path.normalize(name).replace(/\/$/u, '');
    return this.options.roots.some((root) => normal.startsWith(`${root}/`) || normal === root) ? normal : undefined;
  }
}

/** Files that live in mapped memory: SQLite's index of its log, and the journals; neither survives a power loss. */
export function isMemory(name: string): boolean {
  return name.endsWith('-shm') || /\/journal-\d+$/u.test(name);
}

function isName(argument: Argument | undefined, name: string): boolean {
  return Buffer.isBuffer(argument) && argument.toString('utf8') === name;
}

function bytesOf(call: Call, index: number): Buffer {
  const argument = call.args[index];
  if (!Buffer.isBuffer(argument)) throw new Error(`bytes were expected: ${describe(call)}`);
  return argument;
}

function numberOf(call: Call, index: number): number {
  const value = Number(call.args[index]);
  if (!Number.isSafeInteger(value)) throw new Error(`a number was expected: ${describe(call)}`);
  return value;
}

function describe(call: Call): string {
  return `${call.name}(${call.args.map((argument) => (Buffer.isBuffer(argument) ? JSON.stringify(argument.toString('latin1').slice(0, 80)) : argument)).join(', ')})`;
}
