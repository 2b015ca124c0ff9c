/**
 * Conformance: large disks, and I/O one byte before and after each boundary at which 32-bit arithmetic would wrap.
 *
 * The sources are sparse files; a few blocks of each hold a pattern, chosen so that an offset that lost its upper bits
 * would read or overwrite one of them.
 */
import { constants } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, it } from 'vitest';

import { mustRun } from '../support/model/command.js';
import { patternBytes } from '../support/model/pattern.js';
import { importFile } from './conformance-context.js';
import type { Conformance } from './conformance-context.js';

const { O_RDWR } = constants;
const GIB = 1024 ** 3;
const TIB = 1024 ** 4;
const BLOCK_BYTES = 4096;
const BOUNDARIES = [2 * GIB, 4 * GIB, 2 * TIB, 16 * TIB] as const;
/** Bytes at both sides of a boundary that the sources have a pattern in. */
const MARGIN = 2 * BLOCK_BYTES;
const PUNCH_HOLE_KEEP_SIZE = 3;
const SEEK_DATA = 3;

function named(bytes: number): string {
  return bytes >= TIB ? `${bytes / TIB} TiB` : `${bytes / GIB} GiB`;
}

/** A sparse file with patterned neighbourhoods of the places given. */
async function writeSparse(path: string, seed: number, sizeBytes: number, places: readonly number[]): Promise<void> {
  const file = await open(path, 'w');
  try {
    for (const place of places) {
      const begin = Math.max(0, place - MARGIN);
      const length = Math.min(sizeBytes, place + MARGIN) - begin;
      if (length > 0) await file.write(patternBytes(seed, begin, length), 0, undefined, begin);
    }
    await file.truncate(sizeBytes);
  } finally {
    await file.close();
  }
}

export function conformanceOfSizes(context: () => Conformance): void {
  for (const boundary of BOUNDARIES) {
    for (const [how, sizeBytes] of [['just below', boundary - 512], ['exactly', boundary], ['just above', boundary + 512]] as const) {
      it(`reads and writes to the last byte of a disk of ${how} ${named(boundary)}`, async () => {
        const { agent, at, control, container, scratchDir, fresh } = context();
        const source = join(scratchDir, 'large');
        await writeSparse(source, 5, sizeBytes, [0, sizeBytes]);
        const image = fresh('large-image');
        const clone = fresh('large-clone');
        await importFile(control, source, join(container, image), true);
        await control.clone({ source: join(container, image), targets: [join(container, clone)], fill: false, copyOnRead: false });
        const fd = await agent.call('open', at(clone), O_RDWR, 0);
        expect((await agent.call('fstat', fd)).sizeBytes).toBe(sizeBytes);
        expect((await agent.call('pread', fd, 2 * MARGIN, sizeBytes - MARGIN)).equals(patternBytes(5, sizeBytes - MARGIN, MARGIN))).toBe(true);
        expect(await agent.call('pwrite', fd, Buffer.from('z'), sizeBytes - 1)).toBe(1);
        expect(await agent.outcome('pwrite', fd, Buffer.from('z'), sizeBytes)).not.toBe('ok');
        expect(await agent.call('pread', fd, 3, sizeBytes - 2)).toEqual(Buffer.concat([patternBytes(5, sizeBytes - 2, 1), Buffer.from('z')]));
        expect((await agent.call('pread', fd, MARGIN, 0)).equals(patternBytes(5, 0, MARGIN))).toBe(true);
        await agent.call('fsync', fd);
        await agent.call('close', fd);
        await expect.poll(async () => (await control.show(join(container, clone))).openCount).toBe(0);
        await control.remove(join(container, clone), { keepData: false, recursive: false });
        await control.remove(join(container, image), { keepData: false, recursive: false });
        await mustRun('rm', [source]);
      });
    }
  }

  it('reads, writes and discards across each boundary of one disk of more than 16 TiB', async () => {
    const { agent, at, control, container, scratchDir, abilities, fresh } = context();
    const sizeBytes = 16 * TIB + 4 * GIB + 512;
    const places = [0, GIB, ...BOUNDARIES, 4 * GIB + GIB, 16 * TIB + 2 * GIB];
    const source = join(scratchDir, 'huge');
    await writeSparse(source, 6, sizeBytes, places);
    const image = fresh('huge-image');
    const clone = fresh('huge-clone');
    await importFile(control, source, join(container, image), true);
    await control.clone({ source: join(container, image), targets: [join(container, clone)], fill: false, copyOnRead: false });
    const fd = await agent.call('open', at(clone), O_RDWR, 0);
    const expected = new Map(places.map((place) => {
      const begin = Math.max(0, place - MARGIN);
      return [begin, Buffer.from(patternBytes(6, begin, place + MARGIN - begin))];
    }));
    const compareAll = async (): Promise<void> => {
      for (const [begin, bytes] of expected) expect((await agent.call('pread', fd, bytes.length, begin)).equals(bytes), `at ${begin}`).toBe(true);
    };
    await compareAll();
    for (const [index, boundary] of BOUNDARIES.entries()) {
      const bytes = expected.get(boundary - MARGIN)!;
      for (const [offset, length] of [[boundary - 1, 1], [boundary, 1], [boundary - 3, 7], [boundary - 512, 1024], [boundary - BLOCK_BYTES, 2 * BLOCK_BYTES]] as const) {
        const data = patternBytes(100 + index, offset, length);
        await agent.call('pwrite', fd, data, offset);
        data.copy(bytes, offset - (boundary - MARGIN));
        await compareAll();
      }
      if (abilities.fallocate) {
        await agent.call('fallocate', fd, PUNCH_HOLE_KEEP_SIZE, boundary - 100, 5000);
        bytes.fill(0, MARGIN - 100, MARGIN + 4900);
        await compareAll();
      }
      expect((await agent.call('pread', fd, 100, boundary + 64 * 1024)).equals(Buffer.alloc(100))).toBe(true);
    }
    if (abilities.seekDataHole) {
      expect(await agent.call('seek', fd, 5 * GIB + 1024 ** 2, SEEK_DATA)).toBe(2 * TIB - MARGIN);
      expect(await agent.call('seek', fd, 2 * TIB + 1024 ** 2, SEEK_DATA)).toBe(16 * TIB - MARGIN);
    }
    await agent.call('fsync', fd);
    await agent.call('close', fd);
    const again = await agent.call('open', at(clone), O_RDWR, 0);
    for (const [begin, bytes] of expected) expect((await agent.call('pread', again, bytes.length, begin)).equals(bytes), `at ${begin} again`).toBe(true);
    await agent.call('close', again);
  });

  it('grows a clone over each boundary', async () => {
    const { agent, at, control, container, cloneOfImage } = context();
    const name = await cloneOfImage();
    for (const boundary of BOUNDARIES) {
      await control.resize(join(container, name), boundary + 512);
      const fd = await agent.call('open', at(name), O_RDWR, 0);
      expect((await agent.call('fstat', fd)).sizeBytes).toBe(boundary + 512);
      expect(await agent.call('pread', fd, 16, boundary - 8)).toEqual(Buffer.alloc(16));
      await agent.call('pwrite', fd, Buffer.from('over the boundary'), boundary - 8);
      expect((await agent.call('pread', fd, 17, boundary - 8)).toString()).toBe('over the boundary');
      await agent.call('close', fd);
      await expect.poll(async () => (await control.show(join(container, name))).openCount).toBe(0);
    }
  });
}
