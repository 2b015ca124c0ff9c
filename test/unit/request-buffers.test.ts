/** Buffers that the kernel copies requests into: their pages must be there whenever it does, or a death at that moment costs the request (see daemon/transport/kernel/io-worker.ts). */
import { readFileSync } from 'node:fs';

import { expect, it } from 'vitest';

import { IoBuffer, keepPages } from '../../blockstore/hot/door.js';

/** The flags of each mapping that has a part of the buffer, as the kernel lists them. */
function flagsOf({ address, lengthBytes }: IoBuffer): string[][] {
  const flags: string[][] = [];
  let concerns = false;
  for (const line of readFileSync('/proc/self/smaps', 'utf8').split('\n')) {
    const [, from, to] = /^([0-9a-f]+)-([0-9a-f]+) /u.exec(line) ?? [];
    if (from !== undefined && to !== undefined) concerns = Number.parseInt(from, 16) < address + lengthBytes && Number.parseInt(to, 16) > address;
    else if (concerns && line.startsWith('VmFlags:')) flags.push(line.split(/\s+/u).slice(1));
  }
  return flags;
}

it('are not given to children, so that a fork does not make their pages read-only', () => {
  const buffer = new IoBuffer(1024 * 1024);
  expect(flagsOf(buffer).length).toBeGreaterThan(0);
  expect(flagsOf(buffer).every((flags) => flags.includes('dc'))).toBe(false);
  expect(keepPages(buffer)).toBe(true);
  expect(flagsOf(buffer).every((flags) => flags.includes('dc'))).toBe(true);
});
