/**
 * The libvirt adapter against a real libvirtd and real QEMU: the conformance suite, with a guest on a clone of a real store; that libvirt changes the
 * owner of nothing; and that an adapter made anew finds what the one before it registered and started.
 */
import { randomUUID } from 'node:crypto';
import { statSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { MachineToRegister } from '../../daemon/hypervisor/hypervisor.js';
import { createLibvirtHypervisor } from '../../daemon/hypervisor/libvirt/libvirt.js';
import { testHypervisor, type HypervisorTestBed } from '../support/hypervisor-conformance.js';
import { cloneGuest, emptyMachineFiles, GUEST_LISTENS_LINE, KERNEL_ARGUMENTS, MACHINE_OWNER, makeMachinesDir, readOrEmpty, type GuestFiles, type MachineFiles } from '../support/hypervisor-guest.js';
import { startLibvirtd, type TestLibvirtd } from '../support/libvirtd.js';
import { signalProcess } from '../support/processes.js';
import { createCleanup, type Cleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

interface Identity { readonly name: string; readonly uuid: string }

const options = { signal: new AbortController().signal };

function domainXml({ name, uuid }: Identity, files: MachineFiles & Partial<GuestFiles>, console?: string): string {
  const boot = files.image === undefined ? '' : `<kernel>${files.image.kernel}</kernel><initrd>${files.image.initrd}</initrd><cmdline>${KERNEL_ARGUMENTS}</cmdline>`;
  return `<?xml version='1.0'?>
<!-- </domain> in a comment is not the end -->
<domain type='qemu'>
  <name>${name}</name>
  <uuid>${uuid}</uuid>
  <memory unit='MiB'>${files.image === undefined ? 64 : 512}</memory>
  <vcpu>${files.image === undefined ? 1 : 2}</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>${boot}</os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='${files.disk}'/><target dev='vda' bus='virtio'/></disk>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    ${console === undefined ? '' : `<serial type='file'><source path='${console}'/><target port='0'/></serial>`}
    <memballoon model='none'/>
  </devices>
</domain>
<!-- the end -->
`;
}

const needed = ['/dev/fuse', 'libvirtd', 'virsh', 'unshare', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'debugfs'];

interface LibvirtBed extends HypervisorTestBed {
  readonly libvirtd: TestLibvirtd;
  /** The guest's disk on the mount, in a machine that cannot boot it. */
  onMount(identity: Identity): { readonly machine: MachineToRegister; readonly disk: string };
}

/** A mount is seen by a libvirtd that was started after it, on hosts whose mounts are not shared: so the guest is there before. */
async function setUp(cleanup: Cleanup): Promise<LibvirtBed> {
  const guest = await cloneGuest(cleanup);
  const machinesDir = makeMachinesDir(cleanup);
  const libvirtd = await startLibvirtd(cleanup);
  const hypervisor = createLibvirtHypervisor({ uri: libvirtd.uri });
  const console = join(emptyMachineFiles(machinesDir, 'console').directory, 'console.log');
  let directories = 0;
  const toRegister = (identity: Identity, files: MachineFiles & Partial<GuestFiles>, log?: string): MachineToRegister => ({
    ...identity, directory: files.directory, configuration: 'domain.xml', owner: MACHINE_OWNER, text: domainXml(identity, files, log),
  });
  const nameOf = async (externalId: string): Promise<string> => (await libvirtd.virsh(['domname', externalId])).stdout.trim();
  return {
    libvirtd,
    onMount: (identity) => ({ machine: toRegister(identity, { directory: guest.directory, disk: guest.disk }), disk: guest.disk }),
    hypervisor,
    makeMachine(identity) {
      directories += 1;
      return toRegister(identity, emptyMachineFiles(machinesDir, `m${directories}`));
    },
    withoutHypervisor: () => createLibvirtHypervisor({ uri: libvirtd.uri.replace('libvirt-sock', 'no-such-sock') }),
    crash: async (externalId) => { signalProcess(libvirtd.pidOf(await nameOf(externalId)), 'SIGKILL'); },
    pause: async (externalId) => { await libvirtd.virsh(['suspend', externalId]); },
    userOf: async (externalId) => statSync(`/proc/${libvirtd.pidOf(await nameOf(externalId))}`).uid,
    makeGuest: async (identity) => toRegister(identity, guest, console),
    isGuestUp: async () => readOrEmpty(console).includes(GUEST_LISTENS_LINE),
    async freezeState(externalId) {
      const { stdout } = await libvirtd.virsh(['qemu-agent-command', externalId, '{"execute":"guest-fsfreeze-status"}']);
      return (JSON.parse(stdout) as { readonly return: unknown }).return;
    },
  };
}

const isMissing = lacks(...needed);

describe.skipIf(isMissing)('libvirt', () => {
  testHypervisor({
    id: 'libvirt',
    abilities: { formats: ['libvirt'], shutdown: true, guestAgent: true, quiesce: true, isRemote: false },
    hooks: ['crash', 'pause', 'userOf', 'makeGuest'],
    setUp,
  });

  describe('with what libvirt would do by itself', () => {
    const cleanup = createCleanup();
    let bed: LibvirtBed;
    beforeAll(async () => { bed = await setUp(cleanup); });
    afterAll(() => cleanup.run());

    it('changes the owner of no disk, neither while the machine runs nor after', async () => {
      // On the mount there is no place where libvirt could note whose a disk was.
      const { machine, disk } = bed.onMount({ name: 'owned', uuid: randomUUID() });
      const { externalId } = await bed.hypervisor.register(machine, options);
      await bed.hypervisor.start(externalId, options);
      expect(statSync(disk)).toMatchObject(MACHINE_OWNER);
      await bed.hypervisor.stop(externalId, { ...options, force: true, timeoutMs: 1000 });
      expect(statSync(disk)).toMatchObject(MACHINE_OWNER);
      await bed.hypervisor.unregister(externalId, options);
      expect(statSync(disk).size).toBeGreaterThan(0);
    });

    it('finds a machine again after libvirtd was started anew, and a machine runs on meanwhile', async () => {
      const { externalId } = await bed.hypervisor.register(bed.makeMachine({ name: 'stays', uuid: randomUUID() }), options);
      await bed.hypervisor.start(externalId, options);
      const pid = bed.libvirtd.pidOf('stays');
      await bed.libvirtd.stop();
      expect((await bed.hypervisor.probe(options)).usable).toBe(false);
      await expect(bed.hypervisor.status(externalId, options)).rejects.toMatchObject({ kind: 'source-unreachable' });
      await bed.libvirtd.start();
      const anew = createLibvirtHypervisor({ uri: bed.libvirtd.uri });
      expect(await anew.status(externalId, options)).toBe('running');
      expect(bed.libvirtd.pidOf('stays')).toBe(pid);
      await anew.stop(externalId, { ...options, force: true, timeoutMs: 1000 });
      await anew.unregister(externalId, options);
    });
  });
});
