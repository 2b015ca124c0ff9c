/**
 * The holder's log: lines of the same shape as the server's, written to standard error.
 *
 * Not the logging library of the server: the holder must survive a full disk, a closed terminal and a bug in anything
 * that it loads. A line that cannot be written is dropped; nothing the holder does depends on its log.
 */
import { writeSync } from 'node:fs';

import type { LogLevel } from './options.js';

const LEVEL_NUMBERS = { trace: 10, debug: 20, info: 30, warn: 40, error: 50, fatal: 60 } as const satisfies Record<LogLevel, number>;

export type HolderLog = (
  level: LogLevel,
  message: string,
  fields?: Readonly<Record<string, string | number | boolean | null>>,
) => void;

export function holderLog(threshold: LogLevel, fd = 2): HolderLog {
  return (level, message, fields = {}) => {
    if (LEVEL_NUMBERS[level] < LEVEL_NUMBERS[threshold]) return;
    const line = { level: LEVEL_NUMBERS[level], time: new Date().toISOString(), pid: process.pid, name: 'holder', ...fields, msg: message };
    try {
      writeSync(fd, `${JSON.stringify(line)}\n`);
    } catch {
      // See the head of this file: there is nowhere left to say it.
    }
  };
}
