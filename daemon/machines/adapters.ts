/**
 * The formats and hypervisors that this server knows. Filled once, before the first call, by the composition; a test's preloaded module adds its own.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { Hypervisor, HypervisorId } from '../hypervisor/hypervisor.js';
import type { FormatId, MachineFormat } from './format.js';

/** Who registers a machine of a format when nobody says another. */
const USUAL_HYPERVISOR = { libvirt: 'libvirt', vmx: 'vsphere', qemu: 'qemu' } as const satisfies Record<FormatId, HypervisorId>;

export class MachineAdapters {
  readonly #formats = new Map<FormatId, MachineFormat>();
  readonly #hypervisors = new Map<HypervisorId, Hypervisor>();
  readonly #refusals = new Map<HypervisorId, OffshootError>();

  addFormat(format: MachineFormat): void { this.#formats.set(format.id, format); }
  addHypervisor(hypervisor: Hypervisor): void { this.#hypervisors.set(hypervisor.id, hypervisor); }
  hasFormat(id: FormatId): boolean { return this.#formats.has(id); }
  hasHypervisor(id: HypervisorId): boolean { return this.#hypervisors.has(id); }
  /** One that was asked for and cannot be had: whoever names it is told why. */
  addRefusal(id: HypervisorId, reason: OffshootError): void { this.#refusals.set(id, reason); }

  /** The format of a configuration by its name and beginning; null when none knows it. */
  formatOf(fileName: string, text: string): MachineFormat | null {
    for (const format of this.#formats.values()) if (format.recognises(fileName, text)) return format;
    return null;
  }

  format(id: string): MachineFormat {
    const format = this.#formats.get(id as FormatId);
    if (format === undefined) throw new OffshootError('not-supported', `this daemon does not know the format ${id}: start the version that made the machine`);
    return format;
  }

  hypervisor(id: string): Hypervisor {
    const hypervisor = this.#hypervisors.get(id as HypervisorId);
    const refusal = this.#refusals.get(id as HypervisorId);
    if (refusal !== undefined) throw new OffshootError(refusal.kind, refusal.message, refusal.context, refusal);
    const known = [...this.#hypervisors.keys()].join(', ');
    if (hypervisor === undefined) {
      throw new OffshootError('not-supported', `this daemon has no adapter for ${id}: ${id === 'vsphere' ? 'start it with --vsphere FILE, or ' : ''}choose one of ${known}`);
    }
    return hypervisor;
  }

  /** The one that takes machines of the format: what was asked for, or the usual one. */
  hypervisorFor(format: FormatId, wanted: string | null): Hypervisor {
    const hypervisor = this.hypervisor(wanted ?? USUAL_HYPERVISOR[format]);
    if (!hypervisor.abilities.formats.includes(format)) {
      throw new OffshootError('not-supported', `${hypervisor.id} takes no ${format} configurations, but ${hypervisor.abilities.formats.join(', ')}: choose another --hypervisor`);
    }
    return hypervisor;
  }
}

export const machineAdapters = new MachineAdapters();
