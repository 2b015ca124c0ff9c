/** The log of a daemon that runs for months: cut while both of its processes append to it. */
import { closeSync, existsSync, openSync, readFileSync, rmSync, mkdtempSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';

import { trimLog } from '../../daemon/server/log-keeper.js';

let storeDir: string;
let fd: number;
beforeEach(() => {
  storeDir = mkdtempSync(join(tmpdir(), 'offshoot-log-'));
  fd = openSync(join(storeDir, 'offshoot.log'), 'a');
});
afterEach(() => {
  closeSync(fd);
  rmSync(storeDir, { recursive: true, force: true });
});
const logText = (name = 'offshoot.log'): string => readFileSync(join(storeDir, name), 'utf8');

it('is cut when it is too long, keeps what it had beside it, and goes on from its beginning', async () => {
  writeSync(fd, 'one\n'.repeat(100));
  expect(await trimLog(storeDir, 400, fd)).toBe(false);
  writeSync(fd, 'two\n');
  expect(await trimLog(storeDir, 400, fd)).toBe(true);
  expect(logText('offshoot.log.1')).toBe(`${'one\n'.repeat(100)}two\n`);
  writeSync(fd, 'three\n');
  expect(logText()).toBe('three\n');
});

it('is left alone when this process logs elsewhere', async () => {
  const elsewhere = openSync(join(storeDir, 'other'), 'a');
  writeSync(elsewhere, 'x'.repeat(500));
  writeSync(fd, 'y'.repeat(500));
  expect(await trimLog(storeDir, 400, elsewhere)).toBe(false);
  closeSync(elsewhere);
  expect(logText()).toHaveLength(500);
  expect(existsSync(join(storeDir, 'offshoot.log.1'))).toBe(false);
});
