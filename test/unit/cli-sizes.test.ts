/** Sizes, rates and durations: what people write, and what they read. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { OffshootError } from '../../blockstore/errors.js';
import {
  formatBytes, formatBytesExactly, formatBytesOf, formatCount, formatDuration, formatPercent, formatTime, formatTimeLeft, parseDiskSize, parseRate, parseSize,
} from '../../cli/sizes.js';

const KIB = 1024;
const MIB = 1024 ** 2;
const GIB = 1024 ** 3;
const TIB = 1024 ** 4;

function messageOf(parse: () => unknown): string {
  try {
    return `accepted as ${String(parse())}`;
  } catch (error) {
    if (error instanceof OffshootError && error.kind === 'invalid-argument') return error.message;
    throw error;
  }
}

describe('sizes that are written', () => {
  it.each<[string, number]>([
    ['0', 0], ['1', 1], ['4096', 4096], ['512b', 512], ['10B', 10], ['1k', KIB], ['1K', KIB], ['1KiB', KIB], ['512M', 512 * MIB], ['10G', 10 * GIB], ['10g', 10 * GIB],
    ['10GiB', 10 * GIB], ['10 GiB', 10 * GIB], [' 2T ', 2 * TIB], ['1.5G', 1.5 * GIB], ['0.5K', 512], ['16TiB', 16 * TIB], ['1P', 1024 * TIB],
  ])('%j is %i bytes', (text, bytes) => { expect(parseSize(text)).toBe(bytes); });

  it.each<[string, RegExp]>([
    ['', /^'' is not a size: write bytes, or a number with K, M, G or T, as in 10G$/u],
    ['big', /is not a size/u], ['-1', /is not a size/u], ['1e9', /is not a size/u], ['0x10', /is not a size/u], ['10GG', /is not a size/u], ['1,000', /is not a size/u], ['.5G', /is not a size/u],
    ['10G\n10G', /^'10G\\n10G' is not a size/u], ['10iB', /is not a size/u],
    ['10GB', /^'10GB' could mean powers of 1000 or of 1024: write 10G or 10GiB for powers of 1024, or the bytes$/u],
    ['0.3K', /is not a whole number of bytes/u], ['1.5', /is not a whole number of bytes/u], ['99999999P', /is too large a size/u],
  ])('%j is refused', (text, message) => { expect(messageOf(() => parseSize(text))).toMatch(message); });

  it('gives back every number of bytes', () => {
    fc.assert(fc.property(fc.maxSafeNat(), (bytes) => { expect(parseSize(String(bytes))).toBe(bytes); }));
  });

  it('must be whole sectors for a disk, from one sector to the largest disk', () => {
    expect(parseDiskSize('512')).toBe(512);
    expect(parseDiskSize('64T')).toBe(64 * TIB);
    expect(messageOf(() => parseDiskSize('10000'))).toBe("'10000' is not a multiple of 512 bytes, as the size of a disk must be: the next one is 10240");
    expect(messageOf(() => parseDiskSize('0'))).toBe("'0' is smaller than the smallest disk (512 bytes)");
    expect(messageOf(() => parseDiskSize('65T'))).toBe("'65T' is larger than the largest disk (64 TiB)");
  });
});

describe('rates that are written', () => {
  it.each<[string, number | null]>([['100M', 100 * MIB], ['100M/s', 100 * MIB], ['1048576', MIB], ['unlimited', null], ['none', null], ['0', null]])('%j', (text, rate) => {
    expect(parseRate(text)).toBe(rate);
  });
  it('refuses others, naming both ways', () => {
    expect(messageOf(() => parseRate('fast'))).toBe("'fast' is not a rate: write bytes per second as in 100M, or unlimited");
  });
});

describe('what is read', () => {
  it.each<[number, string]>([
    [0, '0 B'], [1, '1 B'], [1023, '1023 B'], [1024, '1 KiB'], [1536, '1.5 KiB'], [MIB - 1, '1 MiB'], [512 * MIB, '512 MiB'], [1023 * MIB, '1023 MiB'], [10 * GIB, '10 GiB'], [1.46 * GIB, '1.46 GiB'],
    [2 * TIB, '2 TiB'], [64 * TIB, '64 TiB'],
  ])('%i bytes are %s', (bytes, text) => { expect(formatBytes(bytes)).toBe(text); });

  it('never shows 1024 of a unit, nor more than four digits', () => {
    fc.assert(fc.property(fc.integer({ min: 0, max: 64 * TIB }), (bytes) => {
      expect(formatBytes(bytes)).toMatch(/^(?:\d{1,3}|10[01]\d|102[0-3]|\d{1,2}\.\d{1,2}) (?:B|KiB|MiB|GiB|TiB)$/u);
    }));
  });

  it('writes exact, partial and counted amounts', () => {
    expect(formatBytesExactly(10 * GIB)).toBe('10 GiB (10,737,418,240 bytes)');
    expect(formatBytesExactly(512)).toBe('512 bytes');
    expect(formatBytesOf(4.2 * GIB, 10 * GIB)).toBe('4.2 of 10 GiB');
    expect(formatBytesOf(300 * MIB, 10 * GIB)).toBe('300 MiB of 10 GiB');
    expect([formatCount(7), formatCount(1000), formatCount(1234567)]).toEqual(['7', '1,000', '1,234,567']);
  });

  it('says 100 % only when all is done', () => {
    expect([formatPercent(0, 100), formatPercent(99_999, 100_000), formatPercent(5, 5), formatPercent(0, 0), formatPercent(7, 5)]).toEqual(['0 %', '99 %', '100 %', '100 %', '100 %']);
  });

  it.each<[number, string]>([
    [0, '0 ms'], [1.234, '1.2 ms'], [85.4, '85 ms'], [999, '999 ms'], [2345, '2.3 s'], [59_940, '59.9 s'], [59_960, '1 min 0 s'], [65_000, '1 min 5 s'], [7_380_000, '2 h 3 min'], [90_000_000, '1 d 1 h'],
  ])('%f ms are %s', (durationMs, text) => { expect(formatDuration(durationMs)).toBe(text); });

  it('writes what is left in whole seconds, and times without their fractions', () => {
    expect([formatTimeLeft(0.2), formatTimeLeft(4.1), formatTimeLeft(61)]).toEqual(['less than 1 s', '5 s', '1 min 1 s']);
    expect(formatTime('2026-01-02T03:04:05.678Z')).toMatch(/^2026-01-0[123] \d\d:\d\d:05$/u);
  });
});
