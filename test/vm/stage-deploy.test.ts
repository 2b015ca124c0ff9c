/**
 * A Debian machine in one file, with QEMU by itself and with libvirt: staged, deployed, booted to multi-user from what is mounted on a clone of the file, over a kill of the
 * daemon's server, under which the guest goes on and writes; decommissioned, deployed again, booted again. The container file has the same checksum throughout.
 */
import { randomUUID } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DeployedInfo, StagedInfo } from '../../daemon/control/vdisk-schemas.js';
import { askGuestAgent } from '../../daemon/hypervisor/qemu/guest-agent.js';
import { GUEST_READY_LINE, guestImage } from '../support/guest-image.js';
import { GUEST_LISTENS_LINE, KERNEL_ARGUMENTS, listenToPowerButton } from '../support/hypervisor-guest.js';
import { prepareLibvirtd, shareMounts, type TestLibvirtd } from '../support/libvirtd.js';
import { command, mustRun } from '../support/model/command.js';
import { processesNaming, waitUntil } from '../support/processes.js';
import { startQemuMachines, USER, type QemuMachines } from '../support/qemu-machines.js';
import { createCleanup, makeTempDir, type Cleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { cleanVdisks, loopDevicesOf, mountsBelow } from '../support/vdisk-programs.js';

const TIMEOUT_MS = 300_000;
const TEST_MS = 1_000_000;
const LINES_SAID = 20;
/** In the guest: a count that goes on for as long as writes are made durable. */
const BEAT = 'i=0; while i=$((i + 1)); do echo $i > /root/beat.new && sync /root/beat.new && mv /root/beat.new /root/beat || exit; sleep 0.1; done';

interface World {
  readonly machines: QemuMachines;
  readonly runtimeBase: string;
  /** What the hypervisor knows. */
  readonly known: () => Promise<readonly string[]>;
  readonly ask: (info: DeployedInfo, execute: string, parameters?: object) => Promise<unknown>;
}

/** A Debian machine that is off, imported as `golden/debian`, of the user as whom it runs. */
async function importDebian({ daemon }: QemuMachines, configure: (directory: string) => void, cleanup: Cleanup): Promise<void> {
  const image = await guestImage();
  const source = join(makeTempDir('debian', cleanup), 'debian');
  mkdirSync(source);
  await mustRun('cp', ['--sparse=always', image.disk, join(source, 'disk.img')], { timeoutMs: TIMEOUT_MS });
  await listenToPowerButton(join(source, 'disk.img'), cleanup);
  copyFileSync(image.kernel, join(source, 'vmlinuz'));
  copyFileSync(image.initrd, join(source, 'initrd'));
  configure(source);
  const { code, stderr } = await daemon.cli(['vm', 'import', source, 'golden/debian'], { timeoutMs: TIMEOUT_MS });
  if (code !== 0) throw new Error(stderr);
  await mustRun('chown', ['-R', `${USER.uid}:${USER.gid}`, daemon.path('golden/debian')]);
}

async function qemuWorld(cleanup: Cleanup): Promise<World> {
  const machines = await startQemuMachines(cleanup);
  const runtimeBase = dirname(machines.runtimeDir);
  cleanVdisks(cleanup, machines.daemon, runtimeBase);
  await importDebian(machines, (directory) => {
    writeFileSync(join(directory, 'machine.json'), JSON.stringify({
      format: 'offshoot-machine/1', name: 'debian', accelerator: 'tcg', cpu: 'qemu64', processors: 2, memory: '512MiB', disks: [{ file: 'disk.img' }],
      networkInterfaces: [{ backend: { type: 'user', restrict: true } }], kernel: 'vmlinuz', initrd: 'initrd', append: KERNEL_ARGUMENTS, consoleLog: 'console.log', guestAgent: true,
    }, null, 2));
  }, cleanup);
  return {
    machines, runtimeBase, known: () => Promise.resolve(machines.registrations()),
    ask: async (info, execute, parameters) => await askGuestAgent(machines.call(machines.paths(info).agentSocket), execute, parameters),
  };
}

async function libvirtWorld(cleanup: Cleanup): Promise<World> {
  const libvirtd: TestLibvirtd = prepareLibvirtd(cleanup);
  const machines = await startQemuMachines(cleanup, { startArguments: () => ['--libvirt', libvirtd.uri] });
  const runtimeBase = dirname(machines.runtimeDir);
  await shareMounts(runtimeBase, cleanup);
  cleanVdisks(cleanup, machines.daemon, runtimeBase);
  await libvirtd.start();
  const virsh = async (...args: readonly string[]): Promise<string> => {
    const { code, stdout, stderr } = await libvirtd.virsh(args);
    if (code !== 0) throw new Error(`virsh ${args.join(' ')}: ${stderr}`);
    return stdout;
  };
  await importDebian(machines, (directory) => { writeFileSync(join(directory, 'debian.xml'), domainXml(directory)); }, cleanup);
  return {
    machines, runtimeBase, known: async () => (await virsh('list', '--all', '--name')).split('\n').filter((name) => name.trim() !== ''),
    ask: async ({ name }, execute, parameters) => (JSON.parse(await virsh('qemu-agent-command', '--timeout', '30', name, JSON.stringify({ execute, arguments: parameters ?? {} }))) as { readonly return: unknown }).return,
  };
}

function domainXml(directory: string): string {
  return `<domain type='qemu'>
  <name>debian</name>
  <uuid>${randomUUID()}</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><kernel>${directory}/vmlinuz</kernel><initrd>${directory}/initrd</initrd><cmdline>${KERNEL_ARGUMENTS}</cmdline></os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='${directory}/disk.img'/><target dev='vda' bus='virtio'/></disk>
    <interface type='user'><mac address='52:54:00:12:34:56'/><model type='virtio'/></interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <serial type='file'><source path='${directory}/console.log'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
`;
}

/** Of a daemon that does not answer: what its processes wait for in the kernel, and what it said last. */
function whatGoesOn(daemon: QemuMachines['daemon']): string {
  const read = (file: string): string => { try { return readFileSync(file, 'utf8').trim(); } catch { return '-'; } };
  const said = daemon.log().slice(-LINES_SAID).map(({ text }) => text.slice(0, 300));
  const threads = processesNaming(daemon.mountDir).flatMap((pid) => readdirSync(`/proc/${pid}/task`).map((task) => `${pid} ${task} ${read(`/proc/${pid}/task/${task}/comm`)} ${read(`/proc/${pid}/task/${task}/wchan`)} ${read(`/proc/${pid}/task/${task}/stack`).split('\n').slice(0, 6).join(' < ')}`));
  return [...said, ...threads].join('\n');
}

const NEEDED = ['/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'debugfs', 'dumpe2fs', 'e2fsck', 'losetup', 'sfdisk', 'setpriv', 'openssl'] as const;

describe.each([
  { hypervisor: 'qemu', makeWorld: qemuWorld, isMissing: lacks(...NEEDED) },
  { hypervisor: 'libvirt', makeWorld: libvirtWorld, isMissing: lacks(...NEEDED, 'libvirtd', 'virsh', 'unshare') },
])('a Debian machine in a container file, with $hypervisor', ({ hypervisor, makeWorld, isMissing }) => {
  const cleanup = createCleanup();
  let world: World;
  beforeAll(async () => { if (!isMissing) world = await makeWorld(cleanup); }, TEST_MS);
  afterAll(() => cleanup.run(), TIMEOUT_MS);

  it.skipIf(isMissing)('is deployed, boots to multi-user, writes on while the server is killed, is decommissioned, deployed and booted again; the file is never written', async () => {
    const { machines: { daemon }, runtimeBase } = world;
    const json = async <T>(...args: readonly string[]): Promise<T> => {
      const { code, stdout, stderr } = await daemon.cli([...args, '--json'], { timeoutMs: TIMEOUT_MS });
      if (code !== 0) throw new Error(`offshoot ${args.join(' ')}: exit code ${code}\n${stderr}\n${whatGoesOn(daemon)}`);
      return JSON.parse(stdout) as T;
    };
    const sum = async (): Promise<string> => (await mustRun('openssl', ['dgst', '-sha256', '-r', daemon.path('golden/debian.vdisk')], { timeoutMs: TIMEOUT_MS })).stdout.slice(0, 64);
    const inGuest = async (info: DeployedInfo, script: string): Promise<string> => {
      const { pid } = await world.ask(info, 'guest-exec', { path: '/bin/sh', arg: ['-c', script], 'capture-output': true }) as { readonly pid: number };
      let seen: { readonly exited?: boolean; readonly 'out-data'?: string } = {};
      await waitUntil(async () => {
        seen = await world.ask(info, 'guest-exec-status', { pid }) as typeof seen;
        return seen.exited === true;
      }, TIMEOUT_MS);
      return Buffer.from(seen['out-data'] ?? '', 'base64').toString().trim();
    };
    const boots = async (info: DeployedInfo): Promise<void> => {
      const isUp = async (): Promise<boolean> => {
        const [now] = await json<DeployedInfo[]>('deployed', info.name);
        const { stdout } = await command('cat', [join(info.mountPoint, 'console.log')]);
        return now?.agent === true && stdout.includes(GUEST_READY_LINE) && stdout.includes(GUEST_LISTENS_LINE);
      };
      expect(await waitUntil(isUp, TIMEOUT_MS)).toBe(true);
      expect(await inGuest(info, 'systemctl is-active multi-user.target; findmnt -no OPTIONS / | cut -d, -f1')).toBe('active\nrw');
    };
    const deploy = async (name: string): Promise<DeployedInfo> => (await json<{ readonly deployed: DeployedInfo }>('deploy', 'golden/debian.vdisk', '--name', name)).deployed;
    const expectNothing = async (): Promise<void> => {
      expect([await loopDevicesOf(daemon), mountsBelow(runtimeBase), await world.known()]).toEqual([[], [], []]);
      expect(readdirSync(daemon.path('golden')).toSorted()).toEqual(['debian', 'debian.vdisk']);
    };

    const { staged } = await json<{ readonly staged: StagedInfo }>('stage', 'golden/debian', 'golden/debian.vdisk');
    expect(staged).toMatchObject({ state: 'ready', machine: 'debian', format: hypervisor });
    await expectNothing();
    const before = await sum();

    const first = await deploy('web1');
    expect(first).toMatchObject({ state: 'ready', mounted: true, hypervisor, power: 'running' });
    await boots(first);
    await inGuest(first, `(${BEAT}) < /dev/null > /dev/null 2>&1 &`);
    const beats = async (): Promise<number> => Number(await inGuest(first, 'cat /root/beat 2> /dev/null'));
    expect(await waitUntil(async () => await beats() > 3, TIMEOUT_MS)).toBe(true);
    const killed = await daemon.killServer();
    const atKill = await beats();
    await daemon.waitForServer(killed, TIMEOUT_MS);
    expect(await waitUntil(async () => await beats() > atKill + 10, TIMEOUT_MS)).toBe(true);
    expect(await inGuest(first, 'echo 3 > /proc/sys/vm/drop_caches; cd / && md5sum --quiet -c /var/lib/dpkg/info/libc-bin.md5sums && findmnt -no OPTIONS / | cut -d, -f1')).toBe('rw');
    const refused = await daemon.cli(['daemon', 'stop'], { timeoutMs: TIMEOUT_MS });
    expect([refused.code === 0, refused.stderr]).toEqual([false, expect.stringContaining('web1 is deployed and runs')]);

    // Asked, and it goes down by itself.
    await json('decommission', 'web1', '--timeout', '250');
    expect(existsSync(daemon.path('golden/web1.vdisk'))).toBe(false);
    await expectNothing();
    expect(await sum()).toBe(before);

    const second = await deploy('web2');
    expect(new Set([first.uuid, second.uuid, ...first.macs, ...second.macs]).size).toBe(4);
    await boots(second);
    expect(await inGuest(second, 'ls /root/beat 2> /dev/null')).toBe('');
    await json('decommission', 'web2', '--force');
    await expectNothing();
    expect(await sum()).toBe(before);
    await daemon.stop();
  }, TEST_MS);
});
