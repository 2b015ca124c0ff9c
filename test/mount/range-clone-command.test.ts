/**
 * `offshoot clone SOURCE TARGET --range ...` as people meet it: what each wrong input is told, and that it changed nothing; what a script gets; what cannot be a
 * surprise (a target in use, one disk as both, a thousand ranges).
 */
import fs from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf, type ErrorKind } from '../../blockstore/errors.js';
import type { CloneRangesResult, DiskInfo, JobInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { firstDifference } from '../support/model/pattern.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 8 * MIB;

describe.skipIf(lacks('/dev/fuse'))('clone --range', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let content: Buffer;
  const at = (name: string): string => join(daemon.mountDir, name);
  const ranges = (...texts: string[]): string[] => texts.flatMap((text) => ['--range', text]);

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'c']);
    const image = join(makeTempDir('images', cleanup), 'image');
    makePatternImage(image, { sizeBytes: SIZE_BYTES, seed: 4 });
    content = fs.readFileSync(image);
    await daemon.json(['import', image, 'c/source']);
    await daemon.json(['clone', 'c/source', 'c/target']);
    fs.mkdirSync(at('c/dir'));
    fs.writeFileSync(at('c/file'), content.subarray(0, 700_001));
    await daemon.json(['snapshot', 'create', 'c@s']);
  });
  afterAll(() => cleanup.run());

  it.each<[string, string[], ErrorKind, RegExp]>([
    ['a source start within a block', ['c/source', 'c/target', ...ranges('100:0:4K')], 'invalid-argument', /'100:0:4K' begins at 100, and only whole blocks of 4096 bytes are cloned: 0 or 4096/u],
    ['a target start within a block', ['c/source', 'c/target', ...ranges('0:6000:4K')], 'invalid-argument', /'0:6000:4K' begins at 6000, .*: 4096 or 8192/u],
    ['a length within a block', ['c/source', 'c/target', ...ranges('0:0:5000')], 'invalid-argument', /whole blocks of 4096 bytes, unless it ends where the source does: 0:0:5000 ends within one/u],
    ['no length', ['c/source', 'c/target', ...ranges('0:0:0')], 'invalid-argument', /'0:0:0' is a range of no bytes/u],
    ['what is no range', ['c/source', 'c/target', ...ranges('0:4K')], 'invalid-argument', /'0:4K' is not a range: write SOURCE_START:TARGET_START:LENGTH, as in 1M:0:512M/u],
    ['a size that is none', ['c/source', 'c/target', ...ranges('0:0:4Q')], 'invalid-argument', /'4Q' is not a size/u],
    ['a range behind the source\'s end', ['c/source', 'c/target', ...ranges('7M:1M:2M')], 'invalid-argument', /the range 7340032:1048576:2097152 ends at 9437184 of the source, which has 8388608 bytes/u],
    ['a range behind the target\'s end', ['c/source', 'c/target', ...ranges('0:7M:2M')], 'too-large', /the range 0:7340032:2097152 ends at 9437184, behind the target's end at 8388608: make the target larger \(`offshoot resize`/u],
    ['a size too small for the ranges', ['c/source', 'c/new', ...ranges('0:1M:4M'), '--size', '4M'], 'too-large', /ends at 5242880, behind the target's end at 4194304/u],
    ['a size that no disk has', ['c/source', 'c/new', ...ranges('0:0:4K'), '--size', '4100'], 'invalid-argument', /multiple of 512 bytes/u],
    ['ranges that overlap', ['c/source', 'c/target', ...ranges('0:0:64K', '1M:60K:4K')], 'invalid-argument', /two ranges overlap in the target, at 61440 where 1048576:61440:4096 begins: name each block of it once/u],
    ['a size for a disk that is there', ['c/source', 'c/target', ...ranges('0:0:4K'), '--size', '8M'], 'already-exists', /c\/target exists and has its size/u],
    ['a target in a snapshot', ['c/source', 'c/target@s', ...ranges('0:0:4K')], 'not-permitted', /is part of the snapshot c@s, and never changes/u],
    ['a target below .snapshots', ['c/source', 'c/.snapshots/s/new', ...ranges('0:0:4K')], 'not-permitted', /is part of the snapshot c@s, and never changes/u],
    ['a target that is a directory', ['c/source', 'c/dir', ...ranges('0:0:4K')], 'is-a-directory', /c\/dir is not a disk or file/u],
    ['a source that is a directory', ['c/dir', 'c/target', ...ranges('0:0:4K')], 'is-a-directory', /c\/dir is not a disk or file/u],
    ['a source that is not there', ['c/none', 'c/target', ...ranges('0:0:4K')], 'not-found', /does not exist/u],
    ['a target in no directory', ['c/source', 'c/none/new', ...ranges('0:0:4K')], 'not-found', /does not exist/u],
    ['a container as a target', ['c/source', 'new', ...ranges('0:0:4K')], 'invalid-name', /names a container/u],
    ['two targets', ['c/source', 'c/target', 'c/other', ...ranges('0:0:4K')], 'invalid-argument', /--range takes one TARGET/u],
    ['a fill', ['c/source', 'c/target', '--fill', ...ranges('0:0:4K')], 'invalid-argument', /start a fill by `offshoot fill start` afterwards/u],
    ['10,000 ranges', ['c/source', 'c/target', ...ranges(...Array.from({ length: 10_000 }, (_, i) => `${4 * (i % 2000)}K:${4 * i}K:4K`))], 'too-large', /10,000 ranges are more than one request can hold \(1,024\): use several/u],
    ['a size without a range', ['c/source', 'c/new', '--size', '4M'], 'invalid-argument', /--size goes with --range/u],
  ])('refuses %s, says why, and changes nothing', async (_what, args, kind, words) => {
    const before = fs.readdirSync(at('c'));
    const json = await daemon.cli(['clone', ...args, '--json']);
    expect([json.code, json.stdout]).toEqual([exitCodeOf[kind], '']);
    expect(JSON.parse(json.stderr)).toMatchObject({ error: { kind, exitCode: exitCodeOf[kind], message: expect.stringMatching(words) as string } });
    expect(fs.readdirSync(at('c'))).toEqual(before);
    expect(firstDifference(content, fs.readFileSync(at('c/target')), 0)).toBeNull();
  });

  it('says so in one line to people, too, and shares nothing by it', async () => {
    const { code, stdout, stderr } = await daemon.cli(['clone', 'c/source', 'c/target', ...ranges('0:7M:2M')]);
    expect([code, stdout, stderr]).toEqual([2, '', expect.stringMatching(/^offshoot: the range 0:7340032:2097152 ends at 9437184, behind the target's end [^\n]*\n$/u) as string]);
    expect((await daemon.json<DiskInfo>(['show', 'c/target'])).sharedWith).toEqual([]);
  });

  it('takes as many ranges as one request holds, in one transaction', async () => {
    await daemon.json(['clone', 'c/source', 'c/many']);
    // Every second block of the first 8 MiB, each from another place.
    const texts = Array.from({ length: 1024 }, (_, i) => `${8 * ((i * 7) % 1024)}K:${8 * i}K:4K`);
    expect(await daemon.json<CloneRangesResult>(['clone', 'c/source', 'c/many', ...ranges(...texts)])).toMatchObject({ created: false, ranges: 1024, sharedBytes: 4 * MIB });
    const expected = Buffer.from(content);
    for (let i = 0; i < 1024; i += 1) content.copy(expected, 8192 * i, 8192 * ((i * 7) % 1024), 8192 * ((i * 7) % 1024) + 4096);
    expect(firstDifference(expected, fs.readFileSync(at('c/many')), 0)).toBeNull();
  });

  it('goes into a disk that is in use, and within one disk; whoever has it open sees it', async () => {
    await daemon.json(['clone', 'c/source', 'c/used']);
    const fd = fs.openSync(at('c/used'), 'r+');
    try {
      fs.writeSync(fd, Buffer.alloc(8192, 0x55), 0, 8192, MIB);
      await daemon.json(['clone', 'c/used', 'c/used', ...ranges('1M:2M:64K', '2M:1M:64K')]);
      const expected = Buffer.from(content).fill(0x55, MIB, MIB + 8192);
      const before = Buffer.from(expected);
      before.copy(expected, 2 * MIB, MIB, MIB + 65_536);
      before.copy(expected, MIB, 2 * MIB, 2 * MIB + 65_536);
      const got = Buffer.alloc(SIZE_BYTES);
      fs.readSync(fd, got, 0, SIZE_BYTES, 0);
      expect(firstDifference(expected, got, 0)).toBeNull();
    } finally {
      fs.closeSync(fd);
    }
  });

  it('says the same to people and to scripts, and is in the history with its id', async () => {
    const plain = await daemon.cli(['clone', 'c/source', 'c/plain', ...ranges('1M:0:512K', '0:2M:4K'), '--size', '16M']);
    expect(plain.stdout).toMatch(new RegExp(`^${at('c/plain')}\\n2 ranges of c/source, 516 KiB, in a new disk of 16 MiB, in [^\\n]+s\\n$`, 'u'));
    const again = await daemon.cli(['clone', 'c/source', 'c/plain', ...ranges('0:0:4K')]);
    expect(again.stdout).toMatch(/\n1 range of c\/source, 4 KiB, shared, in [^\n]+s\n$/u);
    const done = await daemon.json<CloneRangesResult>(['clone', 'c/source', 'c/json', ...ranges('0:4K:8K')]);
    expect(done).toEqual({
      operationId: expect.stringMatching(/^[0-9]+$/u) as string, path: 'c/json', sizeBytes: 12_288, mountPath: at('c/json'), created: true, ranges: 1, sharedBytes: 8192,
      durationMs: expect.any(Number) as number,
    });
    expect(await daemon.json<JobInfo>(['jobs', done.operationId])).toMatchObject({ kind: 'clone', state: 'completed', path: 'c/json', message: '1 range of c/source', error: null });
    const failed = JSON.parse((await daemon.cli(['clone', 'c/source', 'c/target', ...ranges('7M:0:2M'), '--json'])).stderr) as { error: { context: { operationId: string } } };
    expect(await daemon.json<JobInfo>(['jobs', failed.error.context.operationId])).toMatchObject({ kind: 'clone', state: 'failed', error: { kind: 'invalid-argument' } });
    expect((await daemon.cli(['clone', '--help'])).stdout).toMatch(/--range <from:to:length>[^]*multiples of 4 KiB[^]*--range 1M:1M:9G/u);
  });

  it('takes what a file ends with into a new disk, which ends with a whole sector', async () => {
    const made = await daemon.json<CloneRangesResult>(['clone', 'c/file', 'c/of-file', ...ranges('0:0:700001')]);
    expect(made.sizeBytes).toBe(Math.ceil(700_001 / 512) * 512);
    expect(firstDifference(Buffer.concat([content.subarray(0, 700_001)], made.sizeBytes), fs.readFileSync(at('c/of-file')), 0)).toBeNull();
  });

  it('leaves a sound store and a quiet log', async () => {
    await daemon.stop();
    await daemon.start();
    expect(await daemon.json<{ verdict: string }>(['check'])).toMatchObject({ verdict: 'clean' });
    daemon.assertQuietLog();
  });
});
