/**
 * Records what a program does to a store: runs it under strace, and gives what it did as events.
 *
 * strace sees every system call of every thread, whoever makes it: koffi, libuv's thread pool, SQLite. That nothing was
 * missed is shown at the end of each recording: the model with everything applied must be, byte for byte, what really lies
 * there. A program may be recorded in several runs, one after the other, on one store.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

import { EventReader, isMemory, type FileEvent } from './events.js';
import { VolatileDisk, type Image } from './volatile-disk.js';

/** Longest write that can be recorded: a request of 1 MiB with a block before and behind it. */
const TEXT_BYTES_MAX = 2 * 1024 * 1024;
const CALLS = [
  'openat', 'open', 'openat2', 'creat', 'close', 'dup', 'dup2', 'dup3', 'pwrite64', 'write', 'writev', 'pwritev', 'pwritev2', 'fsync', 'fdatasync', 'sync_file_range',
  'sync', 'syncfs', 'ftruncate', 'truncate', 'fallocate', 'rename', 'renameat', 'renameat2', 'link', 'linkat', 'symlink', 'symlinkat', 'unlink', 'unlinkat',
  'mkdir', 'mkdirat', 'rmdir', 'mknod', 'mknodat', 'mmap', 'msync', 'copy_file_range', 'sendfile', 'splice', 'ioctl', 'io_uring_setup',
];

export interface ProgramRun {
  readonly program: string;
  readonly args: readonly string[];
  /** The program kills itself in the midst of it; otherwise it must end well. */
  readonly isKilled?: boolean;
}

export class Recorder {
  readonly events: FileEvent[] = [];
  /** The page cache as the runs so far have left it. */
  readonly disk: VolatileDisk;
  readonly root: string;
  private readonly logDir: string;
  private readonly markerPath: string;
  private nextNumber: number;

  /** `root`: the directory whose files are recorded; empty as yet. Logs go to `logDir`. */
  constructor(root: string, logDir: string) {
    this.root = root;
    this.logDir = logDir;
    this.disk = new VolatileDisk(root);
    this.nextNumber = 1;
    this.markerPath = path.join(logDir, 'markers');
    fs.writeFileSync(this.markerPath, '');
  }

  async run(run: ProgramRun): Promise<FileEvent[]> {
    const logFile = path.join(this.logDir, `trace-${this.events.length}.log`);
    const strace = ['-f', '-qq', '-xx', '-s', String(TEXT_BYTES_MAX), '--seccomp-bpf', '-o', logFile, '-e', `trace=${CALLS.join(',')}`];
    const child = spawn('strace', [...strace, process.execPath, run.program, this.markerPath, ...run.args], {
      stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, UV_USE_IO_URING: '0' },
    });
    let output = '';
    child.stdout.on('data', (chunk: Buffer) => { output += chunk.toString(); });
    child.stderr.on('data', (chunk: Buffer) => { output += chunk.toString(); });
    const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
      child.on('error', reject);
      child.on('close', (...ended) => { resolve(ended); });
    });
    const endedAs = run.isKilled === true ? signal === 'SIGKILL' || code === 137 : code === 0;
    if (!endedAs) throw new Error(`the recorded program ended with ${code ?? signal ?? 'nothing'}: ${output.slice(-4000)}`);
    const reader = new EventReader({ roots: [this.root], markerPath: this.markerPath }, this.disk.names(), this.nextNumber);
    const events = reader.read(fs.readFileSync(logFile, 'latin1'));
    this.add(events);
    this.nextNumber += events.length;
    this.assertNothingMissed();
    return events;
  }

  /** Directories below the root that are there and durable before anything is recorded. */
  givenDirectories(names: readonly string[]): void {
    const sync = this.nextNumber + names.length;
    for (const name of names) fs.mkdirSync(path.join(this.root, name));
    this.add([
      ...names.map((name, index) => ({ kind: 'create', path: path.join(this.root, name), inode: this.nextNumber + index, directory: true }) as const),
      { kind: 'sync-begin', inode: 0, sync, call: 'fsync' }, { kind: 'sync-end', inode: 0, sync, call: 'fsync' },
    ]);
    this.nextNumber += names.length + 1;
  }

  /** What the mapped files of a directory hold now, as if it had been written: nobody else sees what is stored into memory. */
  addMapped(directory: string): void {
    for (const name of fs.readdirSync(directory)) {
      const inode = this.disk.names().get(path.join(directory, name));
      if (inode !== undefined && isMemory(path.join(directory, name))) {
        this.add([{ kind: 'write', inode, offsetBytes: 0, data: fs.readFileSync(path.join(directory, name)) }]);
      }
    }
  }

  private add(events: readonly FileEvent[]): void {
    for (const event of events) this.disk.apply(event);
    this.events.push(...events);
  }

  /** The model with everything applied against the files that are there. */
  private assertNothingMissed(): void {
    const expected = this.disk.current();
    const found = readTree(this.root);
    for (const [name, entry] of found) {
      const model = expected.get(name);
      if (model === undefined) throw new Error(`the recording missed that ${name} was made`);
      if (model.directory !== entry.directory) throw new Error(`the recording takes ${name} for what it is not`);
      if (model.directory || entry.directory || isMemory(name)) continue;
      if (model.sizeBytes !== entry.sizeBytes) throw new Error(`the recording has ${name} with ${model.sizeBytes} bytes, there are ${entry.sizeBytes}`);
      if (!model.bytes.equals(entry.bytes)) throw new Error(`the recording has other bytes in ${name} than there are`);
    }
    for (const name of expected.keys()) if (!found.has(name)) throw new Error(`the recording missed that ${name} was removed`);
  }
}

/** Everything below a directory. */
export function readTree(root: string): Image {
  const image = new Map<string, { readonly directory: true } | { readonly directory: false; readonly bytes: Buffer; readonly sizeBytes: number }>();
  const walk = (directory: string, relative: string): void => {
    for (const entry of fs.readdirSync(directory, { withFileTypes: true })) {
      const name = relative === '' ? entry.name : `${relative}/${entry.name}`;
      if (entry.isDirectory()) {
        image.set(name, { directory: true });
        walk(path.join(directory, entry.name), name);
      } else {
        const bytes = fs.readFileSync(path.join(directory, entry.name));
        image.set(name, { directory: false, bytes, sizeBytes: bytes.length });
      }
    }
  };
  walk(root, '');
  return image;
}

/** Makes a directory hold exactly the image; what is there already is used again, for it is mostly the same. */
export function writeTree(root: string, image: Image): void {
  const clear = (directory: string, relative: string): void => {
    for (const entry of fs.readdirSync(directory, { withFileTypes: true })) {
      const name = relative === '' ? entry.name : `${relative}/${entry.name}`;
      const full = path.join(directory, entry.name);
      if (!entry.isDirectory()) fs.unlinkSync(full);
      else if (image.get(name)?.directory === true) clear(full, name);
      else fs.rmSync(full, { recursive: true });
    }
  };
  clear(root, '');
  for (const [name, entry] of image) {
    const full = path.join(root, name);
    if (entry.directory) {
      if (!fs.existsSync(full)) fs.mkdirSync(full, { mode: 0o700 });
      continue;
    }
    writeFile(full, entry.bytes, entry.sizeBytes);
  }
}

const CHUNK_BYTES = 64 * 1024;
const ZEROS = Buffer.alloc(CHUNK_BYTES);

/** Chunks of zeros stay holes. */
function writeFile(file: string, bytes: Buffer, sizeBytes: number): void {
  const fd = fs.openSync(file, 'wx', 0o600);
  try {
    fs.ftruncateSync(fd, sizeBytes);
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) {
      const chunk = bytes.subarray(at, Math.min(bytes.length, at + CHUNK_BYTES));
      if (!chunk.equals(ZEROS.subarray(0, chunk.length))) fs.writeSync(fd, chunk, 0, chunk.length, at);
    }
  } finally {
    fs.closeSync(fd);
  }
}
