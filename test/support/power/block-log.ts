/**
 * What a block device was told, in order: the log that the recorder beneath a loop device writes, and the files that it is played into.
 *
 * A record of the log is a header of 24 bytes, little-endian, and the bytes of a write or a marker:
 *
 *     kind u32 @0 (see `KINDS`), length of the bytes behind it u32 @4, offset f64 @8, length concerned f64 @16
 *
 * A `flush` says that everything before it is on the disk: the recorder takes one request after the other and answers each before it takes the next.
 */
import fs from 'node:fs';

import { Errno } from '../../../blockstore/errors.js';
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, realDoor } from '../../../blockstore/hot/door.js';
import type { Marker } from './window.js';

export type DeviceEvent =
  | { readonly kind: 'write'; readonly offsetBytes: number; readonly data: Buffer }
  /** Discarded, or asked to be zeros. */
  | { readonly kind: 'zero'; readonly offsetBytes: number; readonly lengthBytes: number }
  | { readonly kind: 'flush' }
  | { readonly kind: 'marker'; readonly marker: Marker };
export type DeviceChange = Extract<DeviceEvent, { readonly offsetBytes: number }>;

const KINDS = ['write', 'zero', 'flush', 'marker'] as const;
const HEADER_BYTES = 24;
const NOTHING = Buffer.alloc(0);

export class BlockLogWriter {
  readonly #fd: number;

  constructor(file: string) {
    this.#fd = fs.openSync(file, 'wx', 0o600);
  }

  add(kind: DeviceEvent['kind'], offsetBytes = 0, lengthBytes = 0, data: Uint8Array = NOTHING): void {
    const header = Buffer.alloc(HEADER_BYTES);
    header.writeUInt32LE(KINDS.indexOf(kind), 0);
    header.writeUInt32LE(data.byteLength, 4);
    header.writeDoubleLE(offsetBytes, 8);
    header.writeDoubleLE(lengthBytes, 16);
    const written = fs.writevSync(this.#fd, [header, data]);
    if (written !== HEADER_BYTES + data.byteLength) throw new Error(`the log took ${written} bytes of ${HEADER_BYTES + data.byteLength}`);
  }
}

export function readBlockLog(file: string): DeviceEvent[] {
  const log = fs.readFileSync(file);
  const events: DeviceEvent[] = [];
  let at = 0;
  while (at < log.length) {
    const kind = KINDS[log.readUInt32LE(at)];
    const bytes = log.readUInt32LE(at + 4);
    const offsetBytes = log.readDoubleLE(at + 8);
    const lengthBytes = log.readDoubleLE(at + 16);
    const data = log.subarray(at + HEADER_BYTES, at + HEADER_BYTES + bytes);
    if (kind === undefined || data.length !== bytes) throw new Error(`the log of the device is damaged at ${at}`);
    at += HEADER_BYTES + bytes;
    switch (kind) {
      case 'write': events.push({ kind, offsetBytes, data }); break;
      case 'zero': events.push({ kind, offsetBytes, lengthBytes }); break;
      case 'flush': events.push({ kind }); break;
      case 'marker': events.push({ kind, marker: JSON.parse(data.toString('utf8')) as Marker }); break;
      default: throw new Error(`no event is called ${String(kind satisfies never)}`);
    }
  }
  return events;
}

/** The content of a device, in a sparse file. */
export class DeviceFile {
  readonly fd: number;

  /** An existing file is used as it is. */
  constructor(file: string, sizeBytes: number) {
    this.fd = fs.openSync(file, fs.constants.O_RDWR | fs.constants.O_CREAT, 0o600);
    fs.ftruncateSync(this.fd, sizeBytes);
  }

  apply(change: DeviceChange): void {
    if (change.kind === 'write') this.write(change.offsetBytes, change.data);
    else this.zero(change.offsetBytes, change.lengthBytes);
  }

  write(offsetBytes: number, data: Uint8Array): void {
    for (let done = 0; done < data.byteLength;) done += fs.writeSync(this.fd, data, done, data.byteLength - done, offsetBytes + done);
  }

  zero(offsetBytes: number, lengthBytes: number): void {
    const code = realDoor.fallocate('device-zero', this.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsetBytes, lengthBytes);
    if (code === -Errno.EOPNOTSUPP) this.write(offsetBytes, Buffer.alloc(lengthBytes));
    else if (code < 0) throw new Error(`zeros at ${offsetBytes} failed with ${code}`);
  }

  close(): void {
    fs.closeSync(this.fd);
  }
}
