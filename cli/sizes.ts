/**
 * Sizes, rates and durations as people write and read them. Pure.
 *
 * Units are powers of 1024, as in qemu-img and truncate: 10G, 10GiB and 10g are the same. GB is refused, for it means
 * 10^9 to some programs and 2^30 to others.
 */
import { OffshootError } from '../blockstore/errors.js';
import { DISK_SIZE_BYTES_MAX, DISK_SIZE_UNIT_BYTES } from '../daemon/control/limits.js';
import { visible } from '../daemon/control/paths.js';

const UNITS = ['', 'K', 'M', 'G', 'T', 'P'] as const;
const SIZE = /^(?<digits>[0-9]+(?:\.[0-9]+)?) ?(?<unit>[kmgtp]?)(?<suffix>ib|b)?$/iu;

function refuse(text: string, reason: string): never {
  throw new OffshootError('invalid-argument', `'${visible(text)}' ${reason}`);
}

/** Bytes of `10G`, `512M`, `1.5T`, `4096`. */
export function parseSize(text: string): number {
  const match = SIZE.exec(text.trim());
  const { digits, unit, suffix } = match?.groups ?? {};
  if (digits === undefined || unit === undefined) return refuse(text, 'is not a size: write bytes, or a number with K, M, G or T, as in 10G');
  const letter = unit.toUpperCase();
  if (letter !== '' && suffix?.toLowerCase() === 'b') {
    return refuse(text, `could mean powers of 1000 or of 1024: write ${digits}${letter} or ${digits}${letter}iB for powers of 1024, or the bytes`);
  }
  if (letter === '' && suffix?.toLowerCase() === 'ib') return refuse(text, 'is not a size: write KiB, MiB, GiB or TiB');
  const bytes = Number(digits) * 1024 ** UNITS.indexOf(letter as (typeof UNITS)[number]);
  if (!Number.isSafeInteger(bytes)) return refuse(text, bytes > Number.MAX_SAFE_INTEGER ? 'is too large a size' : 'is not a whole number of bytes');
  return bytes;
}

/** The size of a disk: a multiple of a sector, from one sector to the largest disk. */
export function parseDiskSize(text: string): number {
  const bytes = parseSize(text);
  if (bytes > DISK_SIZE_BYTES_MAX) refuse(text, `is larger than the largest disk (${formatBytes(DISK_SIZE_BYTES_MAX)})`);
  if (bytes < DISK_SIZE_UNIT_BYTES) refuse(text, `is smaller than the smallest disk (${DISK_SIZE_UNIT_BYTES} bytes)`);
  if (bytes % DISK_SIZE_UNIT_BYTES !== 0) {
    const next = Math.ceil(bytes / DISK_SIZE_UNIT_BYTES) * DISK_SIZE_UNIT_BYTES;
    refuse(text, `is not a multiple of ${DISK_SIZE_UNIT_BYTES} bytes, as the size of a disk must be: the next one is ${next}`);
  }
  return bytes;
}

/** Bytes per second; null for `unlimited`. */
export function parseRate(text: string): number | null {
  const trimmed = text.trim().replace(/\/s$/iu, '');
  if (/^(?:0|none|unlimited)$/iu.test(trimmed)) return null;
  try {
    return parseSize(trimmed);
  } catch (error) {
    if (error instanceof OffshootError) return refuse(text, 'is not a rate: write bytes per second as in 100M, or unlimited');
    throw error;
  }
}

function scale(bytes: number): { readonly divisor: number; readonly unit: string } {
  let index = 0;
  while (index < UNITS.length - 1 && bytes >= 1024 ** (index + 1)) index += 1;
  // What would be rounded to 1024 of a unit is shown as 1 of the next.
  if (index > 0 && index < UNITS.length - 1 && Number((bytes / 1024 ** index).toPrecision(4)) >= 1024) index += 1;
  return { divisor: 1024 ** index, unit: index === 0 ? 'B' : `${UNITS[index] ?? ''}iB` };
}

/** At most three significant digits, or the whole part when that has four. */
function digits(value: number): string {
  if (value >= 100) return String(Math.round(value));
  return String(Number(value.toPrecision(3)));
}

/** `10 GiB`, `1.46 GiB`, `512 B`. */
export function formatBytes(bytes: number): string {
  const { divisor, unit } = scale(bytes);
  return `${digits(bytes / divisor)} ${unit}`;
}

/** `1.2 of 10 GiB`, or with two units when the second would hide the first. */
export function formatBytesOf(doneBytes: number, totalBytes: number): string {
  const done = scale(doneBytes);
  const total = scale(totalBytes);
  if (done.unit === total.unit) return `${digits(doneBytes / done.divisor)} of ${formatBytes(totalBytes)}`;
  return `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}`;
}

/** `10 GiB (10,737,418,240 bytes)`. */
export function formatBytesExactly(bytes: number): string {
  return bytes < 1024 ? `${bytes} bytes` : `${formatBytes(bytes)} (${formatCount(bytes)} bytes)`;
}

export function formatRate(bytesPerSecond: number): string {
  return `${formatBytes(Math.round(bytesPerSecond))}/s`;
}

/** Thousands set apart, as in 10,737,418,240. */
export function formatCount(count: number): string {
  return String(count).replace(/\B(?=(?:\d{3})+$)/gu, ',');
}

/** Rounded down, so that 100 % means all. */
export function formatPercent(doneBytes: number, totalBytes: number): string {
  if (totalBytes <= 0) return '100 %';
  return `${Math.floor(Math.min(1, doneBytes / totalBytes) * 100)} %`;
}

/** `85 ms`, `2.3 s`, `1 min 5 s`, `2 h 3 min`, `3 d 4 h`. */
export function formatDuration(durationMs: number): string {
  if (durationMs < 1000) return durationMs < 10 ? `${Number(durationMs.toFixed(1))} ms` : `${Math.round(durationMs)} ms`;
  const seconds = durationMs / 1000;
  if (seconds < 59.95) return `${Number(seconds.toFixed(1))} s`;
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** What is left, in whole seconds: nobody needs tenths of a guess. */
export function formatTimeLeft(seconds: number): string {
  return seconds < 1 ? 'less than 1 s' : formatDuration(Math.ceil(seconds) * 1000);
}

/** `2025-01-31 14:05:09`, in the time zone of whoever reads it. */
export function formatTime(iso: string): string {
  const time = new Date(iso);
  const two = (value: number): string => String(value).padStart(2, '0');
  return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())} ${two(time.getHours())}:${two(time.getMinutes())}:${two(time.getSeconds())}`;
}
