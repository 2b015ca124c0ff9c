/**
 * What cannot be removed says who stands on it and what to do about it: every command that a refusal names is run here, as it stands there,
 * and afterwards the removal goes through. And what is counted: snapshots apart from disks.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, openSync, readdirSync, renameSync, writeSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import { createControlClient, type ControlClient } from '../../daemon/control/client.js';
import type { ContainerInfo } from '../../daemon/control/schemas.js';
import type { SpaceReport } from '../../daemon/control/space-schemas.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const TEST_MS = 120_000;

describe.skipIf(lacks('/dev/fuse'))('a refused removal', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let control: ControlClient;
  let image: string;
  let number = 0;
  let name = '';

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    control = createControlClient({ socketPath: daemon.socketPath });
    image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 4 * MIB, seed: 5 });
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);
  beforeEach(async () => {
    number += 1;
    name = `c${number}`;
    await daemon.json(['container', 'create', name]);
    await daemon.json(['import', image, `${name}/image`]);
  }, TEST_MS);

  const write = (path: string, fill: number): void => {
    const fd = openSync(daemon.path(path), 'r+');
    writeSync(fd, Buffer.alloc(8192, fill), 0, 8192, 0);
    closeSync(fd);
  };

  /** The commands that it names; the rest of each line says what it does. */
  async function refusal(...args: string[]): Promise<{ readonly said: string; readonly commands: readonly string[] }> {
    const { code, stdout, stderr } = await daemon.cli(args);
    expect([code, stdout]).toEqual([5, '']);
    return { said: stderr, commands: stderr.split('\n').filter((line) => line.startsWith('  offshoot ')).map((line) => line.trim().split(/ {2,}/u)[0] ?? '') };
  }

  /** As a user would who copies it to a shell. */
  function run(command: string): void {
    execFileSync('sh', ['-c', `offshoot() { "$NODE" "$CLI" "$@"; }; ${command}`], {
      stdio: 'pipe', env: { ...process.env, NODE: process.execPath, CLI: CLI_ENTRY, OFFSHOOT_SOCKET: daemon.socketPath }, timeout: TEST_MS,
    });
  }

  it('of a disk names flatten, promote and --keep-data, and each of them lets it go', { timeout: TEST_MS }, async () => {
    for (const [way, count] of [3, 1, 2].entries()) {
      const source = `${name}/source-${way}`;
      const clones = Array.from({ length: count }, (_, i) => `${name}/clone-${way}-${i}`);
      await daemon.json(['clone', `${name}/image`, source]);
      write(source, 1);
      await daemon.json(['clone', source, ...clones]);
      const { said, commands } = await refusal('rm', source);
      expect(said).toContain(`${source} is what ${count === 1 ? 'a clone stands' : `${count} clones stand`} on: ${clones.join(', ')}`);
      expect(commands.map((command) => command.split(' ')[1])).toEqual(['flatten', 'promote', 'rm']);
      run(commands[way] ?? '');
      // With the last one it is gone already.
      expect((await daemon.cli(['rm', source])).code).toBe(way === 2 ? 3 : 0);
    }
  });

  it('names promote only where that is enough', { timeout: TEST_MS }, async () => {
    const disk = `${name}/disk`;
    await daemon.json(['clone', `${name}/image`, disk]);
    write(disk, 1);
    await daemon.json(['clone', disk, `${name}/early`]);
    write(disk, 2);
    await daemon.json(['clone', disk, `${name}/late`]);
    // The later one stands on all that the disk has written; the earlier one would leave a part with it.
    const both = await refusal('rm', disk);
    expect(both.commands[1]).toBe(`offshoot promote ${name}/late`);
    run(both.commands[1] ?? '');
    expect((await daemon.cli(['rm', disk])).code).toBe(0);
    await daemon.json(['clone', `${name}/image`, disk]);
    await daemon.json(['container', 'create', `${name}-other`]);
    await daemon.json(['clone', `${name}/late`, `${name}-other/outside`]);
    // Of several disks at once nobody can take the place.
    const whole = await refusal('rm', '-r', name);
    expect(whole.said).toContain(`${name} is what a clone stands on: ${name}-other/outside`);
    expect(whole.commands).toEqual([`offshoot flatten ${name}-other/outside`, `offshoot rm -r ${name} --keep-data`]);
    run(whole.commands[0] ?? '');
    expect((await daemon.cli(['rm', '-r', name])).code).toBe(0);
  });

  it('of what many stand on lists the first few and says how many there are', { timeout: TEST_MS }, async () => {
    const clones = Array.from({ length: 12 }, (_, i) => `${name}/vm${i}`);
    await daemon.json(['clone', `${name}/image`, ...clones]);
    const { said } = await refusal('rm', `${name}/image`);
    expect(said).toContain(`12 clones stand on: ${clones.slice(0, 5).join(', ')} and 7 more`);
    expect(said).not.toContain('vm5');
    expect(said.split('\n').length).toBeLessThan(7);
  });

  it('of a snapshot names flatten and --keep-data; of a container the snapshots that it has', { timeout: TEST_MS }, async () => {
    await daemon.json(['snapshot', 'create', `${name}@v1`]);
    await daemon.json(['snapshot', 'create', `${name}/image@v2`]);
    await daemon.json(['clone', `${name}/image@v1`, `${name}/of-v1`]);
    await daemon.json(['clone', `${name}/image@v2`, `${name}/of-v2`]);
    const one = await refusal('snapshot', 'rm', `${name}@v1`);
    expect(one.commands).toEqual([`offshoot flatten ${name}/of-v1`, `offshoot snapshot rm ${name}@v1 --keep-data`]);
    run(one.commands[0] ?? '');
    const two = await refusal('snapshot', 'rm', `${name}/image@v2`);
    const container = await refusal('rm', '-r', name);
    expect(container.said).toContain(`${name} has 2 snapshots: ${name}@v1, ${name}/image@v2`);
    expect(container.commands).toEqual([`offshoot snapshot rm ${name}@v1`, `offshoot snapshot rm ${name}/image@v2`]);
    run(container.commands[0] ?? '');
    run(two.commands[1] ?? '');
    expect((await daemon.cli(['rm', '-r', name])).code).toBe(0);
  });

  it('quotes what a shell would take for something else', { timeout: TEST_MS }, async () => {
    await daemon.json(['clone', `${name}/image`, `${name}/plain`]);
    renameSync(daemon.path(`${name}/plain`), daemon.path(`${name}/it's; false`));
    const { commands } = await refusal('rm', `${name}/image`);
    run(commands.find((command) => command.includes('flatten')) ?? '');
    expect((await daemon.cli(['rm', `${name}/image`])).code).toBe(0);
  });

  it('counts snapshots apart from disks', { timeout: TEST_MS }, async () => {
    const container = async (): Promise<ContainerInfo | undefined> => (await daemon.json<ContainerInfo[]>(['container', 'ls'])).find((each) => each.name === name);
    const before = await daemon.status();
    const empty = await container();
    expect(empty).toMatchObject({ disks: 1, files: 0, snapshots: 0, sizeBytes: 4 * MIB });
    await daemon.json(['snapshot', 'create', `${name}@v1`]);
    await daemon.json(['snapshot', 'create', `${name}/image@v2`]);
    const after = await daemon.status();
    expect([after.disksTotal, after.snapshotsTotal, after.virtualBytesTotal]).toEqual([before.disksTotal, before.snapshotsTotal + 2, before.virtualBytesTotal]);
    expect(await container()).toMatchObject({ disks: 1, files: 0, snapshots: 2, sizeBytes: 4 * MIB, allocatedBytes: empty?.allocatedBytes });
    const report = await daemon.json<SpaceReport>(['df', name]);
    expect([report.total.disks, report.total.snapshots]).toEqual([1, 2]);
    expect(report.containers).toMatchObject([{ disks: 1, snapshots: 2 }]);
    expect((await daemon.cli(['df', name])).stdout).toMatch(/^1 disk or file, 2 snapshots: /mu);
    expect((await daemon.cli(['df', `${name}@v1`])).stdout).toMatch(new RegExp(`^${name}/\\.snapshots/v1/image `, 'mu'));
    expect((await daemon.cli(['metrics'])).stdout).toMatch(new RegExp(`^offshoot_snapshots ${after.snapshotsTotal}$`, 'mu'));
  });

  it('what holds a disk still for an export is in no snapshot, clone or stream of the container', { timeout: TEST_MS }, async () => {
    const instant = await control.transfers.instant(`${name}/image`);
    expect(readdirSync(daemon.path(name))).toHaveLength(2);
    expect(await daemon.json(['snapshot', 'create', `${name}@v1`])).toMatchObject({ disks: 1 });
    await daemon.json(['clone', name, `${name}-copy`]);
    expect([readdirSync(daemon.path(`${name}/.snapshots/v1`)), readdirSync(daemon.path(`${name}-copy`))]).toEqual([['image'], ['image']]);
    expect((await control.transfers.tree(name)).nodes.map((node) => node.path)).toEqual(['image']);
    await control.transfers.releaseInstant(instant.path);
  });
});
