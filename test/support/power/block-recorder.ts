/**
 * The recorder beneath a loop device: a FUSE server that offers one file, `img`, and logs what is done to it.
 *
 *   block-recorder.js MOUNT-DIR CONTENT-FILE SIZE-BYTES LOG-FILE [--lie-about-flushes]      (says `ready` when it is mounted)
 *
 * What is written to a second file, `mark`, stands in the log as a marker, at the place where it came: both files are served by one thread,
 * one request after the other. The loop device turns a flush of its users into an fsync and a discard into a fallocate; it knows no FUA, which
 * the kernel replaces by a flush behind the write (one that came with O_DSYNC all the same would count as a flush of everything). Never touches its own mount,
 * and writes to tmpfs only: a write-back that had to wait for this process must not wait for itself. Ends when the mount is taken away.
 * With `--lie-about-flushes` flushes are answered and forgotten, as a disk with a broken cache does: what stands on it must be found wrong.
 */
import fs from 'node:fs';

import { OffshootError } from '../../../blockstore/errors.js';
import { ROOT_NODE_ID, type AttributeChanges, type Attributes, type FallocateMode, type NodeId } from '../../../daemon/filesystem/types.js';
import { KernelDispatcher } from '../../../daemon/transport/kernel/dispatch.js';
import { mountFuse, openFuseDevice } from '../../../daemon/transport/kernel/mount.js';
import { MemoryFileSystem } from '../model/memory-file-system.js';
import { BlockLogWriter, DeviceFile } from './block-log.js';

const BUFFER_BYTES = 1024 * 1024 + 4096;
const OWNER = { uid: 0, gid: 0, pid: 0 };
const MODE = 0o600;
const ENDED: readonly unknown[] = ['ENODEV', 'ECONNABORTED', 'EPERM'];
/** Nothing happened, or the request was withdrawn. */
const AGAIN: readonly unknown[] = ['EINTR', 'EAGAIN', 'ENOENT'];

class RecordedFiles extends MemoryFileSystem {
  private readonly imageId: NodeId;
  private readonly markId: NodeId;
  private readonly content: DeviceFile;
  private readonly sizeBytes: number;
  private readonly log: BlockLogWriter;
  private readonly isLying: boolean;

  constructor(contentFile: string, sizeBytes: number, log: BlockLogWriter, isLying: boolean) {
    super();
    this.content = new DeviceFile(contentFile, sizeBytes);
    this.sizeBytes = sizeBytes;
    this.log = log;
    this.isLying = isLying;
    this.imageId = this.newFile('img');
    this.markId = this.newFile('mark');
  }

  override getattr(id: NodeId): Attributes {
    const attributes = super.getattr(id);
    return id === this.imageId ? { ...attributes, sizeBytes: this.sizeBytes, allocatedBytes: this.sizeBytes } : attributes;
  }

  override setattr(id: NodeId, changes: AttributeChanges): Promise<Attributes> {
    if (id !== this.imageId || changes.sizeBytes === undefined) return super.setattr(id, changes);
    return Promise.reject(new OffshootError('not-supported', 'The device keeps its size.'));
  }

  override read(id: NodeId, offsetBytes: number, target: Uint8Array): number {
    if (id !== this.imageId) return super.read(id, offsetBytes, target);
    return fs.readSync(this.content.fd, target, 0, target.byteLength, offsetBytes);
  }

  override write(id: NodeId, offsetBytes: number, data: Uint8Array): number {
    if (id === this.markId) {
      this.log.add('marker', 0, 0, data);
      return data.byteLength;
    }
    if (id !== this.imageId) return super.write(id, offsetBytes, data);
    if (offsetBytes + data.byteLength > this.sizeBytes) throw new OffshootError('too-large', 'The device ends before that.');
    this.log.add('write', offsetBytes, data.byteLength, data);
    this.content.write(offsetBytes, data);
    return data.byteLength;
  }

  override fallocate(id: NodeId, mode: FallocateMode, offsetBytes = 0, lengthBytes = 0): null {
    if (id !== this.imageId || (mode !== 'punch-hole' && mode !== 'zero-range-keep-size')) throw new OffshootError('not-supported', `No ${mode} here.`);
    const end = Math.min(this.sizeBytes, offsetBytes + lengthBytes);
    if (end <= offsetBytes) return null;
    this.log.add('zero', offsetBytes, end - offsetBytes);
    this.content.zero(offsetBytes, end - offsetBytes);
    return null;
  }

  override flush(id: NodeId): Promise<void> {
    if (id === this.imageId && !this.isLying) this.log.add('flush');
    return Promise.resolve();
  }

  private newFile(name: string): NodeId {
    const { attributes, open } = this.create(ROOT_NODE_ID, name, MODE, 0, OWNER);
    this.release(open.handle);
    return attributes.nodeId;
  }
}

function end(message: string): never {
  process.stderr.write(`block-recorder: ${message}\n`);
  process.exit(1);
}

const [mountDir = '', contentFile = '', size = '', logFile = '', lie = ''] = process.argv.slice(2);
const fuseFd = openFuseDevice();
const buffer = Buffer.alloc(BUFFER_BYTES);
const dispatcher = new KernelDispatcher({
  fileSystem: new RecordedFiles(contentFile, Number(size), new BlockLogWriter(logFile), lie === '--lie-about-flushes'),
  reply: (message) => {
    try {
      fs.writeSync(fuseFd, message);
    } catch (thrown) {
      const { code } = thrown as { readonly code?: unknown };
      if (code !== 'ENOENT' && !ENDED.includes(code)) throw thrown;
    }
  },
  onFatal: (error) => end(error.stack ?? error.message),
  logger: { debug: () => undefined, warn: (context, message) => { process.stderr.write(`block-recorder: ${message} ${JSON.stringify(context)}\n`); } },
});

function serve(): void {
  fs.read(fuseFd, buffer, 0, buffer.byteLength, null, (error, bytes) => {
    if (error !== null && ENDED.includes(error.code)) process.exit(0);
    if (error !== null && !AGAIN.includes(error.code)) end(`reading requests failed: ${error.message}`);
    if (error === null) dispatcher.handle(buffer.subarray(0, bytes));
    serve();
  });
}

mountFuse(fuseFd, mountDir);
serve();
process.stdout.write('ready\n');
