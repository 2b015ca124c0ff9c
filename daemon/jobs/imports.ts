/**
 * Imports: a file of the host becomes a disk of the store.
 *
 * Main thread; copying and converting happen in a thread or a child. A source is looked at before anything is made, and
 * again when it was copied: one that changed meanwhile is refused. Everything is prepared under STORE/import, and appears
 * under its name in one transaction; a job that fails, is cancelled or dies with the server leaves nothing behind. When
 * the store fills up, imports are the first to end. How a source is opened is in `import-source.ts`, what foreign images may not
 * be in `image-header.ts` and `image-format.ts`.
 */
import fs from 'node:fs/promises';
import path from 'node:path';
import { Worker } from 'node:worker_threads';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { JobRow, JobState } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { SECTOR_BYTES } from '../../blockstore/units.js';
import { conversionUid } from '../control/conversion-user.js';
import type { Namespace } from '../filesystem/namespace.js';
import type { CopyReport, CopyWorkerData } from './copy-worker.js';
import type { JobLogger } from './fills.js';
import { convertImage, describeImage, detectFormat, formatOf, type ImageFormat } from './image-format.js';
import { assertStandsAlone } from './image-header.js';
import { assertSourceUnchanged, openSource, type ImportSource } from './import-source.js';
import { copyRemote } from './remote-import.js';

export interface ImportOptions {
  /** Absolute. */
  readonly file: string;
  readonly target: string;
  readonly inPlace: boolean;
  /** Null: raw. A file with the signature of another format is refused: a machine would find garbage on its disk. */
  readonly format: ImageFormat | null;
}

interface Running {
  readonly abort: AbortController;
  ended: Promise<void>;
  doneBytes: number;
  totalBytes: number;
  /** Ended because the store is full. */
  isOutOfSpace: boolean;
}

const JOB_KIND = 'import';
const OUT_OF_SPACE = 'the store is full: make room and import the file again';
/** Imports at a time: they share threads with the flushes of guests. */
const RUNNING_MAX = 4;
const CONVERTIBLE = new Set<string>(['qcow2', 'vmdk', 'vhdx', 'vdi']);

export class Imports {
  private readonly store: Store;
  private readonly namespace: Namespace;
  private readonly storeDir: string;
  private readonly mountDir: string;
  private readonly logger: JobLogger;
  private readonly onFatal: (error: Error) => void;
  private readonly running = new Map<number, Running>();

  constructor(options: {
    readonly store: Store; readonly namespace: Namespace; readonly storeDir: string; readonly mountDir: string; readonly logger: JobLogger;
    readonly onFatal: (error: Error) => void;
  }) {
    this.store = options.store;
    this.namespace = options.namespace;
    this.storeDir = options.storeDir;
    this.mountDir = options.mountDir;
    this.logger = options.logger;
    this.onFatal = options.onFatal;
  }

  /** Imports that the last server did not finish have left nothing but their row. */
  failInterrupted(): void {
    for (const job of this.store.meta.jobs.list({ states: ['running'], kind: JOB_KIND })) {
      this.end(job.id, 'failed', 'the server was restarted during the import; start it again', 'io-error');
    }
  }

  /** Begins an import and returns its job. What is wrong with the target is thrown; what is wrong with the file fails the job. */
  start(options: ImportOptions): JobRow {
    this.store.quotas.assertRoom([this.namespace.resolveNew(options.target).parent.id]);
    if (options.inPlace && options.format !== null && options.format !== 'raw') {
      throw new OffshootError('invalid-argument', `only raw files can be used in place; leave out --in-place to convert the ${options.format} image`);
    }
    if (!options.inPlace && this.store.space().isFull) throw new OffshootError('no-space', OUT_OF_SPACE);
    if (this.running.size >= RUNNING_MAX) {
      throw new OffshootError('busy', `${RUNNING_MAX} imports are running already: wait until one of them has ended`);
    }
    const nowUs = Date.now() * 1000;
    const job = this.store.meta.jobs.insert({
      kind: JOB_KIND, nodeId: null, state: 'running', parameters: { ...options, errorKind: null }, progressDone: 0, progressTotal: 0, message: null,
      createdUs: nowUs, updatedUs: nowUs,
    });
    const abort = new AbortController();
    const running: Running = { abort, ended: Promise.resolve(), doneBytes: 0, totalBytes: 0, isOutOfSpace: false };
    this.running.set(job.id, running);
    running.ended = this.run(job.id, options, running).catch((error: unknown) => {
      this.onFatal(error instanceof Error ? error : new Error(String(error)));
    });
    return job;
  }

  /** Whether any import runs. */
  isBusy(): boolean {
    return this.running.size > 0;
  }

  /** Progress of a running import in bytes; null when it does not run. */
  progress(jobId: number): { readonly doneBytes: number; readonly totalBytes: number } | null {
    const running = this.running.get(jobId);
    return running === undefined ? null : { doneBytes: running.doneBytes, totalBytes: running.totalBytes };
  }

  /** Resolves when nothing of the import is left running. */
  async cancel(jobId: number): Promise<void> {
    const running = this.running.get(jobId);
    if (running === undefined) return;
    running.abort.abort();
    await running.ended;
  }

  /** The store is full: what is left belongs to the metadata, and an import would take it. */
  stopForSpace(): void {
    for (const running of this.running.values()) {
      running.isOutOfSpace = true;
      running.abort.abort();
    }
  }

  async close(): Promise<void> {
    await Promise.all([...this.running.keys()].map(async (jobId) => this.cancel(jobId)));
  }

  private async run(jobId: number, options: ImportOptions, running: Running): Promise<void> {
    const temporary = path.join(this.storeDir, 'import', `${jobId}.raw`);
    let source: ImportSource | undefined;
    try {
      source = await openSource(options.file, { storeDir: this.storeDir, mountDir: this.mountDir }, this.store.sourceTimeoutMs, running.abort.signal);
      await this.assertFormat(options, source);
      running.abort.signal.throwIfAborted();
      const note = options.inPlace ? this.finishInPlace(options, source) : await this.copyIn(options, source, temporary, running);
      await fs.rm(temporary, { force: true });
      this.end(jobId, 'completed', [note, linkNote(options.file, source)].filter((each) => each !== null).join('; ') || null);
      this.logger.info({ disk: options.target, file: options.file, jobId }, 'import completed');
    } catch (thrown) {
      // First of all, because it may be what fills the store.
      await fs.rm(temporary, { force: true });
      if (running.isOutOfSpace) this.end(jobId, 'failed', OUT_OF_SPACE, 'no-space');
      else if (running.abort.signal.aborted) this.end(jobId, 'cancelled', 'cancelled', 'cancelled');
      else {
        const error = toOffshootError(thrown);
        if (error.kind === 'internal') throw thrown;
        this.end(jobId, 'failed', error.message, error.kind);
        this.logger.warn({ disk: options.target, file: options.file, jobId, reason: error.message }, 'import failed');
      }
    } finally {
      this.running.delete(jobId);
      await source?.handle?.close();
    }
  }

  /** Refuses a file whose first bytes speak of another format than was said. */
  private async assertFormat(options: ImportOptions, source: ImportSource): Promise<void> {
    const found = source.handle === null ? formatOf(source.head ?? Buffer.alloc(0)) : await detectFormat(source.handle);
    const wanted = options.format ?? 'raw';
    if (wanted === 'raw' && found !== null) {
      throw new OffshootError('foreign-format',
        `${options.file} is a ${found} image, not a raw disk: ${CONVERTIBLE.has(found) ? `say --format ${found} to convert it` : 'convert it with `qemu-img convert -O raw` first'}`, { path: source.file });
    }
    if (wanted !== 'raw' && found !== wanted) {
      throw new OffshootError('foreign-format', `${options.file} is not ${wanted}${found === null ? '' : ` but ${found}`}; say the right --format`, { path: source.file });
    }
  }

  /** The file becomes a sealed layer where it lies, and the disk an empty layer above it. */
  private finishInPlace(options: ImportOptions, source: ImportSource): string | null {
    const { meta } = this.store;
    const { parent, name } = this.namespace.resolveNew(options.target);
    const nowUs = Date.now() * 1000;
    const sizeBytes = wholeSectors(source.identity.sizeBytes);
    meta.transaction(() => {
      const base = meta.layers.insert({
        kind: 'external', externalPath: source.file, externalIdentity: source.identity, backingId: null, backingLimitBytes: null,
        sizeBytes: source.identity.sizeBytes, sealed: true, complete: true, createdUs: nowUs,
      });
      const layer = meta.layers.insert({
        kind: 'store', externalPath: null, externalIdentity: null, backingId: base.id, backingLimitBytes: null, sizeBytes, sealed: false,
        complete: false, createdUs: nowUs,
      });
      const node = this.namespace.addDisk(parent.id, name, { mode: 0o600, uid: parent.uid, gid: parent.gid, sizeBytes, copyOnRead: false, layerId: layer.id });
      meta.layers.update(base.id, { writtenBy: node.id });
    });
    return paddingNote(source.identity.sizeBytes);
  }

  private async copyIn(options: ImportOptions, source: ImportSource, temporary: string, running: Running): Promise<string | null> {
    const format = options.format ?? 'raw';
    const { signal } = running.abort;
    let contentBytes = source.identity.sizeBytes;
    if (format === 'raw') {
      running.totalBytes = contentBytes;
      // Better now than when all of it was copied; what it takes in the end is asked then.
      if (source.handle !== null) this.assertRoom(options, (await source.handle.stat()).blocks * 512);
      await this.copySource(source, temporary, signal, (doneBytes) => { running.doneBytes = doneBytes; });
    } else {
      contentBytes = await this.convertIn(options.file, format, source, temporary, running);
    }
    await assertSourceUnchanged(source, options.file);
    const sizeBytes = wholeSectors(contentBytes);
    const handle = await fs.open(temporary, 'r+');
    try {
      await handle.truncate(sizeBytes);
      await handle.sync();
    } finally {
      await handle.close();
    }
    signal.throwIfAborted();
    this.assertRoom(options, (await fs.stat(temporary)).blocks * 512);
    this.finishCopied(options, temporary, sizeBytes);
    return paddingNote(contentBytes);
  }

  /**
   * Converts a foreign image; the virtual size. The image is copied first (shared, where the file system can), so that what was
   * checked is what is read, whoever can write to the original; the copy and the result belong to the user that qemu-img runs as
   * until it has ended.
   */
  private async convertIn(file: string, format: ImageFormat, source: ImportSource, temporary: string, running: Running): Promise<number> {
    const { signal } = running.abort;
    const copied = copyOf(temporary);
    await this.copySource(source, copied, signal, () => undefined);
    await assertSourceUnchanged(source, file);
    const image = await fs.open(copied, 'r');
    let target: fs.FileHandle | undefined;
    try {
      await assertStandsAlone(image, format, file);
      if (process.geteuid?.() === 0) await image.chown(conversionUid(), conversionUid());
      const { virtualBytes } = await describeImage(image, format, file);
      if (virtualBytes === 0) throw new OffshootError('invalid-argument', `${file} describes an empty disk`);
      running.totalBytes = virtualBytes;
      target = await fs.open(temporary, 'wx', 0o600);
      if (process.geteuid?.() === 0) await target.chown(conversionUid(), conversionUid());
      await convertImage({ image, format, target, virtualBytes, signal, onProgress: (fraction) => { running.doneBytes = Math.round(fraction * virtualBytes); } });
      await target.chown(process.geteuid?.() ?? 0, process.getegid?.() ?? 0);
      await target.chmod(0o600);
      return virtualBytes;
    } finally {
      await target?.close();
      await image.close();
      await fs.rm(copied, { force: true });
    }
  }

  private async copySource(source: ImportSource, target: string, signal: AbortSignal, onProgress: (doneBytes: number) => void): Promise<void> {
    if (source.handle === null) await copyRemote(source, target, this.store.sourceTimeoutMs, signal, onProgress);
    else await copyRaw({ sourceFd: source.handle.fd, target, sizeBytes: source.identity.sizeBytes }, signal, onProgress);
  }

  private assertRoom(options: ImportOptions, bytes: number): void {
    this.store.quotas.assertRoom([this.namespace.resolveNew(options.target).parent.id], bytes);
  }

  /** The copied file becomes a complete layer under the disk's name, in one transaction. */
  private finishCopied(options: ImportOptions, temporary: string, sizeBytes: number): void {
    const { meta, files } = this.store;
    const { parent, name } = this.namespace.resolveNew(options.target);
    meta.transaction(() => {
      const layer = meta.layers.insert({
        kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes, sealed: false,
        complete: true, createdUs: Date.now() * 1000,
      });
      this.namespace.addDisk(parent.id, name, { mode: 0o600, uid: parent.uid, gid: parent.gid, sizeBytes, copyOnRead: false, layerId: layer.id });
      files.adopt(layer.id, temporary);
    });
  }

  private end(jobId: number, state: JobState, message: string | null, errorKind: string | null = null): void {
    const job = this.store.meta.jobs.byId(jobId);
    if (job === undefined) return;
    const running = this.running.get(jobId);
    this.store.meta.jobs.update(jobId, {
      state, message, updatedUs: Date.now() * 1000, parameters: { ...(job.parameters as object), errorKind },
      progressDone: state === 'completed' ? (running?.totalBytes ?? 0) : (running?.doneBytes ?? 0), progressTotal: running?.totalBytes ?? 0,
    });
  }
}

async function copyRaw(data: CopyWorkerData, signal: AbortSignal, onProgress: (doneBytes: number) => void): Promise<void> {
  const worker = new Worker(new URL('./copy-worker.js', import.meta.url), { name: 'import', workerData: data });
  const stop = (): void => { void worker.terminate(); };
  signal.addEventListener('abort', stop, { once: true });
  try {
    await new Promise<void>((resolve, reject) => {
      worker.on('message', (report: CopyReport) => {
        if (report.type === 'progress') onProgress(report.doneBytes);
        else if (report.type === 'done') resolve();
        else reject(new OffshootError(report.errno === 28 ? 'no-space' : 'io-error', `${report.what} failed with errno ${report.errno}${report.errno === 28 ? ': the store is full' : ''}`));
      });
      worker.on('error', reject);
      worker.on('exit', () => { reject(new OffshootError('cancelled', 'the import was cancelled')); });
    });
  } finally {
    signal.removeEventListener('abort', stop);
    await worker.terminate();
  }
}

/** Where a foreign image lies while it is converted to `temporary`. */
function copyOf(temporary: string): string {
  return temporary.replace(/\.raw$/u, '.image');
}

/** Worth saying when the name that was given is not where the content came from. */
function linkNote(file: string, source: ImportSource): string | null {
  return path.resolve(file) === source.file ? null : `read from ${source.file}, where the path leads`;
}

function wholeSectors(sizeBytes: number): number {
  return Math.ceil(sizeBytes / SECTOR_BYTES) * SECTOR_BYTES;
}

function paddingNote(sizeBytes: number): string | null {
  const padding = wholeSectors(sizeBytes) - sizeBytes;
  return padding === 0 ? null : `the file is not a multiple of ${SECTOR_BYTES} bytes: the disk is ${padding} bytes longer, which read as zeros`;
}
