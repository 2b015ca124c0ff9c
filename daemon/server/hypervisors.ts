/**
 * The formats and hypervisors of a running server, by what `daemon start` was told: libvirt and QEMU always, vSphere with its settings. Main thread.
 *
 * QEMU's registrations lie in the store. Its sockets lie beside the server's run-time directory and not in it: that one is closed to
 * the users whom machines run as, and emptied with each mount, which machines outlive.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';

import { isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import type { ServerOptions } from '../holder/options.js';
import { createLibvirtHypervisor } from '../hypervisor/libvirt/libvirt.js';
import { createQemuHypervisor } from '../hypervisor/qemu/qemu.js';
import type { MachineAdapters } from '../machines/adapters.js';
import { MACHINE_FORMATS } from '../machines/formats.js';
import { parseQemuMachine } from '../machines/formats/qemu.js';
import { qemuCommand } from '../machines/formats/qemu-arguments.js';

export interface HypervisorParts {
  readonly options: Pick<ServerOptions, 'storeDir' | 'runtimeDir' | 'hypervisors'>;
  readonly logger: { warn(context: object, message: string): void };
}

/** In the store's directory. */
const REGISTRATIONS = 'qemu';

/** Adds what is not there yet. The answer logs out where somebody is logged in; it never fails. */
export async function addHypervisors(adapters: MachineAdapters, { options, logger }: HypervisorParts): Promise<() => Promise<void>> {
  const { libvirtUri, vsphereSettings } = options.hypervisors ?? {};
  for (const format of MACHINE_FORMATS) if (!adapters.hasFormat(format.id)) adapters.addFormat(format);
  if (!adapters.hasHypervisor('libvirt')) adapters.addHypervisor(createLibvirtHypervisor(libvirtUri === undefined ? {} : { uri: libvirtUri }));
  if (!adapters.hasHypervisor('qemu')) {
    adapters.addHypervisor(createQemuHypervisor({
      commandOf: (text, places) => qemuCommand(parseQemuMachine(text), places),
      registrationDir: path.join(options.storeDir, REGISTRATIONS), runtimeDir: machinesRuntimeDir(options.runtimeDir),
    }));
  }
  if (vsphereSettings === undefined || adapters.hasHypervisor('vsphere')) return () => Promise.resolve();
  try {
    const { Vsphere } = await import('../hypervisor/vsphere/vsphere.js');
    const { parseVsphereSettings } = await import('../hypervisor/vsphere/settings.js');
    const vsphere = new Vsphere(parseVsphereSettings(await readFile(vsphereSettings, 'utf8')));
    adapters.addHypervisor(vsphere);
    return async () => { await vsphere.close().catch(() => undefined); };
  } catch (thrown) {
    // The settings were right when the daemon was started. Disks are served without them.
    const error = toOffshootError(thrown);
    if (!isOperatingError(error)) throw thrown;
    adapters.addRefusal('vsphere', error);
    logger.warn({ file: vsphereSettings, reason: error.message }, 'vSphere cannot be used: its settings are not right any more');
    return () => Promise.resolve();
  }
}

/** `/run/offshoot/KEY` gives `/run/offshoot-machines-KEY`. */
export function machinesRuntimeDir(runtimeDir: string): string {
  return `${path.dirname(runtimeDir)}-machines-${path.basename(runtimeDir)}`;
}
