/**
 * Disks that leave and come: export in each format, diff, send and receive between two stores, damaged and interrupted streams. Two
 * daemons with the real mount; contents are compared byte by byte.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { closeSync, createReadStream, existsSync, fsyncSync, mkdirSync, openSync, readdirSync, readFileSync, statSync, symlinkSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { StreamReader } from '../../blockstore/stream-format.js';
import { createControlClient } from '../../daemon/control/client.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { command } from '../support/model/command.js';
import { patternBytes } from '../support/model/pattern.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const MIB = 1024 * 1024;
const BLOCK = 4096;
const SIZE_BYTES = 24 * MIB;
const cleanup = createCleanup();
let here: TestDaemon;
let there: TestDaemon;
let work: string;

beforeAll(async () => {
  work = makeTempDir('transfer', cleanup);
  here = await startTestDaemon({ transport: 'kernel', cleanup });
  there = await startTestDaemon({ transport: 'kernel', cleanup });
  await ok(here, ['container', 'create', 'golden']);
  await ok(there, ['container', 'create', 'vms']);
  const image = join(work, 'image.raw');
  writeFileSync(image, '');
  truncateSync(image, SIZE_BYTES);
  const fd = openSync(image, 'r+');
  for (const at of [0, 3 * MIB + 5 * BLOCK, 9 * MIB, SIZE_BYTES - BLOCK]) writeSync(fd, patternBytes(at, at, BLOCK), 0, BLOCK, at);
  writeSync(fd, patternBytes(1, 0, 4 * MIB), 0, 4 * MIB, 12 * MIB);
  closeSync(fd);
  await ok(here, ['import', image, 'golden/base.img']);
});

afterAll(async () => { await cleanup.run(); });

async function ok(daemon: TestDaemon, args: readonly string[]): Promise<string> {
  const result = await daemon.cli(args);
  expect(result.stderr + result.stdout, args.join(' ')).toSatisfy(() => result.code === 0);
  return result.stdout;
}

function write(daemon: TestDaemon, disk: string, offsetBytes: number, data: Buffer): void {
  const fd = openSync(daemon.path(disk), 'r+');
  try {
    writeSync(fd, data, 0, data.length, offsetBytes);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

const content = (daemon: TestDaemon, disk: string): Buffer => readFileSync(daemon.path(disk));

/** The stream of a send, as a file. */
async function streamOf(args: readonly string[], name: string): Promise<string> {
  const file = join(work, name);
  const result = await command('sh', ['-c', `exec "$0" "$@" > ${file}`, process.execPath, CLI_ENTRY, 'send', ...args, '--socket', here.socketPath], { timeoutMs: 60_000 });
  expect(result.stderr, args.join(' ')).toMatch(/^(?:.*\n)*sent /u);
  expect(result.code).toBe(0);
  return file;
}

interface Outcome {
  readonly code: number | null;
  readonly stderr: string;
}

/** `offshoot receive TARGET` of a file. */
async function receive(file: string, target: string, more: readonly string[] = []): Promise<Outcome> {
  const { code, stderr } = await command('sh', ['-c', `exec "$0" "$@" < ${file}`, process.execPath, CLI_ENTRY, 'receive', target, ...more, '--socket', there.socketPath], { timeoutMs: 60_000 });
  return { code, stderr };
}

async function mustReceive(file: string, target: string): Promise<void> {
  const outcome = await receive(file, target);
  expect(outcome.code, outcome.stderr).toBe(0);
}

async function token(target: string): Promise<string> {
  return (await ok(there, ['receive', target, '--resume-token'])).trim();
}

/** Names that somebody can see in a container. */
const names = (daemon: TestDaemon, directory: string): string[] => readdirSync(daemon.path(directory)).toSorted();

describe('export', () => {
  it('writes a live disk as it is at one instant, and a snapshot, in each format, and leaves nothing beside the file', async () => {
    await ok(here, ['clone', 'golden/base.img', 'golden/live.img']);
    write(here, 'golden/live.img', 5 * MIB + 100, patternBytes(3, 0, 20_000));
    await ok(here, ['snapshot', 'create', 'golden/live.img@before']);
    const before = content(here, 'golden/live.img');
    write(here, 'golden/live.img', 7 * MIB, patternBytes(4, 0, 30_000));
    const now = content(here, 'golden/live.img');
    const out = join(work, 'out');
    mkdirSync(out);
    const fd = openSync(here.path('golden/live.img'), 'r+');
    try {
      for (const format of ['raw', 'qcow2', 'vmdk', 'vhdx']) {
        for (const [reference, expected] of [['golden/live.img', now], ['golden/live.img@before', before]] as const) {
          const file = join(out, `${reference === 'golden/live.img' ? 'now' : 'before'}.${format}`);
          const text = await ok(here, ['export', reference, file, '--format', format]);
          expect(text).toMatch(/^exported /u);
          const raw = join(work, 'expected.raw');
          writeFileSync(raw, expected);
          const compared = await command('qemu-img', ['compare', '-f', 'raw', '-F', format, raw, file]);
          expect(compared.stdout).toContain('Images are identical');
          expect(statSync(file).mode % 0o1000).toBe(0o600);
          expect(statSync(file).blocks * 512).toBeLessThan(SIZE_BYTES / 2);
        }
      }
    } finally {
      closeSync(fd);
    }
    expect(readdirSync(out)).toHaveLength(8);
    expect(names(here, 'golden').filter((name) => name.startsWith('.offshoot'))).toEqual([]);
    expect((await here.cli(['export', 'golden/live.img', join(out, 'now.raw')])).code).toBe(4);
    expect((await here.cli(['export', 'golden/none.img', join(out, 'none.raw')])).code).toBe(3);
    expect(readdirSync(out)).toHaveLength(8);
  });
});

describe('snapshot diff', () => {
  it('lists what was written between two snapshots and since one, and with --exact only what differs', async () => {
    await ok(here, ['clone', 'golden/base.img', 'golden/diff.img']);
    await ok(here, ['snapshot', 'create', 'golden/diff.img@d1']);
    write(here, 'golden/diff.img', 2 * MIB, patternBytes(8, 0, 2 * BLOCK));
    // The same as before: written to, and not another content.
    write(here, 'golden/diff.img', 9 * MIB, content(here, 'golden/base.img').subarray(9 * MIB, 9 * MIB + BLOCK));
    const block = { offsetBytes: 2 * MIB, lengthBytes: 2 * BLOCK, type: 'data' };
    const { extents } = await here.json<{ extents: unknown[] }>(['snapshot', 'diff', 'golden/diff.img@d1', 'golden/diff.img']);
    expect(extents).toEqual([block, { offsetBytes: 9 * MIB, lengthBytes: BLOCK, type: 'data' }]);
    expect((await here.json<{ extents: unknown[] }>(['snapshot', 'diff', 'golden/diff.img@d1', 'golden/diff.img', '--exact'])).extents).toEqual([block]);
    // Two that have nothing in common: what they hold decides.
    writeFileSync(join(work, 'other.raw'), content(here, 'golden/diff.img'));
    await ok(here, ['import', join(work, 'other.raw'), 'golden/other.img']);
    expect((await here.json<{ extents: unknown[] }>(['snapshot', 'diff', 'golden/diff.img@d1', 'golden/other.img'])).extents).toEqual([block]);
  });
});

describe('send and receive', () => {
  it('bring a disk to another store, then what changed, then what changed there once more', async () => {
    await ok(here, ['clone', 'golden/base.img', 'golden/sent.img']);
    for (const step of [1, 2, 3]) {
      write(here, 'golden/sent.img', step * MIB + 7, patternBytes(step, 0, 9000));
      await ok(here, ['snapshot', 'create', `golden/sent.img@s${step}`]);
      const file = await streamOf([`golden/sent.img@s${step}`, ...(step === 1 ? [] : ['--from', `@s${step - 1}`])], `s${step}`);
      if (step > 1) expect(statSync(file).size).toBeLessThan(20_000);
      await mustReceive(file, 'vms/got.img');
      expect(content(there, 'vms/got.img').equals(content(here, 'golden/sent.img'))).toBe(true);
      expect(content(there, `vms/.snapshots/s${step}/got.img`).equals(content(here, 'golden/sent.img'))).toBe(true);
    }
    // The same again is refused, and so are changes to what was written to meanwhile.
    expect((await receive(join(work, 's1'), 'vms/again.img')).stderr).toMatch(/has the snapshot .* already/u);
    write(here, 'golden/sent.img', 0, Buffer.from('more'));
    await ok(here, ['snapshot', 'create', 'golden/sent.img@s4']);
    const file = await streamOf(['golden/sent.img@s4', '--from', '@s3'], 's4');
    write(there, 'vms/got.img', 0, Buffer.from('changed there'));
    expect((await receive(file, 'vms/got.img')).stderr).toMatch(/was written to since vms\/got.img@s3.*snapshot revert/u);
    await ok(there, ['snapshot', 'revert', 'vms/got.img@s3', '--yes']);
    await mustReceive(file, 'vms/got.img');
    expect(content(there, 'vms/got.img').equals(content(here, 'golden/sent.img'))).toBe(true);
    // What has no base there is refused.
    await ok(here, ['snapshot', 'create', 'golden/base.img@b1']);
    await ok(here, ['snapshot', 'create', 'golden/base.img@b2']);
    expect((await receive(await streamOf(['golden/base.img@b2', '--from', '@b1'], 'other'), 'vms/x.img')).stderr).toMatch(/this store does not have that snapshot: send it first/u);
    await ok(there, ['check', '--data']);
  });

  it('bring a whole container: disks, files, directories, links, what was removed and what was replaced', async () => {
    await ok(here, ['container', 'create', 'box']);
    await ok(here, ['clone', 'golden/base.img', 'box/a.img']);
    await ok(here, ['clone', 'golden/base.img', 'box/b.img']);
    mkdirSync(here.path('box/etc'));
    writeFileSync(here.path('box/etc/vm.xml'), '<domain/>');
    writeFileSync(here.path('box/empty'), '');
    symlinkSync('etc/vm.xml', here.path('box/link'));
    await ok(here, ['snapshot', 'create', 'box@v1']);
    await mustReceive(await streamOf(['box@v1'], 'box1'), 'box');
    const same = (): void => {
      expect(names(there, 'box')).toEqual(names(here, 'box'));
      for (const name of ['a.img', 'etc/vm.xml', 'empty', 'new.txt', 'b.img']) {
        expect(existsSync(there.path(`box/${name}`))).toBe(existsSync(here.path(`box/${name}`)));
        if (existsSync(here.path(`box/${name}`))) expect(content(there, `box/${name}`).equals(content(here, `box/${name}`)), name).toBe(true);
      }
    };
    same();
    write(here, 'box/a.img', 4 * MIB, patternBytes(5, 0, 3 * BLOCK));
    writeFileSync(here.path('box/etc/vm.xml'), '<domain type="kvm"/>');
    writeFileSync(here.path('box/new.txt'), 'new');
    await ok(here, ['rm', 'box/b.img', '--keep-data']);
    await ok(here, ['snapshot', 'create', 'box@v2']);
    const { entries } = await here.json<{ entries: { path: string; change: string }[] }>(['snapshot', 'diff', 'box@v1', 'box@v2']);
    expect(entries.map(({ path, change }) => `${change} ${path}`)).toEqual(['changed a.img', 'removed b.img', 'changed etc/vm.xml', 'added new.txt']);
    await mustReceive(await streamOf(['box@v2', '--from', '@v1'], 'box2'), 'box');
    same();
    expect(readFileSync(there.path('box/.snapshots/v1/etc/vm.xml'), 'utf8')).toBe('<domain/>');
    expect(existsSync(there.path('box/.snapshots/v1/b.img'))).toBe(true);
    await ok(there, ['check', '--data']);
  });

  it('refuse a stream that is damaged anywhere or cut anywhere; nothing of it is seen, and what came before is gone on with', async () => {
    await ok(here, ['snapshot', 'create', 'golden/base.img@dmg']);
    const whole = readFileSync(await streamOf(['golden/base.img@dmg'], 'whole'));
    const seen = names(there, 'vms');
    const file = join(work, 'bad');
    for (const share of [0.0001, 0.3, 0.9]) {
      const flipped = Buffer.from(whole);
      const at = Math.floor(share * whole.length);
      flipped[at] = (flipped[at] ?? 0) ^ 4;
      for (const bad of [flipped, whole.subarray(0, at)]) {
        writeFileSync(file, bad);
        const outcome = await receive(file, 'vms/dmg.img');
        expect(outcome.code, outcome.stderr).not.toBe(0);
        expect(outcome.stderr).toMatch(/damaged|broke off|ends within/u);
        expect(names(there, 'vms')).toEqual(seen);
        if (outcome.stderr.includes('is kept')) await ok(there, ['receive', 'vms/dmg.img', '--abort']);
      }
    }
    // Cut, and gone on with, by way of a restart of the daemon that receives.
    writeFileSync(file, whole.subarray(0, Math.floor(0.6 * whole.length)));
    expect((await receive(file, 'vms/dmg.img')).code).toBe(9);
    expect((await receive(join(work, 'whole'), 'vms/dmg.img')).stderr).toMatch(/received in part before/u);
    await there.stop();
    await there.start();
    const rest = await streamOf(['--resume', await token('vms/dmg.img')], 'rest');
    expect(statSync(rest).size).toBeLessThan(0.5 * whole.length);
    await mustReceive(rest, 'vms/dmg.img');
    expect(content(there, 'vms/dmg.img').equals(content(here, 'golden/base.img'))).toBe(true);
    expect(readdirSync(join(there.storeDir, 'receive'))).toEqual([]);
  });

  it('stop at the limit of the container that they come into, and go on when it was raised', { timeout: 240_000 }, async () => {
    await ok(here, ['clone', 'golden/base.img', 'golden/limit.img']);
    write(here, 'golden/limit.img', 0, patternBytes(78, 0, SIZE_BYTES));
    await ok(here, ['snapshot', 'create', 'golden/limit.img@l']);
    const file = await streamOf(['golden/limit.img@l'], 'limit');
    await ok(there, ['container', 'create', 'small']);
    await ok(there, ['quota', 'set', 'small', '10M']);
    const spooled = async (): Promise<number> => Number.parseInt((await command('du', ['-s', '--block-size=1', join(there.storeDir, 'receive')])).stdout, 10);
    const kept = async (): Promise<number> => (await there.json<{ target: string; dataBytes: number }[]>(['receive', '--list'])).find(({ target }) => target === 'small/got.img')?.dataBytes ?? 0;
    const refused = await receive(file, 'small/got.img');
    expect([refused.code, refused.stderr]).toEqual([7, expect.stringMatching(/the limit of the container small leaves no room .*quota set small SIZE\)\n +what came before is kept/u) as string]);
    expect(await kept()).toBeGreaterThan(4 * MIB);
    expect(await spooled()).toBeLessThan(11 * MIB);
    expect(names(there, 'small')).toEqual([]);
    // What is kept counts for the next one as well.
    await ok(here, ['snapshot', 'create', 'golden/base.img@limit']);
    const other = await receive(await streamOf(['golden/base.img@limit'], 'other-limit'), 'small/other.img');
    expect(other.code, other.stderr).toBe(7);
    await ok(there, ['receive', 'small/other.img', '--abort']);
    // Not enough yet.
    await ok(there, ['quota', 'set', 'small', '16M']);
    expect((await receive(await streamOf(['--resume', await token('small/got.img')], 'limit-2'), 'small/got.img')).code).toBe(7);
    expect(await kept()).toBeGreaterThan(10 * MIB);
    await ok(there, ['quota', 'set', 'small', '32M']);
    await mustReceive(await streamOf(['--resume', await token('small/got.img')], 'limit-3'), 'small/got.img');
    expect(content(there, 'small/got.img').equals(content(here, 'golden/limit.img'))).toBe(true);
    const [small] = await there.json<{ container: string; usedBytes: number }[]>(['quota', 'ls']);
    expect(small?.container).toBe('small');
    // A file in many pieces has some blocks of the file system's own beside its data.
    expect(small?.usedBytes).toBeGreaterThanOrEqual(SIZE_BYTES);
    expect(small?.usedBytes).toBeLessThan(SIZE_BYTES + MIB / 4);
    // At its limit, one is not even begun.
    await ok(there, ['quota', 'set', 'small', '24M']);
    await ok(here, ['snapshot', 'create', 'golden/limit.img@l2']);
    const late = await streamOf(['golden/limit.img@l2'], 'limit-4');
    expect((await receive(late, 'small/late.img')).code).toBe(7);
    expect(await there.json(['receive', '--list'])).toEqual([]);
    expect(readdirSync(join(there.storeDir, 'receive'))).toEqual([]);
  });

  it('that have all but no room in the end are kept, and finished when there is', { timeout: 240_000 }, async () => {
    await ok(here, ['snapshot', 'create', 'golden/limit.img@l5']);
    const file = await streamOf(['golden/limit.img@l5'], 'limit-5');
    await ok(there, ['container', 'create', 'ends']);
    await ok(there, ['quota', 'set', 'ends', '32M']);
    const { transfers } = createControlClient({ socketPath: there.socketPath });
    const reader = new StreamReader(createReadStream(file));
    const begun = await transfers.receiveBegin('ends/got.img', (await reader.readHeader()).text);
    let records = begun.records;
    for (let batch: Buffer[] = [], hasEnded = false; !hasEnded;) {
      const record = (await reader.readRecord())!;
      batch.push(record.bytes);
      hasEnded = record.head.type === 'end';
      if (batch.length < 5 && !hasEnded) continue;
      ({ records } = await transfers.receiveRecords(begun.receiveId, records, batch));
      batch = [];
    }
    // Somebody else takes the room.
    await ok(there, ['quota', 'set', 'ends', '8M']);
    await expect(transfers.receiveFinish(begun.receiveId)).rejects.toMatchObject({ kind: 'quota' });
    await transfers.receivePause(begun.receiveId);
    expect(names(there, 'ends')).toEqual([]);
    await ok(there, ['quota', 'set', 'ends', '32M']);
    await mustReceive(await streamOf(['--resume', await token('ends/got.img')], 'limit-6'), 'ends/got.img');
    expect(content(there, 'ends/got.img').equals(content(here, 'golden/limit.img'))).toBe(true);
    await ok(there, ['check', '--data']);
  });

  it('go on when the server of either side is killed, and from what is kept when the pipe is', { timeout: 300_000 }, async () => {
    await ok(here, ['clone', 'golden/base.img', 'golden/kill.img']);
    write(here, 'golden/kill.img', 0, patternBytes(77, 0, SIZE_BYTES));
    await ok(here, ['snapshot', 'create', 'golden/kill.img@k']);
    // Slow enough to be met in the middle.
    const start = (args: readonly string[], target: string): ChildProcess => spawn('bash', ['-c',
      `set -o pipefail; "$0" "$1" send ${args.join(' ')} --socket ${here.socketPath} | (while head -c 2000000 > ${work}/part && [ -s ${work}/part ]; do cat ${work}/part; sleep 0.2; done) | "$0" "$1" receive ${target} --socket ${there.socketPath}`,
      process.execPath, CLI_ENTRY], { stdio: ['ignore', 'ignore', openSync(join(work, 'said'), 'a')], detached: true });
    const ended = async (child: ChildProcess): Promise<number | null> => await new Promise((resolve) => { child.once('exit', (code) => { resolve(code); }); });
    const came = async (target: string): Promise<number> => (await there.json<{ target: string; dataBytes: number }[]>(['receive', '--list'])).find((each) => each.target === target)?.dataBytes ?? 0;
    const waitFor = async (target: string, bytes: number): Promise<void> => { while ((await came(target)) < bytes) await new Promise((resolve) => { setTimeout(resolve, 50); }); };

    const child = start(['golden/kill.img@k'], 'vms/kill.img');
    const code = ended(child);
    await waitFor('vms/kill.img', 4 * MIB);
    await there.waitForServer(await there.killServer());
    await here.waitForServer(await here.killServer());
    expect(await code, readFileSync(join(work, 'said'), 'utf8')).toBe(0);
    expect(content(there, 'vms/kill.img').equals(content(here, 'golden/kill.img'))).toBe(true);

    await ok(here, ['snapshot', 'create', 'golden/kill.img@k2']);
    const second = start(['golden/kill.img@k2'], 'vms/kill2.img');
    const gone = ended(second);
    await waitFor('vms/kill2.img', 4 * MIB);
    process.kill(-(second.pid ?? 0), 'SIGKILL');
    await gone;
    expect(existsSync(there.path('vms/kill2.img'))).toBe(false);
    await there.waitForServer(await there.killServer());
    await mustReceive(await streamOf(['--resume', await token('vms/kill2.img')], 'rest2'), 'vms/kill2.img');
    expect(content(there, 'vms/kill2.img').equals(content(here, 'golden/kill.img'))).toBe(true);
    await ok(there, ['check', '--data']);
  });
});
