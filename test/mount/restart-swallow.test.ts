/**
 * Requests that a real server has read and not answered when it is killed (KERNEL.md 1.9, test b): not done at all, or done without an answer.
 *
 * The server is a copy of this build that is made to swallow requests without bit 63, which the kernel sets when it sends one again. So each
 * request below reaches the next server by RESEND or not at all. Also: a dead server that still has a thread in the kernel.
 */
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { connectionOf, ensureFuseControl, waitingRequests } from '../../daemon/transport/kernel/mount.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { useHolderTestBed, signal } from '../support/holder-test-bed.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { makeBuild } from '../support/other-build.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir, type Cleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { KernelConnection } from './kernel-connection.js';

const WAIT_MS = 60_000;
const MIB = 1024 ** 2;
const MKDIR = 9;

interface Case {
  readonly opcodes: readonly number[];
  readonly shell: string;
  /** Must succeed afterwards. */
  readonly check: string;
}

/** In the directory `vms` of the mount, where `disk` is a clone of 16 MiB and `directory` is empty. */
const cases: Readonly<Record<string, Case>> = {
  WRITE: { opcodes: [16], shell: `printf 'written by the guest' | dd of=disk conv=notrunc seek=5 bs=4096 status=none`, check: `test "$(dd if=disk skip=5 bs=4096 count=1 status=none | head -c 20)" = 'written by the guest'` },
  FSYNC: { opcodes: [20], shell: 'dd if=/dev/zero of=disk conv=notrunc,fsync bs=4096 count=3 status=none', check: 'cmp -n 12288 disk /dev/zero' },
  FALLOCATE: { opcodes: [43], shell: 'fallocate --punch-hole --offset 1048576 --length 65536 disk', check: 'cmp -i 1048576:0 -n 65536 disk /dev/zero' },
  CREATE: { opcodes: [35, 8], shell: 'dd of=new conv=excl if=/dev/null status=none', check: 'test -f new && test "$(ls | wc -l)" = 4' },
  RENAME: { opcodes: [12, 45], shell: 'mv directory moved', check: 'test -d moved && test ! -e directory' },
};

describe.skipIf(lacks('/dev/fuse', 'fallocate'))('a request that a server has read and not answered when it is killed', () => {
  let cleanup: Cleanup;
  beforeEach(() => { cleanup = createCleanup(); });
  afterEach(async () => { await cleanup.run(); });

  /** The opcodes that it swallows stand in `listFile`, which it reads at every request. */
  async function startSwallowing(listFile: string, how: 'not done' | 'done'): Promise<TestDaemon> {
    writeFileSync(listFile, '[]');
    const isSwallowed = `((unique63 & 0x80) === 0 && JSON.parse(process.getBuiltinModule('node:fs').readFileSync(${JSON.stringify(listFile)}, 'utf8')).includes(opcode))`;
    const build = makeBuild('9.0.0', cleanup, how === 'not done' ? {
      'daemon/transport/kernel/io-worker.js': [
        'const opcode = words[(REQUEST_AT + InHeader.opcode) / 4];',
        `const opcode = words[(REQUEST_AT + InHeader.opcode) / 4]; const unique63 = this.request.bytes[REQUEST_AT + InHeader.unique + 7]; if ${isSwallowed} return;`,
      ],
    } : {
      'daemon/transport/kernel/io-worker.js': [
        'answer(error, payloadBytes) {',
        `answer(error, payloadBytes) { const opcode = this.requestWords[(REQUEST_AT + InHeader.opcode) / 4]; const unique63 = this.request.bytes[REQUEST_AT + InHeader.unique + 7]; if ${isSwallowed} return;`,
      ],
      'daemon/server/server.js': [
        'const reply = (message) => { writeReply(fuseFd, message); };',
        `globalThis.swallowed = new Set();
         const reply = (message) => { if (!globalThis.swallowed.delete(Buffer.from(message.subarray(8, 16)).toString('hex'))) writeReply(fuseFd, message); };`,
      ],
      'daemon/transport/kernel/dispatch.js': [
        'handle(message) {',
        `handle(message) { const opcode = Buffer.from(message).readUInt32LE(4); const unique63 = message[15]; if (globalThis.swallowed !== undefined && ${isSwallowed}) globalThis.swallowed.add(Buffer.from(message.subarray(8, 16)).toString('hex'));`,
      ],
    });
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, cliEntry: build.cliEntry, environment: { OFFSHOOT_CRASHES_MAX: '1000' } });
    const image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 16 * MIB, seed: 9 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/source']);
    await daemon.json(['clone', 'vms/source', 'vms/disk']);
    return daemon;
  }

  it.each(['not done', 'done'] as const)('%s, is answered by the next: WRITE, FSYNC, FALLOCATE, CREATE, RENAME', async (how) => {
    const listFile = join(makeTempDir('swallow', cleanup), 'opcodes.json');
    const daemon = await startSwallowing(listFile, how);
    const directory = daemon.path('vms');
    ensureFuseControl();
    const connection = connectionOf(daemon.mountDir) ?? -1;
    await mustRun('mkdir', [join(directory, 'directory')], { timeoutMs: WAIT_MS });
    let { serverPid } = await daemon.status();
    for (const [name, { opcodes, shell, check }] of Object.entries(cases)) {
      writeFileSync(`${listFile}.new`, JSON.stringify(opcodes));
      renameSync(`${listFile}.new`, listFile);
      const caller = command('sh', ['-ec', `cd "$0"; ${shell}`, directory], { timeoutMs: WAIT_MS });
      const isWaiting = async (): Promise<boolean> => {
        const before = waitingRequests(connection) ?? 0;
        // Requests that come and go take no such time: this one stays.
        await sleep(300);
        return before > 0 && (waitingRequests(connection) ?? 0) > 0;
      };
      expect(await waitUntil(isWaiting, WAIT_MS), `${name} is swallowed`).toBe(true);
      signal(serverPid, 'SIGKILL');
      expect(await caller, name).toMatchObject({ code: 0, stderr: '' });
      serverPid = await daemon.waitForServer(serverPid);
      writeFileSync(`${listFile}.new`, '[]');
      renameSync(`${listFile}.new`, listFile);
      expect(await command('sh', ['-ec', `cd "$0"; ${check}`, directory], { timeoutMs: WAIT_MS }), name).toMatchObject({ code: 0, stderr: '' });
    }
    expect((await daemon.status()).restarts).toBe(Object.keys(cases).length);
    await daemon.stop();
  }, 240_000);
});

describe('a killed server with a thread that is still in the kernel', () => {
  const bed = useHolderTestBed('restart-swallow');

  it('is not followed before that thread is gone', async () => {
    const connection = new KernelConnection();
    try {
      connection.mount();
      connection.serve();
      connection.keepBack = (opcode) => opcode === MKDIR;
      // A request that was read and not answered holds its caller in the kernel, SIGKILL or not.
      bed().conduct({ makeDirectory: join(connection.mountDir, 'stuck') });
      const { serverPid } = await bed().start();
      await bed().until('the thread in the kernel', () => connection.kept.length > 0);
      bed().conduct({});
      signal(serverPid, 'SIGKILL');
      const mainThread = (): string => /^.*\) (\S)/su.exec(readFileSync(`/proc/${serverPid}/task/${serverPid}/stat`, 'utf8'))?.[1] ?? '';
      await bed().until('the end of its main thread', () => mainThread() === 'Z');
      await sleep(1_000);
      expect(bed().events().filter(({ what }) => what === 'start')).toHaveLength(1);
      expect(bed().state()).toMatchObject({ state: 'running', serverPid, lastExit: null });

      connection.keepBack = () => false;
      for (const message of connection.kept) connection.newDispatcher().handle(message);
      await bed().untilState('the next server', ({ state, restarts }) => state === 'running' && restarts === 1);
      expect(bed().events().filter(({ what }) => what === 'start')).toHaveLength(2);
    } finally {
      await connection.close();
    }
  });
});
