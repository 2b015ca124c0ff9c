/**
 * Conformance: what reads, writes, flushes, discards and locks do to disks and files. What QEMU and loop devices rely on.
 *
 * Content is compared with a plain copy in memory. All clones here are clones of an image that is not zero, so that a
 * block that falls through where it must not is seen.
 */
import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';

import { sha256Of } from '../support/images.js';
import { FileAgent } from '../support/model/file-agent.js';
import { firstDifference, patternBytes } from '../support/model/pattern.js';
import { IMAGE_BYTES, imageBytes } from './conformance-context.js';
import type { Conformance } from './conformance-context.js';

const { O_RDONLY, O_RDWR, O_CREAT, O_DIRECT, O_DSYNC, O_SYNC, O_TRUNC } = constants;
const RWF_DSYNC = 2;
const BLOCK_BYTES = 4096;
const SECTOR_BYTES = 512;
const MIB = 1024 * 1024;
const KEEP_SIZE = 1;
const PUNCH_HOLE = 2 + KEEP_SIZE;
const ZERO_RANGE = 0x10;
const COLLAPSE_RANGE = 8;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const OFFSETS: readonly (readonly [offset: number, length: number])[] = [
  [0, 1], [1, 1], [511, 2], [4095, 2], [4096, 4096], [4097, 4094], [8191, 4098], [3 * BLOCK_BYTES + 100, 10 * BLOCK_BYTES], [MIB - 3, 7],
  [MIB + 5, 100], [9 * MIB - 1, 3 * MIB + 2], [IMAGE_BYTES - 1, 1], [IMAGE_BYTES - 1536, 1536], [IMAGE_BYTES - 5000, 5000],
];

/** The same ranges in whole sectors, as direct I/O has them. */
const SECTORS = OFFSETS.map(([offset, length]) => {
  const begin = Math.floor(offset / SECTOR_BYTES) * SECTOR_BYTES;
  return [begin, Math.ceil((offset + length) / SECTOR_BYTES) * SECTOR_BYTES - begin] as const;
});

export function conformanceOfData(context: () => Conformance): void {
  async function compare(fd: number, expected: Buffer, offset: number, agent = context().agent): Promise<void> {
    for (let done = 0; done < expected.length; done += MIB) {
      const piece = expected.subarray(done, done + MIB);
      expect(firstDifference(piece, await agent.call('pread', fd, piece.length, offset + done), offset + done)).toBeNull();
    }
  }

  /** A clone, its content, and a handle of it. */
  async function openClone(flags = O_RDWR): Promise<{ readonly name: string; readonly path: string; readonly fd: number; readonly content: Buffer }> {
    const { agent, at, container, cloneOfImage } = context();
    const name = await cloneOfImage();
    return { name, path: join(container, name), fd: await agent.call('open', at(name), flags, 0), content: imageBytes(0, IMAGE_BYTES) };
  }

  it('reads a clone as its source is, at any offset, buffered and direct, with copy-on-read and without', async () => {
    const { agent, at, cloneOfImage } = context();
    for (const copyOnRead of [false, true]) {
      const name = await cloneOfImage({ copyOnRead });
      for (const flags of [O_RDONLY, O_RDONLY | O_DIRECT]) {
        const fd = await agent.call('open', at(name), flags, 0);
        for (const [offset, length] of (flags & O_DIRECT) === 0 ? OFFSETS : SECTORS) await compare(fd, imageBytes(offset, length), offset);
        await compare(fd, imageBytes(0, IMAGE_BYTES), 0);
        expect(await agent.call('pread', fd, 2048, IMAGE_BYTES - 1024)).toHaveLength(1024);
        expect(await agent.call('pread', fd, 512, IMAGE_BYTES)).toHaveLength(0);
        expect(await agent.call('pread', fd, 512, IMAGE_BYTES + MIB)).toHaveLength(0);
        await agent.call('close', fd);
      }
    }
  });

  it('writes to a clone at any offset, buffered and direct, and touches nothing else', async () => {
    const { agent } = context();
    for (const flags of [O_RDWR, O_RDWR | O_DIRECT]) {
      const { fd, content } = await openClone(flags);
      for (const [index, [offset, length]] of ((flags & O_DIRECT) === 0 ? OFFSETS : SECTORS).entries()) {
        const data = patternBytes(1000 + index, offset, length);
        expect(await agent.call('pwrite', fd, data, offset)).toBe(length);
        data.copy(content, offset);
      }
      await compare(fd, content, 0);
      await agent.call('close', fd);
    }
  });

  it('carries requests of 1 MiB, aligned and not', async () => {
    const { agent } = context();
    for (const flags of [O_RDWR, O_RDWR | O_DIRECT]) {
      const { fd, content } = await openClone(flags);
      for (const [index, offset] of [0, 4 * MIB, 6 * MIB + 512, ...(flags === O_RDWR ? [8 * MIB + 1] : [])].entries()) {
        const data = patternBytes(2000 + index, 0, MIB);
        expect(await agent.call('pwrite', fd, data, offset)).toBe(MIB);
        data.copy(content, offset);
        expect((await agent.call('pread', fd, MIB, offset)).equals(data)).toBe(true);
      }
      await compare(fd, content, 0);
      await agent.call('close', fd);
    }
  });

  it('takes direct I/O in whole sectors only, so that QEMU finds out that it may write them', async () => {
    const { agent } = context();
    const { fd } = await openClone(O_RDWR | O_DIRECT);
    expect(await agent.outcome('pread', fd, 1, 0)).toBe('EINVAL');
    expect(await agent.outcome('pread', fd, 512, 100)).toBe('EINVAL');
    expect(await agent.outcome('pwrite', fd, Buffer.alloc(100), 0)).toBe('EINVAL');
    expect(await agent.outcome('pread', fd, 512, 512)).toBe('ok');
    expect(await agent.outcome('pwrite', fd, Buffer.alloc(512), 512)).toBe('ok');
    await agent.call('close', fd);
  });

  it('keeps the size of a disk when a write goes past its end, or somebody would cut it', async () => {
    const { agent, at } = context();
    const { name, fd, content } = await openClone();
    expect(await agent.outcome('ftruncate', fd, IMAGE_BYTES - 512)).toBe('EPERM');
    expect(await agent.outcome('open', at(name), O_RDWR | O_TRUNC, 0)).toBe('EPERM');
    expect(await agent.outcome('pwrite', fd, Buffer.from('beyond'), IMAGE_BYTES)).not.toBe('ok');
    expect(await agent.outcome('pwrite', fd, Buffer.from('beyond'), IMAGE_BYTES + 10 * MIB)).not.toBe('ok');
    expect((await agent.call('fstat', fd)).sizeBytes).toBe(IMAGE_BYTES);
    await compare(fd, content, 0);
    await agent.call('close', fd);
  });

  it('lets several processes write parts of the same un-owned blocks at once', async () => {
    const { agent, at } = context();
    const { name, fd, content } = await openClone();
    const others = await Promise.all([FileAgent.start(), FileAgent.start()]);
    try {
      const hands = [{ agent, fd }, ...await Promise.all(others.map(async (other) => ({ agent: other, fd: await other.call('open', at(name), O_RDWR | O_DIRECT, 0) })))];
      const writes: Promise<number>[] = [];
      for (let piece = 0; piece < 96; piece += 1) {
        const offset = 2 * MIB + piece * 512;
        const data = patternBytes(3000 + piece, 0, 512);
        data.copy(content, offset);
        const hand = hands[piece % hands.length]!;
        writes.push(hand.agent.call('pwrite', hand.fd, data, offset));
      }
      await Promise.all(writes);
      await compare(fd, content, 0);
    } finally {
      await Promise.all(others.map((other) => other.stop()));
      await agent.call('close', fd);
    }
  });

  it('flushes on fsync and fdatasync, and takes durable writes', async () => {
    const { agent, at } = context();
    const { name, fd, content } = await openClone();
    const data = patternBytes(4000, 0, 10_000);
    await agent.call('pwriteWithFlags', fd, data, 5000, RWF_DSYNC);
    data.copy(content, 5000);
    for (const [index, flags] of [O_DSYNC, O_SYNC, O_DSYNC | O_DIRECT].entries()) {
      const durable = await agent.call('open', at(name), O_RDWR | flags, 0);
      const piece = (flags & O_DIRECT) === 0 ? data : data.subarray(0, 9 * SECTOR_BYTES);
      await agent.call('pwrite', durable, piece, (3 + index) * MIB + SECTOR_BYTES);
      piece.copy(content, (3 + index) * MIB + SECTOR_BYTES);
      await agent.call('close', durable);
    }
    await agent.call('fsync', fd);
    await agent.call('fdatasync', fd);
    await compare(fd, content, 0);
    await agent.call('close', fd);
    const directory = await agent.call('open', at('.'), O_RDONLY, 0);
    await agent.call('fsync', directory);
    await agent.call('close', directory);
  });

  it('punches holes and zeroes ranges to zeros, never to the source, in parts of blocks too', async () => {
    const { agent, abilities } = context();
    const { fd, content } = await openClone();
    for (const [index, mode] of [PUNCH_HOLE, ZERO_RANGE, ZERO_RANGE + KEEP_SIZE].entries()) {
      for (const [offset, length] of OFFSETS) {
        const from = (offset + index * 5 * MIB) % (IMAGE_BYTES - length + 1);
        expect(await agent.outcome('fallocate', fd, mode, from, length)).toBe(abilities.fallocate ? 'ok' : 'EOPNOTSUPP');
        if (abilities.fallocate) content.fill(0, from, from + length);
      }
      await compare(fd, content, 0);
    }
    const data = patternBytes(5000, 0, 3000);
    await agent.call('pwrite', fd, data, 4000);
    data.copy(content, 4000);
    await compare(fd, content, 0);
    await agent.call('close', fd);
  });

  it('allocates without changing content, and refuses the modes that it does not have', async () => {
    const { agent, at, abilities } = context();
    const allowed = abilities.fallocate ? 'ok' : 'EOPNOTSUPP';
    const { fd, content } = await openClone();
    expect(await agent.outcome('fallocate', fd, KEEP_SIZE, MIB, 3 * MIB)).toBe(allowed);
    expect(await agent.outcome('fallocate', fd, 0, 100, 5000)).toBe(allowed);
    expect(await agent.outcome('fallocate', fd, COLLAPSE_RANGE, 0, 4096)).toBe('EOPNOTSUPP');
    expect((await agent.call('fstat', fd)).sizeBytes).toBe(IMAGE_BYTES);
    await compare(fd, content, 0);
    await agent.call('close', fd);
    const file = await agent.call('open', at('allocated'), O_RDWR | O_CREAT, 0o600);
    await agent.call('pwrite', file, Buffer.from('abc'), 0);
    expect(await agent.outcome('fallocate', file, 0, 0, 10_000)).toBe(allowed);
    expect((await agent.call('fstat', file)).sizeBytes).toBe(abilities.fallocate ? 10_000 : 3);
    expect(await agent.outcome('fallocate', file, KEEP_SIZE, 0, MIB)).toBe(allowed);
    expect((await agent.call('fstat', file)).sizeBytes).toBe(abilities.fallocate ? 10_000 : 3);
    await agent.call('close', file);
  });

  it('finds data and holes, and calls nothing a hole that is not zero', async () => {
    const { agent, abilities } = context();
    const { fd, content } = await openClone();
    const data = patternBytes(6000, 0, 100);
    await agent.call('pwrite', fd, data, 10 * MIB + 5);
    data.copy(content, 10 * MIB + 5);
    if (abilities.fallocate) {
      await agent.call('fallocate', fd, PUNCH_HOLE, 4 * MIB - 10, 2 * MIB);
      content.fill(0, 4 * MIB - 10, 6 * MIB - 10);
    }
    let holes = 0;
    for (let offset = 0; offset < IMAGE_BYTES;) {
      const hole = await agent.call('seek', fd, offset, SEEK_HOLE);
      if (hole >= IMAGE_BYTES) break;
      const next = await agent.outcome('seek', fd, hole, SEEK_DATA);
      const dataAt = next === 'ok' ? await agent.call('seek', fd, hole, SEEK_DATA) : IMAGE_BYTES;
      expect(next === 'ok' || next === 'ENXIO').toBe(true);
      expect(dataAt).toBeGreaterThan(hole);
      expect(content.subarray(hole, dataAt).every((byte) => byte === 0)).toBe(true);
      holes += dataAt - hole;
      offset = dataAt;
    }
    if (abilities.seekDataHole) expect(holes).toBeGreaterThan(3 * MIB);
    else expect(holes).toBe(0);
    expect(await agent.call('seek', fd, 0, SEEK_DATA)).toBe(0);
    expect(await agent.call('seek', fd, 5 * MIB + 1, SEEK_DATA)).toBeGreaterThanOrEqual(5 * MIB + 1);
    expect(await agent.outcome('seek', fd, IMAGE_BYTES, SEEK_DATA)).toBe('ENXIO');
    expect(await agent.outcome('seek', fd, IMAGE_BYTES, SEEK_HOLE)).toBe('ENXIO');
    expect(await agent.outcome('seek', fd, IMAGE_BYTES + MIB, SEEK_DATA)).toBe('ENXIO');
    await agent.call('close', fd);
  });

  it('locks byte ranges between opens, as QEMU does', async () => {
    const { agent, at } = context();
    const { name, fd } = await openClone();
    const other = await FileAgent.start();
    try {
      const theirs = await other.call('open', at(name), O_RDWR, 0);
      const mine = await agent.call('open', at(name), O_RDWR, 0);
      expect(await agent.outcome('lock', fd, 'read', 100, 1)).toBe('ok');
      expect(await other.outcome('lock', theirs, 'read', 100, 1)).toBe('ok');
      expect(await other.outcome('lock', theirs, 'write', 100, 1)).toBe('EAGAIN');
      expect(await agent.outcome('lock', mine, 'write', 100, 1)).toBe('EAGAIN');
      expect(await other.outcome('lock', theirs, 'write', 201, 1)).toBe('ok');
      expect(await agent.outcome('lock', fd, 'read', 201, 1)).toBe('EAGAIN');
      await other.call('close', theirs);
      expect(await agent.outcome('lock', fd, 'write', 100, 101)).toBe('ok');
      expect(await agent.outcome('lock', fd, 'unlock', 0, 0)).toBe('ok');
      expect(await agent.outcome('lock', mine, 'write', 0, 0)).toBe('ok');
      await agent.call('close', mine);
    } finally {
      await other.stop();
      await agent.call('close', fd);
    }
  });

  it('maps disks never for sharing, files if the transport can', async () => {
    const { agent, at, abilities } = context();
    const { fd } = await openClone();
    expect(await agent.outcome('mapShared', fd, 4096)).toBe('ENODEV');
    await agent.call('close', fd);
    const file = await agent.call('open', at('mapped'), O_RDWR | O_CREAT, 0o600);
    await agent.call('ftruncate', file, 4096);
    expect(await agent.outcome('mapShared', file, 4096)).toBe(abilities.sharedMappings ? 'ok' : 'ENODEV');
    await agent.call('close', file);
  });

  it('grows files, with zeros in between, and forgets what a truncation cut off', async () => {
    const { agent, at } = context();
    const fd = await agent.call('open', at('grown'), O_RDWR | O_CREAT, 0o600);
    await agent.call('pwrite', fd, patternBytes(1, 0, 10_000), 0);
    await agent.call('ftruncate', fd, 5001);
    await agent.call('ftruncate', fd, 20_000);
    await compare(fd, Buffer.concat([patternBytes(1, 0, 5001), Buffer.alloc(14_999)]), 0);
    await agent.call('pwrite', fd, Buffer.from('end'), 5 * MIB + 1);
    expect((await agent.call('fstat', fd)).sizeBytes).toBe(5 * MIB + 4);
    await compare(fd, Buffer.alloc(5 * MIB + 1 - 20_000), 20_000);
    await agent.call('close', fd);
  });

  it('cuts and grows a clone without showing old or foreign content again', async () => {
    const { agent, at, control } = context();
    const { name, path, fd, content } = await openClone();
    await agent.call('pwrite', fd, patternBytes(7000, 0, 2 * MIB), 11 * MIB);
    patternBytes(7000, 0, 2 * MIB).copy(content, 11 * MIB);
    await agent.call('close', fd);
    const cut = 11 * MIB + 3 * 512;
    await expect.poll(async () => (await control.show(path)).openCount).toBe(0);
    await control.resize(path, cut);
    await control.resize(path, IMAGE_BYTES + MIB);
    const again = await agent.call('open', at(name), O_RDWR, 0);
    await compare(again, Buffer.concat([content.subarray(0, cut), Buffer.alloc(IMAGE_BYTES + MIB - cut)]), 0);
    await agent.call('close', again);
  });

  it('gives a clone of a live, open disk the content of that moment', async () => {
    const { agent, at, control, container, fresh } = context();
    const { fd, path, content } = await openClone();
    await agent.call('pwrite', fd, patternBytes(8000, 0, 70_000), 123);
    patternBytes(8000, 0, 70_000).copy(content, 123);
    const snapshot = Buffer.from(content);
    const name = fresh('of-live');
    await control.clone({ source: path, targets: [join(container, name)], fill: false, copyOnRead: false });
    await agent.call('pwrite', fd, patternBytes(8001, 0, 70_000), 35_000);
    patternBytes(8001, 0, 70_000).copy(content, 35_000);
    const clone = await agent.call('open', at(name), O_RDWR, 0);
    await compare(clone, snapshot, 0);
    await compare(fd, content, 0);
    await agent.call('pwrite', clone, Buffer.from('only here'), 50_000);
    await compare(fd, content, 0);
    for (const open of [fd, clone]) await agent.call('close', open);
  });

  it('never writes to a source that is used where it lies', async () => {
    expect(await sha256Of(context().imageFile)).toBe(createHash('sha256').update(imageBytes(0, IMAGE_BYTES)).digest('hex'));
  });
}
