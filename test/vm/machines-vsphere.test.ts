/**
 * Machines of VMware from the directory of somebody's to machines that run in vSphere, by the real daemon and its command line. vSphere is
 * govmomi's simulator over TLS with a pinned certificate, and its datastore is the daemon's mount; what it has is read by a client of its own, and
 * it says of each disk whether a host could open it from there.
 */
import { copyFileSync, mkdirSync, readFileSync, readdirSync, statSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import type { MachineInfo } from '../../daemon/control/machine-schemas.js';
import type { JobInfo } from '../../daemon/control/schemas.js';
import { parseVsphereSettings } from '../../daemon/hypervisor/vsphere/settings.js';
import { Vsphere } from '../../daemon/hypervisor/vsphere/vsphere.js';
import { vmdkDescriptor } from '../../daemon/machines/formats/vmdk.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { mustRun } from '../support/model/command.js';
import { patternBytes } from '../support/model/pattern.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { VCSIM_PACKAGES, VCSIM_PASSWORD, VCSIM_USER, startVcsim, type SimulatedMachine, type Vcsim } from '../support/vcsim.js';

const DATASTORE = 'offshoot';
const ELSEWHERE = 'elsewhere';
const MIB = 1024 ** 2;
const ROOT_BYTES = 8 * MIB;
const DATA_BYTES = 4 * MIB;
const LONG_MS = 120_000;
const signal = new AbortController().signal;
const VMX = `.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "13"
displayName = "golden"
guestOS = "debian10-64"
memSize = "1024"
numvcpus = "2"
uuid.bios = "56 4d 11 11 22 22 43 33-84 44 55 55 55 55 55 55"
uuid.location = "56 4d 11 11 22 22 43 33-84 44 55 55 55 55 55 56"
nvram = "golden.nvram"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "golden.vmdk"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "data.vmdk"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.addressType = "generated"
ethernet0.generatedAddress = "00:0c:29:11:22:33"
ethernet1.present = "TRUE"
ethernet1.addressType = "static"
ethernet1.address = "00:50:56:00:00:07"
sched.swap.derivedName = "/vmfs/volumes/5f0e/golden/golden-1.vswp"
# kept
`;

interface Cloned {
  readonly operationId: string;
  readonly machines: readonly MachineInfo[];
}

describe.skipIf(lacks(...VCSIM_PACKAGES, 'qemu-img'))('machines of VMware', () => {
  const cleanup = createCleanup();
  let simulator: Vcsim;
  let daemon: TestDaemon;
  let settingsFile: string;
  let source: string;

  function settings(mountDir: string, more: object = {}): string {
    return JSON.stringify({
      url: `https://${simulator.host}:${simulator.port}`, credentialsFile: join(settingsFile, '..', 'credentials'), thumbprint: simulator.thumbprint,
      datastores: [{ directory: mountDir, datastore: DATASTORE }], callTimeoutMs: LONG_MS, taskTimeoutMs: LONG_MS, ...more,
    });
  }

  beforeAll(async () => {
    simulator = await startVcsim('esx', cleanup);
    settingsFile = join(makeTempDir('vsphere', cleanup), 'settings.json');
    writeFileSync(join(settingsFile, '..', 'credentials'), `${VCSIM_USER}\n${VCSIM_PASSWORD}\n`, { mode: 0o600 });
    daemon = await startTestDaemon({
      transport: 'kernel', cleanup,
      startArguments: (mountDir) => {
        writeFileSync(settingsFile, settings(mountDir));
        return ['--vsphere', settingsFile];
      },
    });
    // What NFS is for a host: the mount is the datastore's directory.
    symlinkSync(daemon.mountDir, join(simulator.directory, DATASTORE));
    mkdirSync(join(simulator.directory, ELSEWHERE));
    const admin = new Vsphere(parseVsphereSettings(settings(daemon.mountDir)));
    cleanup.add(() => admin.close());
    for (const datastore of [DATASTORE, ELSEWHERE]) await admin.mountDatastore({ datastore, server: '192.0.2.7', path: `/export/${datastore}`, version: 3, readOnly: false }, { signal });
    source = await machineOfSomebody();
    for (const name of ['golden', 'lab', 'killed']) await daemon.json(['container', 'create', name]);
    await daemon.json(['vm', 'import', source, 'golden/debian']);
  });

  // What a test that failed has left would fail all others.
  beforeEach(async () => {
    for (const container of ['lab', 'killed', 'lab7']) if ((await daemon.cli(['vm', 'ls', container])).code === 0) await removeAll(container);
    await daemon.cli(['rm', '-r', 'lab7']);
  });

  afterAll(() => cleanup.run());

  /** As it was exported: one disk flat, as an ESXi has it, and one sparse. */
  async function machineOfSomebody(): Promise<string> {
    const directory = join(makeTempDir('vmx', cleanup), 'golden');
    mkdirSync(directory);
    writeFileSync(join(directory, 'golden.vmx'), VMX);
    writeFileSync(join(directory, 'golden-flat.vmdk'), patternBytes(3, 0, ROOT_BYTES));
    writeFileSync(join(directory, 'golden.vmdk'), `${vmdkDescriptor(ROOT_BYTES, 'golden-flat.vmdk', '1a2b3c4d')}ddb.thinProvisioned = "1"\n`);
    const raw = join(directory, '..', 'data.raw');
    writeFileSync(raw, patternBytes(4, 0, DATA_BYTES));
    await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', 'vmdk', '-o', 'subformat=streamOptimized', raw, join(directory, 'data.vmdk')]);
    for (const [name, text] of [['vmware.log', 'made anew'], ['golden.nvram', 'made anew'], ['golden.vmxf', 'made anew'], ['notes', 'kept']] as const) writeFileSync(join(directory, name), text);
    return directory;
  }

  const read = (path: string): string => readFileSync(daemon.path(path), 'utf8');
  const clone = async (...args: readonly string[]): Promise<Cloned> => await daemon.json<Cloned>(['vm', 'clone', 'golden/debian', ...args]);
  const inVsphere = async (name: string): Promise<SimulatedMachine | undefined> => (await simulator.machines()).find((each) => each.name === name);

  async function expectNothing(container: string, registered: readonly string[] = []): Promise<void> {
    expect(readdirSync(daemon.path(container))).toEqual([]);
    expect((await simulator.machines()).map(({ name }) => name)).toEqual(registered);
    expect((await daemon.json<MachineInfo[]>(['vm', 'ls'])).map(({ path }) => path)).toEqual(['golden/debian']);
    expect(await daemon.json(['check'])).toMatchObject({ verdict: 'clean', findings: [] });
  }

  async function removeAll(container: string): Promise<void> {
    for (const { path } of await daemon.json<MachineInfo[]>(['vm', 'ls', container])) await daemon.json(['vm', 'rm', path, '--force']);
  }

  it('are imported: flat disks as they are, others converted, each with its descriptor; logs and NVRAM are made anew', async () => {
    expect(readdirSync(daemon.path('golden/debian')).toSorted()).toEqual(['data-flat.vmdk', 'data.vmdk', 'golden-flat.vmdk', 'golden.vmdk', 'golden.vmx', 'notes']);
    expect(readFileSync(daemon.path('golden/debian/golden-flat.vmdk')).equals(patternBytes(3, 0, ROOT_BYTES))).toBe(true);
    expect(readFileSync(daemon.path('golden/debian/data-flat.vmdk')).equals(patternBytes(4, 0, DATA_BYTES))).toBe(true);
    expect(read('golden/debian/golden.vmdk')).toBe(readFileSync(join(source, 'golden.vmdk'), 'utf8'));
    expect(read('golden/debian/data.vmdk')).toContain(`\nRW ${DATA_BYTES / 512} VMFS "data-flat.vmdk"\n`);
    for (const name of ['golden', 'data']) {
      expect(await daemon.json(['show', `golden/debian/${name}-flat.vmdk`])).toMatchObject({ kind: 'disk' });
      // QEMU, which knows the format too, reads the store's descriptor and the disk behind it.
      const copy = join(makeTempDir('vmdk', cleanup), `${name}.vmdk`);
      copyFileSync(daemon.path(`golden/debian/${name}.vmdk`), copy);
      copyFileSync(daemon.path(`golden/debian/${name}-flat.vmdk`), copy.replace('.vmdk', '-flat.vmdk'));
      await mustRun('qemu-img', ['compare', '-f', 'vmdk', '-F', 'raw', copy, daemon.path(`golden/debian/${name}-flat.vmdk`)]);
    }
    const info = await daemon.json<MachineInfo>(['vm', 'show', 'golden/debian']);
    expect(info).toMatchObject({ format: 'vmx', uuid: '564d1111-2222-4333-8444-555555555555', memoryBytes: 1024 * MIB, registration: 'none' });
    expect(info.files.map(({ file }) => file)).toEqual(['golden.vmdk', 'data.vmdk']);
    expect(read('golden/debian/golden.vmx')).not.toContain(daemon.mountDir);
    expect(read('golden/debian/golden.vmx')).toContain('# kept');
  });

  it('are cloned and registered: names, UUIDs and MAC addresses all different, disks that a host opens from the datastore', async () => {
    const { machines } = await clone('lab/web1', 'lab/web2', 'lab/web3', '--register');
    const base = await daemon.json<MachineInfo>(['vm', 'show', 'golden/debian']);
    const found = (await simulator.machines()).toSorted((a, b) => (a.name < b.name ? -1 : 1));
    expect(found.map(({ name, path, power }) => [name, path, power])).toEqual(['web1', 'web2', 'web3'].map((name) => [name, `[${DATASTORE}] lab/${name}/golden.vmx`, 'poweredOff']));
    expect(new Set([base.uuid, ...found.map(({ uuid }) => uuid)]).size).toBe(4);
    expect(new Set([...base.macs, ...found.flatMap(({ macs }) => macs)]).size).toBe(8);
    for (const machine of found) {
      const row = machines.find(({ name }) => name === machine.name);
      expect(row).toMatchObject({ uuid: machine.uuid, macs: machine.macs, externalId: `${machine.id}/${machine.uuid}`, registration: 'registered', hypervisor: 'vsphere' });
      for (const mac of machine.macs) expect(mac).toMatch(/^00:50:56:[0-3][0-9a-f]:/u);
      expect(machine.disks).toEqual([{ file: 'golden.vmdk', bytes: ROOT_BYTES }, { file: 'data.vmdk', bytes: DATA_BYTES }]);
      expect(read(`lab/${machine.name}/golden.vmx`)).not.toMatch(/nvram|uuid\.location|derivedName|\/vmfs\//u);
      expect(readFileSync(daemon.path(`lab/${machine.name}/data-flat.vmdk`)).equals(patternBytes(4, 0, DATA_BYTES))).toBe(true);
    }
    await removeAll('lab');
    await expectNothing('lab');
  });

  it('are started, stopped, changed while they are off, unregistered, registered again and removed', async () => {
    await clone('lab/web1', '--register');
    const power = async (): Promise<string | undefined> => (await inVsphere('web1'))?.power;
    expect(await daemon.json(['vm', 'start', 'lab/web1'])).toMatchObject({ power: 'running' });
    expect(await power()).toBe('poweredOn');
    for (const refused of [['set', 'lab/web1', 'memory=2GiB'], ['rm', 'lab/web1'], ['unregister', 'lab/web1']]) expect((await daemon.cli(['vm', ...refused])).stderr, refused.join(' ')).toContain('offshoot vm stop');
    expect(await daemon.json(['vm', 'stop', 'lab/web1', '--force'])).toMatchObject({ power: 'shut-off' });
    expect(await power()).toBe('poweredOff');
    const before = await inVsphere('web1');
    expect(await daemon.json(['vm', 'set', 'lab/web1', 'memory=2GiB', 'interface.1.mac=00:50:56:01:02:03'])).toMatchObject({ memoryBytes: 2048 * MIB, registration: 'registered' });
    const after = await inVsphere('web1');
    expect(after).toMatchObject({ uuid: before?.uuid, macs: [before?.macs[0], '00:50:56:01:02:03'] });
    expect(read('lab/web1/golden.vmx')).toContain('memSize = "2048"');
    expect(await daemon.json(['vm', 'status', 'lab/web1'])).toMatchObject({ power: 'shut-off' });
    expect(await daemon.json(['vm', 'unregister', 'lab/web1'])).toMatchObject({ registration: 'none' });
    expect(await simulator.machines()).toEqual([]);
    expect(await daemon.json(['vm', 'register', 'lab/web1'])).toMatchObject({ registration: 'registered' });
    expect(await inVsphere('web1')).toMatchObject({ uuid: before?.uuid });
    await daemon.json(['vm', 'start', 'lab/web1']);
    // A clone of one that ran in vSphere has nothing that vSphere made beside it.
    expect(readdirSync(daemon.path('lab/web1'))).toContain('vmware.log');
    const { machines } = await daemon.json<Cloned>(['vm', 'clone', 'lab/web1', 'lab/web9']);
    expect(machines).toHaveLength(1);
    expect(readdirSync(daemon.path('lab/web9')).toSorted()).toEqual(['data-flat.vmdk', 'data.vmdk', 'golden-flat.vmdk', 'golden.vmdk', 'golden.vmx', 'notes']);
    await removeAll('lab');
    await expectNothing('lab');
  });

  it('are cloned with their container from a snapshot, and registered', async () => {
    await daemon.json(['snapshot', 'create', 'golden@v1']);
    const { machines } = await daemon.json<Cloned>(['clone', 'golden@v1', 'lab7', '--register-all']);
    expect(machines).toMatchObject([{ path: 'lab7/debian', name: 'lab7-debian', registration: 'registered' }]);
    expect(await simulator.machines()).toMatchObject([{ name: 'lab7-debian', uuid: machines[0]?.uuid, path: `[${DATASTORE}] lab7/debian/golden.vmx`, disks: [{ bytes: ROOT_BYTES }, { bytes: DATA_BYTES }] }]);
    await removeAll('lab7');
    await daemon.json(['rm', '-r', 'lab7']);
    await daemon.json(['snapshot', 'rm', 'golden@v1']);
    await expectNothing('lab');
  });

  it('leave nothing when the name of one of several is taken in vSphere, whose own machine stays', async () => {
    const directory = join(simulator.directory, ELSEWHERE, 'web11');
    mkdirSync(directory);
    const stranger = { name: 'web11', uuid: '564d9999-2222-4333-8444-555555555555', directory, configuration: 'other.vmx', text: '', owner: { uid: 0, gid: 0 } };
    writeFileSync(join(directory, 'other.vmx'), 'displayName = "web11"\nuuid.bios = "56 4d 99 99 22 22 43 33-84 44 55 55 55 55 55 55"\n');
    const admin = new Vsphere(parseVsphereSettings(settings(join(simulator.directory, ELSEWHERE), { datastores: [{ directory: join(simulator.directory, ELSEWHERE), datastore: ELSEWHERE }] })));
    cleanup.add(() => admin.close());
    const { externalId } = await admin.register(stranger, { signal });
    const failed = await daemon.cli(['vm', 'clone', 'golden/debian', ...Array.from({ length: 12 }, (_, i) => `lab/web${i + 1}`), '--register']);
    expect([failed.code, failed.stderr]).toEqual([4, expect.stringContaining("the name 'web11' is taken in vSphere")]);
    await expectNothing('lab', ['web11']);
    await admin.unregister(externalId, { signal });
  });

  it('leave nothing when vSphere refuses one of several, also when it will never take it', async () => {
    await simulator.refuseNext('RegisterVM_Task', 'FileFault');
    expect((await daemon.cli(['vm', 'clone', 'golden/debian', 'lab/web1', 'lab/web2', 'lab/web3', '--register'])).stderr).toContain('FileFault');
    await expectNothing('lab');
    for (let n = 0; n < 40; n += 1) await simulator.refuseNext('RegisterVM_Task', 'NoPermission');
    const failed = await daemon.cli(['vm', 'clone', 'golden/debian', 'lab/web1', 'lab/web2', 'lab/web3', '--register']);
    expect([failed.code, failed.stderr]).toEqual([6, expect.stringContaining('VirtualMachine.Inventory.Register')]);
    await expectNothing('lab');
    await simulator.forgive();
  });

  it('are refused when a descriptor leads elsewhere, before anything is made', async () => {
    const descriptor = read('golden/debian/golden.vmdk');
    try {
      writeFileSync(daemon.path('golden/debian/golden.vmdk'), descriptor.replace('"golden-flat.vmdk"', `"${daemon.path('golden/other-flat.vmdk')}"`));
      expect((await daemon.cli(['vm', 'clone', 'golden/debian', 'lab/web1'])).stderr).toContain('out of its own directory');
    } finally {
      writeFileSync(daemon.path('golden/debian/golden.vmdk'), descriptor);
    }
    await expectNothing('lab');
  });

  it.each<readonly [string, (mountDir: string) => string, number, string]>([
    ['no JSON', () => '{', 2, 'no JSON'],
    ['a thumbprint that is none', (mountDir) => settings(mountDir, { thumbprint: 'AB:CD' }), 2, 'thumbprint must be'],
    ['a datastore for another directory than the mount', () => settings('/srv/other'), 2, 'none of its datastores holds the mount'],
    ['credentials that are not there', (mountDir) => settings(mountDir, { credentialsFile: '/nowhere/credentials' }), 3, 'credentials file'],
  ])('are not served with settings that are wrong: %s; one line says so', async (_what, text, code, message) => {
    const other = await startTestDaemon({ transport: 'kernel', cleanup, start: false });
    const file = join(makeTempDir('wrong', cleanup), 'settings.json');
    writeFileSync(file, text(other.mountDir));
    const failed = await other.cli(['daemon', 'start', '--store', other.storeDir, '--mount', other.mountDir, '--vsphere', file]);
    expect([failed.code, failed.stdout, failed.stderr.trimEnd().split('\n')]).toEqual([code, '', [expect.stringMatching(new RegExp(`${file}.*${message}`, 'u'))]]);
    expect((await other.cli(['daemon', 'status'])).code).toBe(13);
  });

  it('serve their disks when the settings go bad, and say why they cannot be registered; and go on when the settings are right again', async () => {
    await clone('lab/web1', '--register');
    const right = readFileSync(settingsFile, 'utf8');
    writeFileSync(settingsFile, right.replace('https:', 'http:'));
    await daemon.waitForServer(await daemon.killServer());
    expect(readFileSync(daemon.path('lab/web1/data-flat.vmdk')).equals(patternBytes(4, 0, DATA_BYTES))).toBe(true);
    const failed = await daemon.cli(['vm', 'clone', 'golden/debian', 'lab/web2', '--register']);
    expect([failed.code, failed.stderr]).toEqual([2, expect.stringContaining('url must be https://')]);
    await daemon.json(['vm', 'clone', 'golden/debian', 'lab/web3']);
    expect((await daemon.json<MachineInfo[]>(['vm', 'ls', 'lab'])).map(({ path }) => path)).toEqual(['lab/web1', 'lab/web3']);
    writeFileSync(settingsFile, right);
    await daemon.waitForServer(await daemon.killServer());
    expect(await daemon.json(['vm', 'status', 'lab/web1'])).toMatchObject({ power: 'shut-off' });
    await removeAll('lab');
    await expectNothing('lab');
  });

  it('of a disk that was made smaller behind its descriptor are not imported', async () => {
    const directory = join(makeTempDir('vmx', cleanup), 'short');
    mkdirSync(directory);
    for (const name of readdirSync(source)) copyFileSync(join(source, name), join(directory, name));
    truncateSync(join(directory, 'golden-flat.vmdk'), statSync(join(source, 'golden-flat.vmdk')).size - 512);
    expect((await daemon.cli(['vm', 'import', directory, 'lab/short'])).stderr).toContain('it is cut off');
    await expectNothing('lab');
  });

  // The last one: calls of the dead server are still held up in the simulator when it ends.
  it('leave nothing when the server is killed between two registrations', async () => {
    const before = await simulator.calls('RegisterVM_Task');
    await simulator.delay('RegisterVM_Task', 3000);
    const asked = daemon.cli(['vm', 'clone', 'golden/debian', ...Array.from({ length: 12 }, (_, i) => `killed/web${i + 1}`), '--register'], { timeoutMs: LONG_MS });
    // Eight are asked for at a time: those come, and the others never do.
    await expect.poll(() => simulator.calls('RegisterVM_Task'), { timeout: LONG_MS, interval: 5 }).toBeGreaterThan(before);
    await simulator.delay('RegisterVM_Task', 600_000);
    await expect.poll(() => simulator.machines(), { timeout: LONG_MS, interval: 20 }).not.toEqual([]);
    const dead = await daemon.killServer();
    await simulator.delay('RegisterVM_Task', 0);
    await daemon.waitForServer(dead);
    expect((await asked).code).not.toBe(0);
    expect(await waitUntil(async () => (await daemon.json<JobInfo[]>(['jobs', '--state', 'running'])).every((job) => !job.kind.startsWith('machine-')), LONG_MS)).toBe(true);
    expect((await daemon.json<JobInfo[]>(['jobs', '--state', 'failed'])).at(-1)).toMatchObject({ kind: 'machine-clone', error: { kind: 'cancelled' } });
    await expectNothing('killed');
  });
});
