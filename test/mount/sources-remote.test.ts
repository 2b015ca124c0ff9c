/**
 * A source on a file system that somebody else answers for, seen from the mount: that it is read right, and what of it is felt when it hangs,
 * fails, and comes back. On both transports.
 *
 * The source is a file on a FUSE mount whose server can be stopped (`faulty-source.ts`): a read of it then waits in the kernel where no signal
 * reaches. What must not be felt is asserted by counting: operations that complete while the source hangs.
 */
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { DiskInfo, FillInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon, type TestTransport } from '../support/daemon.js';
import { FAULTY_SOURCE_NEEDS, FaultySource } from '../support/faulty-source.js';
import { makePatternImage, patternBlock } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { isAlive, processesNaming, waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 12 * MIB;
const SEED = 71;
const OTHER_SEED = 72;
/** Every fourth block of the source. */
const isHole = (block: number): boolean => block % 4 === 3;
const SOURCE_TIMEOUT_SECONDS = 2;
const PATIENCE_MS = 30_000;

/** One block of a file, by dd, which is killed if it takes too long. */
async function readBlock(file: string, block: number): Promise<CommandResult & { readonly data: Buffer }> {
  const out = `${file.replaceAll('/', '_').slice(-40)}-${block}`;
  const target = join(scratch, out);
  const result = await command('dd', [`if=${file}`, `of=${target}`, `bs=${BLOCK_BYTES}`, `skip=${block}`, 'count=1', 'iflag=direct'], { timeoutMs: PATIENCE_MS });
  return { ...result, data: result.code === 0 ? readFileSync(target) : Buffer.alloc(0) };
}

async function write(file: string, atBytes: number, text: string): Promise<CommandResult> {
  return await command('dd', [`of=${file}`, `seek=${atBytes}`, 'oflag=seek_bytes', 'conv=notrunc', `bs=${text.length}`, 'count=1'], { input: text, timeoutMs: PATIENCE_MS });
}

let scratch = '';

describe.skipIf(lacks(...FAULTY_SOURCE_NEEDS, 'fio')).each<TestTransport>(['kernel', 'fuse-native'])('a source on a remote file system, transport %s', { timeout: 180_000 }, (transport) => {
  const cleanup = createCleanup();
  const ofTest = createCleanup();
  let round = 0;
  let base = '';
  let daemon: TestDaemon;
  let source: FaultySource;
  let image: string;
  let other: string;

  beforeAll(async () => {
    scratch = makeTempDir('scratch', cleanup);
    image = join(scratch, 'image');
    other = join(scratch, 'other');
    makePatternImage(image, { sizeBytes: SIZE_BYTES, seed: SEED, isHole });
    makePatternImage(other, { sizeBytes: SIZE_BYTES, seed: OTHER_SEED });
    daemon = await startTestDaemon({ transport, cleanup, sourceTimeoutSeconds: SOURCE_TIMEOUT_SECONDS });
    await daemon.json(['container', 'create', 'c']);
    await daemon.json(['import', other, 'c/other-base']);
    await daemon.json(['clone', 'c/other-base', 'c/other']);
  }, 120_000);

  // One for each test: what was read of it once is in the kernel's cache, and would be read although it hangs.
  beforeEach(async () => {
    round += 1;
    base = `c/base-${round}`;
    source = await FaultySource.start(image, ofTest);
    await daemon.json(['import', source.file, base, '--in-place']);
  }, 60_000);

  afterEach(() => ofTest.run(), 60_000);
  afterAll(() => cleanup.run(), 60_000);

  /** What says nothing new on a transport whose server takes the mount with it. */
  function kernelOnly(name: string, body: () => Promise<void>): void {
    if (transport === 'kernel') it(name, body);
  }

  const disk = (name: string): string => daemon.path(`c/${name}`);
  const clone = async (name: string, ...options: string[]): Promise<string> => {
    await daemon.json(['clone', base, `c/${name}`, ...options]);
    return disk(name);
  };
  const fill = async (name: string): Promise<FillInfo> => await daemon.json<FillInfo>(['fill', 'status', `c/${name}`]);
  const filled = async (name: string): Promise<void> => {
    const end = await daemon.cli(['fill', 'wait', `c/${name}`], { timeoutMs: PATIENCE_MS });
    expect(end.code, end.stderr).toBe(0);
  };

  kernelOnly('is read by a process that is not the server, and right: whole, in parts, filled, with copy-on-read', async () => {
    await mustRun('cmp', [daemon.path(base), image]);
    const { serverPid } = await daemon.status();
    const open = await mustRun('sh', ['-c', `ls -l /proc/${serverPid}/fd /proc/${serverPid}/map_files 2>/dev/null | grep -c "$0" || true`, source.mountDir]);
    expect(open.stdout.trim()).toBe('0');
    const copying = await clone('copying', '--copy-on-read');
    await mustRun('cmp', [copying, image]);
    const { unownedBytes } = await daemon.json<DiskInfo>(['show', 'c/copying']);
    expect(unownedBytes).toBe(0);
    const partial = await clone('partial');
    const expected = readFileSync(image);
    for (const [at, text] of [[5, 'within the first block'], [3 * BLOCK_BYTES - 4, 'over a boundary, into a hole'], [SIZE_BYTES - 9, 'last ones']] as const) {
      expect((await write(partial, at, text)).code).toBe(0);
      expected.write(text, at);
    }
    expect((await mustRun('sha256sum', [partial])).stdout.split(' ')[0]).toBe((await mustRun('sha256sum', [], { input: expected })).stdout.split(' ')[0]);
    await clone('filling');
    await daemon.json(['fill', 'start', 'c/filling']);
    await filled('filling');
    await mustRun('cmp', [disk('filling'), image]);
    const shown = await daemon.json<DiskInfo>(['show', 'c/filling']);
    // Also into the store, by a copy of it.
    await daemon.json(['import', source.file, 'c/copied']);
    await mustRun('cmp', [disk('copied'), image]);
    expect((await daemon.json<DiskInfo>(['show', 'c/copied'])).allocatedBytes).toBeLessThanOrEqual(SIZE_BYTES);
    // Holes stay holes although nobody asked the source for them.
    expect(shown.allocatedBytes).toBeLessThanOrEqual((SIZE_BYTES * 3) / 4 + MIB);
    expect(shown.backingChain).toHaveLength(1);
  });

  it('that fails is EIO for what needs it, keeps nothing as zeros, and is right again afterwards', async () => {
    const failing = await clone('failing', '--copy-on-read');
    const good = await readBlock(failing, 0);
    expect(good.data.equals(patternBlock(SEED, 0))).toBe(true);
    source.fail(true);
    const bad = await readBlock(failing, 2900);
    expect(bad.code).not.toBe(0);
    expect(bad.stderr).toMatch(/Input\/output error/);
    expect((await readBlock(failing, 0)).data.equals(patternBlock(SEED, 0))).toBe(true);
    await clone('fill-fails');
    await daemon.json(['fill', 'start', 'c/fill-fails']);
    expect(await waitUntil(async () => (await fill('fill-fails')).state === 'failed', PATIENCE_MS)).toBe(true);
    expect((await fill('fill-fails')).message).toMatch(/cannot be read at byte \d+/);
    source.fail(false);
    expect((await readBlock(failing, 2900)).data.equals(patternBlock(SEED, 2900))).toBe(true);
    await mustRun('cmp', [failing, image]);
    await daemon.json(['fill', 'start', 'c/fill-fails']);
    await filled('fill-fails');
    await mustRun('cmp', [disk('fill-fails'), image]);
  });

  it('that hangs is felt by who needs it and by nobody else, and all goes on when it comes back', async () => {
    const hanging = await clone('hanging');
    expect((await write(hanging, 7 * BLOCK_BYTES, 'o'.repeat(BLOCK_BYTES))).code).toBe(0);
    await clone('fill-waits');
    const before = await fioOps(disk('other'), transport);

    await source.hang();
    await daemon.json(['fill', 'start', 'c/fill-waits']);
    const started = performance.now();
    const waiting = Array.from({ length: 6 }, (_, i) => readBlock(hanging, 2000 + i * 4));
    // A write in part needs the source too; owned blocks and whole ones do not.
    const partial = write(hanging, 3000 * BLOCK_BYTES + 5, 'partial');
    const during = await fioOps(disk('other'), transport);
    process.stdout.write(`${transport}: I/O of another disk while a source hangs, to before: ${(during / before).toFixed(2)} (${during} of ${before} reads in 1.5 s)\n`);
    expect(during).toBeGreaterThan(100);
    expect((await readBlock(hanging, 7)).data.toString()).toBe('o'.repeat(BLOCK_BYTES));
    expect((await write(hanging, 9 * BLOCK_BYTES, 'w'.repeat(BLOCK_BYTES))).code).toBe(0);
    // What passes the disk's gate waits for nobody.
    await daemon.json(['clone', 'c/hanging', 'c/clone-of-hanging']);
    await daemon.json(['resize', 'c/hanging', String(SIZE_BYTES + MIB)]);
    expect((await readBlock(disk('clone-of-hanging'), 9)).data.toString()).toBe('w'.repeat(BLOCK_BYTES));
    for (const result of await Promise.all(waiting)) expect(result.stderr).toMatch(/Input\/output error/);
    expect((await partial).stderr).toMatch(/Input\/output error/);
    expect(performance.now() - started).toBeGreaterThan(SOURCE_TIMEOUT_SECONDS * 1000 - 100);
    const { warnings } = await daemon.status();
    expect(warnings.join('\n')).toContain(source.file);
    expect(warnings.join('\n')).toContain('c/hanging');
    expect(await waitUntil(async () => (await fill('fill-waits')).message?.includes('waiting for the source') === true, PATIENCE_MS)).toBe(true);
    expect(await fill('fill-waits')).toMatchObject({ state: 'running' });
    const importing = await daemon.cli(['import', source.file, 'c/never']);
    expect(importing.stderr).toMatch(/did not answer/);
    expect(importing.code).toBe(9);
    // A fill that waits can be paused and resumed, and others run.
    expect(await daemon.json(['fill', 'pause', 'c/fill-waits'])).toMatchObject({ state: 'paused' });
    expect(await daemon.json(['fill', 'resume', 'c/fill-waits'])).toMatchObject({ state: 'running' });
    await daemon.json(['clone', 'c/other-base', 'c/other-filled']);
    await daemon.json(['fill', 'start', 'c/other-filled']);
    await filled('other-filled');

    const late = readBlock(hanging, 2500);
    source.goOn();
    expect((await late).data.equals(patternBlock(SEED, 2500))).toBe(true);
    for (let i = 0; i < 6; i += 1) expect((await readBlock(hanging, 2000 + i * 4)).data.equals(patternBlock(SEED, 2000 + i * 4))).toBe(true);
    // The write that failed has changed nothing.
    expect((await readBlock(hanging, 3000)).data.equals(patternBlock(SEED, 3000))).toBe(true);
    await filled('fill-waits');
    await mustRun('cmp', [disk('fill-waits'), image]);
    expect(await waitUntil(async () => (await daemon.status()).warnings.length === 0, PATIENCE_MS)).toBe(true);
  });

  kernelOnly('that hangs keeps no server from dying and none from starting; who waited is answered by the next', async () => {
    const surviving = await clone('surviving');
    expect((await readBlock(surviving, 0)).data.equals(patternBlock(SEED, 0))).toBe(true);
    await source.hang();
    const waiting = readBlock(surviving, 1600);
    expect(await waitUntil(async () => (await daemon.status()).warnings.some((warning) => warning.includes(source.file)), PATIENCE_MS)).toBe(true);
    const next = await daemon.waitForServer(await daemon.killServer());
    expect(next).toBeGreaterThan(0);
    await mustRun('cmp', [disk('other-base'), other]);
    // Opening a disk touches no source.
    expect((await write(surviving, 11 * BLOCK_BYTES, 'w'.repeat(BLOCK_BYTES))).code).toBe(0);
    expect((await readBlock(surviving, 11)).data.toString()).toBe('w'.repeat(BLOCK_BYTES));
    source.goOn();
    const answered = await waiting;
    // Within its limit it is right; past it, it is an error; never anything else.
    if (answered.code === 0) expect(answered.data.equals(patternBlock(SEED, 1600))).toBe(true);
    else expect(answered.stderr).toMatch(/Input\/output error/);
    expect((await readBlock(surviving, 1600)).data.equals(patternBlock(SEED, 1600))).toBe(true);
  });

  kernelOnly('that hangs keeps no daemon from stopping, and leaves no process when it goes on', async () => {
    const last = await clone('last');
    await source.hang();
    const waiting = readBlock(last, 1700);
    expect((await waiting).stderr).toMatch(/Input\/output error/);
    await daemon.json(['fill', 'start', 'c/last']);
    const stopped = await daemon.cli(['daemon', 'stop'], { timeoutMs: PATIENCE_MS });
    expect(stopped.code, stopped.stderr).toBe(0);
    source.goOn();
    // A fetcher that hung in the kernel was killed, and dies as soon as the kernel lets it.
    expect(await waitUntil(() => processesNaming(daemon.mountDir).filter(isAlive).length === 0, PATIENCE_MS)).toBe(true);
    await daemon.start();
    await filled('last');
    await mustRun('cmp', [disk('last'), image]);
  });
});

/** Reads that complete in 1.5 s, sixteen at a time. */
async function fioOps(file: string, transport: TestTransport): Promise<number> {
  const child = spawn('fio', [
    '--name=other', `--filename=${file}`, '--rw=randread', '--bs=4k', '--direct=1', '--ioengine=libaio', `--iodepth=${transport === 'kernel' ? 16 : 4}`, '--time_based',
    '--runtime=1500ms', '--output-format=json', '--readonly',
  ], { stdio: ['ignore', 'pipe', 'inherit'] });
  let text = '';
  child.stdout.on('data', (chunk: Buffer) => { text += chunk.toString('utf8'); });
  await new Promise<void>((resolve) => { child.on('close', () => { resolve(); }); });
  const { jobs } = JSON.parse(text) as { jobs: { error: number; read: { total_ios: number } }[] };
  expect(jobs[0]?.error).toBe(0);
  return jobs[0]?.read.total_ios ?? 0;
}
