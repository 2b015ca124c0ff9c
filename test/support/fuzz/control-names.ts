/**
 * Sound calls of the control API in random order, against a model of names: which containers and disks there are, and how
 * large. The model says what must be refused and why; what else the daemon refuses must leave everything as it was.
 */
import * as fc from 'fast-check';

import { OffshootError, type ErrorKind } from '../../../blockstore/errors.js';
import type { ControlClient } from '../../../daemon/control/client.js';

export type NameCall =
  | { readonly call: 'container'; readonly name: string }
  | { readonly call: 'clone'; readonly source: string; readonly targets: readonly string[]; readonly fill: boolean; readonly copyOnRead: boolean }
  | { readonly call: 'remove'; readonly path: string; readonly keepData: boolean; readonly recursive: boolean }
  | { readonly call: 'resize'; readonly path: string; readonly sizeBytes: number }
  | { readonly call: 'fill'; readonly path: string; readonly what: 'start' | 'pause' | 'resume' | 'status'; readonly rate: number | null };

const IMAGE = 'base/img';
/** What may be called so, and often is not. */
const CONTAINERS = ['base', 'vms', 'é', '-x', 'a b'];
const NAMES = ['one', 'two', 'img', '..x', '\u{1f4be}', 'x'.repeat(255)];
/** What a fill may say of a disk in its present state. */
const FILL_REFUSALS: readonly ErrorKind[] = ['busy', 'in-use', 'already-exists', 'invalid-argument', 'not-found', 'is-a-directory'];

const container = fc.constantFrom(...CONTAINERS);
const disk = fc.tuple(container, fc.constantFrom(...NAMES)).map(([at, name]) => `${at}/${name}`);
const source = fc.oneof({ weight: 2, arbitrary: fc.constant(IMAGE) }, { weight: 3, arbitrary: disk });
const call: fc.Arbitrary<NameCall> = fc.oneof(
  { weight: 2, arbitrary: fc.record({ call: fc.constant('container' as const), name: container }) },
  { weight: 5, arbitrary: fc.record({ call: fc.constant('clone' as const), source, targets: fc.uniqueArray(disk, { minLength: 1, maxLength: 3 }), fill: fc.boolean(), copyOnRead: fc.boolean() }) },
  { weight: 3, arbitrary: fc.record({ call: fc.constant('remove' as const), path: fc.oneof(disk, container), keepData: fc.boolean(), recursive: fc.boolean() }) },
  { weight: 2, arbitrary: fc.record({ call: fc.constant('resize' as const), path: disk, sizeBytes: fc.integer({ min: 1, max: 5000 }).map((sectors) => sectors * 512) }) },
  { weight: 3, arbitrary: fc.record({ call: fc.constant('fill' as const), path: source, what: fc.constantFrom('start' as const, 'pause' as const, 'resume' as const, 'status' as const), rate: fc.constantFrom(null, 1, 65_536, 10_000_000) }) },
);
export const sequences = fc.array(call, { minLength: 1, maxLength: 20 });

class Names {
  readonly #control: ControlClient;
  readonly #containers = new Set(['base']);
  readonly #disks: Map<string, number>;

  constructor(control: ControlClient, imageBytes: number) {
    this.#control = control;
    this.#disks = new Map([[IMAGE, imageBytes]]);
  }

  async play(one: NameCall): Promise<void> {
    // The image stays, for the cases after this one.
    if ((one.call === 'remove' && (one.path === IMAGE || one.path === 'base')) || (one.call === 'resize' && one.path === IMAGE)) return;
    const must = this.#refusalOf(one);
    const refused = await this.#do(one);
    if (must !== null && !(refused !== null && must.includes(refused))) throw new Error(`${JSON.stringify(one)} was answered ${refused ?? 'with success'} instead of ${must.join(' or ')}`);
    if (refused === null) this.#apply(one);
    else if (must === null && !MAY_BE_REFUSED[one.call].includes(refused)) throw new Error(`${JSON.stringify(one)} was refused: ${refused}`);
    await this.compare();
  }

  async compare(): Promise<void> {
    const containers = (await this.#control.listContainers()).map(({ name }) => name);
    expectSame('containers', containers, [...this.#containers]);
    for (const name of containers) {
      const listed = (await this.#control.list(name)).map(({ path, sizeBytes }) => `${path} ${sizeBytes}`);
      expectSame(name, listed, [...this.#disks].filter(([path]) => path.startsWith(`${name}/`)).map(([path, size]) => `${path} ${size}`));
    }
  }

  /** Why it must be refused; null when that is for the daemon to say. */
  #refusalOf(one: NameCall): readonly ErrorKind[] | null {
    switch (one.call) {
      case 'container': return this.#containers.has(one.name) ? ['already-exists'] : null;
      case 'clone': {
        if (!this.#disks.has(one.source)) return ['not-found'];
        const isMissing = one.targets.some((target) => !this.#containers.has(containerOf(target)));
        const isTaken = one.targets.some((target) => this.#disks.has(target));
        return isMissing || isTaken ? [...(isMissing ? ['not-found' as const] : []), ...(isTaken ? ['already-exists' as const] : [])] : null;
      }
      case 'remove': {
        if (one.path.includes('/')) return this.#disks.has(one.path) ? null : ['not-found'];
        if (!this.#containers.has(one.path)) return ['not-found'];
        return this.#below(one.path).length > 0 && !one.recursive ? ['not-empty'] : null;
      }
      case 'resize':
      case 'fill': return this.#disks.has(one.path) ? null : ['not-found'];
    }
  }

  #apply(one: NameCall): void {
    switch (one.call) {
      case 'container': this.#containers.add(one.name); return;
      case 'clone': for (const target of one.targets) this.#disks.set(target, this.#disks.get(one.source)!); return;
      case 'remove': {
        for (const path of this.#below(one.path)) this.#disks.delete(path);
        this.#disks.delete(one.path);
        this.#containers.delete(one.path);
        return;
      }
      case 'resize': this.#disks.set(one.path, one.sizeBytes); break;
      case 'fill': break;
    }
  }

  /** The kind of the refusal, or null. */
  async #do(one: NameCall): Promise<ErrorKind | null> {
    try {
      switch (one.call) {
        case 'container': await this.#control.createContainer(one.name, {}); break;
        case 'clone': await this.#control.clone({ source: one.source, targets: [...one.targets], fill: one.fill, copyOnRead: one.copyOnRead }); break;
        case 'remove': await this.#control.remove(one.path, one); break;
        case 'resize': await this.#control.resize(one.path, one.sizeBytes); break;
        case 'fill': await this.#fill(one.path, one.what, one.rate); break;
      }
      return null;
    } catch (thrown) {
      if (thrown instanceof OffshootError && thrown.kind !== 'internal') return thrown.kind;
      throw thrown;
    }
  }

  async #fill(path: string, what: 'start' | 'pause' | 'resume' | 'status', rateBytesPerSecond: number | null): Promise<void> {
    switch (what) {
      case 'start': await this.#control.fillStart(path, { rateBytesPerSecond }); return;
      case 'pause': await this.#control.fillPause(path); return;
      case 'resume': await this.#control.fillResume(path, { rateBytesPerSecond }); return;
      case 'status': await this.#control.fillStatus(path);
    }
  }

  #below(name: string): string[] {
    return [...this.#disks.keys()].filter((path) => path.startsWith(`${name}/`));
  }
}

/** A disk that clones read from stays without `keepData`; one that a fill is just leaving is busy for a moment. */
const MAY_BE_REFUSED: Readonly<Record<NameCall['call'], readonly ErrorKind[]>> = {
  container: [], clone: ['busy'], remove: ['in-use', 'busy'], resize: ['busy'], fill: FILL_REFUSALS,
};

function containerOf(path: string): string {
  return path.split('/', 1)[0] ?? '';
}

function expectSame(what: string, actual: readonly string[], expected: readonly string[]): void {
  const [a, b] = [actual.toSorted().join('\n'), expected.toSorted().join('\n')];
  if (a !== b) throw new Error(`${what}: listed is\n${a}\ninstead of\n${b}`);
}

export async function playCalls(control: ControlClient, calls: readonly NameCall[]): Promise<void> {
  const names = new Names(control, (await control.show(IMAGE)).sizeBytes);
  for (const one of calls) await names.play(one);
}
