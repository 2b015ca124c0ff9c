/**
 * The formats of machine configurations that there are. Which of them a file is of, the server's adapters say (`adapters.ts`).
 */
import type { FormatId, MachineFormat } from './format.js';
import { libvirtFormat } from './formats/libvirt.js';
import { qemuFormat } from './formats/qemu.js';
import { vmxFormat } from './formats/vmx.js';

const FORMATS = { libvirt: libvirtFormat, vmx: vmxFormat, qemu: qemuFormat } as const satisfies Record<FormatId, MachineFormat>;

export const MACHINE_FORMATS: readonly MachineFormat[] = Object.values(FORMATS);

