/**
 * The end of a log, for the error of a daemon that died without a word of its own.
 *
 * Used by the launcher for the holder and by the holder for its first server. Only what was written since a given size counts:
 * what an earlier daemon said explains nothing.
 */
import { closeSync, fstatSync, openSync, readSync, statSync } from 'node:fs';

const WORDS_BYTES_MAX = 2_000;

/** 0 for a file that is not there or may not be looked at. */
export function sizeOf(path: string): number {
  try {
    return statSync(path).size;
  } catch {
    // Whoever needs the file says better what is wrong with it.
    return 0;
  }
}

/** At most the last 2,000 bytes of what the open file holds beyond `fromBytes`. */
export function lastWordsOf(fd: number, fromBytes: number): string {
  const sizeBytes = fstatSync(fd).size;
  const start = Math.max(fromBytes, sizeBytes - WORDS_BYTES_MAX);
  const words = Buffer.alloc(Math.max(0, sizeBytes - start));
  return words.toString('utf8', 0, readSync(fd, words, 0, words.length, start)).trim();
}

/** The same of a file by its path; empty when it has not grown. */
export function lastWordsIn(path: string, fromBytes: number): string {
  if (sizeOf(path) <= fromBytes) return '';
  const fd = openSync(path, 'r');
  try {
    return lastWordsOf(fd, fromBytes);
  } finally {
    closeSync(fd);
  }
}
