/**
 * What people see and press: progress on terminals of several widths, and Ctrl-C, with the real command on a real pty against a real daemon.
 */
import { randomFillSync } from 'node:crypto';
import { appendFileSync, readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf } from '../../blockstore/errors.js';
import type { FillInfo, JobInfo, NodeInfo } from '../../daemon/control/schemas.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { runInTerminal, type Terminal } from '../support/terminal.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const SIZE_BYTES = 32 * MIB;
const TEST_MS = 300_000;
const CURSOR_HIDDEN = '\u001b[?25l';
const CURSOR_SHOWN = '\u001b[?25h';

/** The lines that were ever to be seen, without what moves the cursor. */
function linesOf(terminal: Terminal): string[] {
  // eslint-disable-next-line no-control-regex -- control sequences are exactly what is looked for
  return terminal.shown().split(/\r|\n|\u001b\[\d*[GKJA]/u).map((line) => line.replaceAll(/\u001b\[[?\d;]*[a-z]/giu, '')).filter((line) => line !== '');
}

/** Images and layers; not the database, whose log grows with every job. */
function storeFiles(storeDir: string): string[] {
  return (readdirSync(storeDir, { recursive: true }) as string[]).filter((name) => /^(?:layers|import)\//u.test(name)).toSorted();
}

describe.skipIf(lacks('/dev/fuse', 'script'))('in a terminal', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let image: string;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: SIZE_BYTES, seed: 5 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/image']);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  const run = (columns: number, ...args: readonly string[]): Terminal =>
    runInTerminal([process.execPath, CLI_ENTRY, ...args], { env: { OFFSHOOT_SOCKET: daemon.socketPath }, columns, cleanup });

  it('Ctrl-C during flatten pauses it, gives the cursor back, and the same command goes on', { timeout: TEST_MS }, async () => {
    await daemon.json(['clone', 'vms/image', 'vms/flat']);
    const terminal = run(100, 'flatten', 'vms/flat', '--rate', '1M');
    await terminal.see(/flatten vms\/flat {2}[█░]+ {2}\d+ % /u);
    terminal.pressCtrlC();
    expect(await terminal.ended()).toBe(130);
    expect(terminal.shown()).toContain('offshoot flatten vms/flat goes on');
    expect(terminal.shown().lastIndexOf(CURSOR_SHOWN)).toBeGreaterThan(terminal.shown().lastIndexOf(CURSOR_HIDDEN));
    expect((await daemon.json<FillInfo>(['fill', 'status', 'vms/flat'])).state).toBe('paused');
    const again = run(100, 'flatten', 'vms/flat', '--rate', 'unlimited');
    expect(await again.ended()).toBe(0);
    expect(again.shown()).toContain('vms/flat is independent');
    expect(readFileSync(daemon.path('vms/flat')).equals(readFileSync(image))).toBe(true);
  });

  it('Ctrl-C during an import cancels it, and nothing of it is left', { timeout: TEST_MS }, async () => {
    const large = join(makeTempDir('large', cleanup), 'large.img');
    const chunk = randomFillSync(Buffer.alloc(32 * MIB));
    for (let i = 0; i < 32; i += 1) appendFileSync(large, chunk);
    const before = storeFiles(daemon.storeDir);
    // A machine may be so fast that it is done before the key is pressed; then it is taken away and begun again.
    for (let tries = 0; tries < 5; tries += 1) {
      const terminal = run(100, 'import', large, 'vms/large');
      await terminal.see(/\d+ %/u);
      terminal.pressCtrlC();
      if (await terminal.ended() === 0) {
        await daemon.json(['rm', 'vms/large']);
        continue;
      }
      expect(await terminal.ended()).toBe(exitCodeOf.cancelled);
      expect(terminal.shown()).toContain('the import of vms/large was cancelled: nothing of it is left');
      expect(await daemon.json<JobInfo[]>(['jobs'])).toContainEqual(expect.objectContaining({ kind: 'import', path: 'vms/large', state: 'cancelled' }));
      expect(await daemon.json<NodeInfo[]>(['ls', 'vms'])).not.toContainEqual(expect.objectContaining({ path: 'vms/large' }));
      expect(storeFiles(daemon.storeDir)).toEqual(before);
      return;
    }
    throw new Error('five imports of 1 GiB were done before Ctrl-C was pressed');
  });

  it('Ctrl-C while a fill is waited for ends the waiting, and the fill goes on', { timeout: TEST_MS }, async () => {
    await daemon.json(['clone', 'vms/image', 'vms/waited']);
    await daemon.json(['fill', 'start', 'vms/waited', '--rate', '1M']);
    const terminal = run(100, 'fill', 'wait', 'vms/waited');
    await terminal.see(/\d+ % /u);
    terminal.pressCtrlC();
    expect(await terminal.ended()).toBe(130);
    expect((await daemon.json<FillInfo>(['fill', 'status', 'vms/waited'])).state).toBe('running');
    await daemon.json(['fill', 'resume', 'vms/waited', '--rate', 'unlimited']);
    await daemon.json(['fill', 'wait', 'vms/waited']);
  });

  it.each([20, 40, 80])('progress is one line that fits, %i columns wide', { timeout: TEST_MS }, async (columns) => {
    const disk = `vms/a-disk-with-a-rather-long-name-${columns}`;
    await daemon.json(['clone', 'vms/image', disk]);
    const terminal = run(columns, 'flatten', disk, '--rate', '1M');
    await terminal.see(/ [1-9]\d? %/u);
    terminal.pressCtrlC();
    expect(await terminal.ended()).toBe(130);
    const lines = linesOf(terminal).filter((line) => /\d+ %/u.test(line) && !line.includes('paused'));
    expect(lines.length).toBeGreaterThan(1);
    for (const line of lines) expect(line.length, line).toBeLessThan(columns);
    // Mostly 0 %; a busy machine has done a little more when the first line is printed.
    expect(lines[0]).toMatch(new RegExp(`-${columns}  \\d %`, 'u'));
  });
});
