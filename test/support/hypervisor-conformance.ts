/**
 * What every hypervisor adapter must do, for any of them: called by a test file with a real hypervisor behind it.
 *
 * What an adapter cannot do follows from its abilities, and what a test bed cannot bring about from the hooks that it leaves out; each such
 * test is not made at all, rather than passed. The machines boot nothing but the one guest, so that all but its tests take a moment.
 */
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { Hypervisor, HypervisorAbilities, HypervisorId, MachineState, MachineToRegister } from '../../daemon/hypervisor/hypervisor.js';
import { waitUntil } from './processes.js';
import { createCleanup, type Cleanup } from './temp.js';

export interface HypervisorTestBed {
  readonly hypervisor: Hypervisor;
  /** A new machine with a small empty disk, which starts and boots nothing. Its agent's port is there, and nobody at it. */
  makeMachine(identity: { readonly name: string; readonly uuid: string }): MachineToRegister;
  /** The adapter as it is when its hypervisor is not there: not installed, or not running. */
  withoutHypervisor(): Hypervisor;
  /** As when the machine's process dies. */
  crash?(externalId: string): Promise<void>;
  /** As an administrator's own tool would. */
  pause?(externalId: string): Promise<void>;
  /** As whom the machine runs. */
  userOf?(externalId: string): Promise<number>;
  /** A machine with a system that has an agent and listens to the power button. */
  makeGuest?(identity: { readonly name: string; readonly uuid: string }): Promise<MachineToRegister>;
  /** True when all in the guest is up, agent and power button. */
  isGuestUp?(externalId: string): Promise<boolean>;
  /** What the agent says of its file systems. */
  freezeState?(externalId: string): Promise<unknown>;
}

export interface HypervisorConformance {
  readonly id: HypervisorId;
  readonly abilities: HypervisorAbilities;
  /** Hooks that the bed has; what it lacks is not tested. */
  readonly hooks: readonly ('crash' | 'pause' | 'userOf' | 'makeGuest')[];
  readonly setUp: (cleanup: Cleanup) => Promise<HypervisorTestBed>;
}

const STATE_TIMEOUT_MS = 60_000;
const GUEST_TIMEOUT_MS = 180_000;
const SHUTDOWN_TIMEOUT_MS = 120_000;
/** Long for a test, short for a machine that shuts down. */
const UNHEARD_TIMEOUT_MS = 1_500;
const ABORT_AFTER_MS = 400;
const FOREVER_MS = 10 * 60_000;

export function testHypervisor({ id, abilities, hooks, setUp }: HypervisorConformance): void {
  describe(`the ${id} adapter`, () => {
    const cleanup = createCleanup();
    let bed: HypervisorTestBed;
    let hypervisor: Hypervisor;
    /** Nothing is to be waited for longer than a test may take. */
    const options = { signal: new AbortController().signal };
    let machines = 0;
    let idle: Promise<{ readonly machine: MachineToRegister; readonly externalId: string }> | null = null;

    beforeAll(async () => {
      bed = await setUp(cleanup);
      ({ hypervisor } = bed);
    });
    afterAll(async () => {
      try {
        if (idle !== null) await end((await idle).externalId);
      } finally {
        await cleanup.run();
      }
    });

    const identity = (): { name: string; uuid: string } => {
      machines += 1;
      return { name: `conformance ${machines} é`.replaceAll(' ', '-'), uuid: randomUUID() };
    };
    const registered = async (): Promise<string> => (await hypervisor.register(bed.makeMachine(identity()), options)).externalId;
    const end = async (externalId: string): Promise<void> => {
      await hypervisor.stop(externalId, { ...options, force: true, timeoutMs: STATE_TIMEOUT_MS });
      await hypervisor.unregister(externalId, options);
      expect(await hypervisor.status(externalId, options)).toBe('missing');
    };
    /** One that runs, for all tests that only ask it something. */
    const idleMachine = (): NonNullable<typeof idle> => {
      idle ??= (async () => {
        const machine = bed.makeMachine(identity());
        const { externalId } = await hypervisor.register(machine, options);
        await hypervisor.start(externalId, options);
        return { machine, externalId };
      })();
      return idle;
    };
    const becomes = async (externalId: string, state: MachineState): Promise<void> => {
      await waitUntil(async () => await hypervisor.status(externalId, options) === state, STATE_TIMEOUT_MS);
      expect(await hypervisor.status(externalId, options)).toBe(state);
    };

    it('says what it is, and that it can be used', async () => {
      expect(hypervisor.id).toBe(id);
      expect(hypervisor.abilities).toEqual(abilities);
      expect(await hypervisor.probe(options)).toEqual({ usable: true, version: expect.stringMatching(/^\d+\.\d+/u) as string });
    });

    it('registers a machine without starting it, forgets it, and can be told both twice', async () => {
      const machine = bed.makeMachine(identity());
      const { externalId } = await hypervisor.register(machine, options);
      expect(externalId).not.toBe('');
      expect(await hypervisor.status(externalId, options)).toBe('shut-off');
      expect(await hypervisor.register(machine, options)).toEqual({ externalId });
      await hypervisor.unregister(externalId, options);
      expect(await hypervisor.status(externalId, options)).toBe('missing');
      await hypervisor.unregister(externalId, options);
      expect(await hypervisor.register(machine, options)).toEqual({ externalId: expect.any(String) as string });
      await hypervisor.unregister(externalId, options);
    });

    it('refuses a name and a UUID that another machine has, and leaves that one as it is', async () => {
      const first = bed.makeMachine(identity());
      const { externalId } = await hypervisor.register(first, options);
      await rejects(hypervisor.register(bed.makeMachine({ name: first.name, uuid: randomUUID() }), options), ['already-exists']);
      await rejects(hypervisor.register(bed.makeMachine({ name: `${first.name}-other`, uuid: first.uuid }), options), ['already-exists']);
      // Both are the same, but its files lie elsewhere: another machine.
      await rejects(hypervisor.register(bed.makeMachine({ name: first.name, uuid: first.uuid }), options), ['already-exists']);
      expect(await hypervisor.status(externalId, options)).toBe('shut-off');
      await hypervisor.unregister(externalId, options);
      // Nothing of the refused ones is left: both names are free.
      for (const name of [first.name, `${first.name}-other`]) {
        await hypervisor.unregister((await hypervisor.register(bed.makeMachine({ name, uuid: randomUUID() }), options)).externalId, options);
      }
    });

    it('starts a machine, which runs until its power is taken, and again', async () => {
      const externalId = await registered();
      for (let round = 0; round < 2; round += 1) {
        await hypervisor.start(externalId, options);
        expect(await hypervisor.status(externalId, options)).toBe('running');
        // Again: it runs already, which is what was wanted.
        await hypervisor.start(externalId, options);
        await rejects(hypervisor.unregister(externalId, options), ['in-use']);
        expect(await hypervisor.status(externalId, options)).toBe('running');
        await hypervisor.stop(externalId, { ...options, force: true, timeoutMs: STATE_TIMEOUT_MS });
        expect(await hypervisor.status(externalId, options)).toBe('shut-off');
        await hypervisor.stop(externalId, { ...options, force: true, timeoutMs: STATE_TIMEOUT_MS });
        await hypervisor.stop(externalId, { ...options, force: false, timeoutMs: STATE_TIMEOUT_MS });
      }
      await end(externalId);
    });

    it('knows nothing of a machine that is not registered', async () => {
      const unknown = randomUUID();
      expect(await hypervisor.status(unknown, options)).toBe('missing');
      await rejects(hypervisor.start(unknown, options), ['not-found']);
      await rejects(hypervisor.stop(unknown, { ...options, force: true, timeoutMs: STATE_TIMEOUT_MS }), ['not-found']);
      await rejects(hypervisor.stop(unknown, { ...options, force: false, timeoutMs: STATE_TIMEOUT_MS }), ['not-found']);
    });

    it.runIf(abilities.shutdown)('says that a machine does not listen when it is asked to shut down, and leaves it running', async () => {
      const { externalId } = await idleMachine();
      await rejects(hypervisor.stop(externalId, { ...options, force: false, timeoutMs: UNHEARD_TIMEOUT_MS }), ['busy']);
      expect(await hypervisor.status(externalId, options)).toBe('running');
    });

    it('gives a call up when it is told to', async () => {
      const externalId = await registered();
      const aborted = { signal: AbortSignal.abort() };
      await rejects(hypervisor.probe(aborted), ['cancelled']);
      await rejects(hypervisor.status(externalId, aborted), ['cancelled']);
      await rejects(hypervisor.start(externalId, aborted), ['cancelled']);
      expect(await hypervisor.status(externalId, options)).toBe('shut-off');
      await hypervisor.unregister(externalId, options);
    });

    it.runIf(abilities.shutdown)('gives up waiting for a machine to shut down when it is told to', async () => {
      const { externalId } = await idleMachine();
      const controller = new AbortController();
      const stopping = hypervisor.stop(externalId, { signal: controller.signal, force: false, timeoutMs: FOREVER_MS });
      setTimeout(() => { controller.abort(); }, ABORT_AFTER_MS);
      await rejects(stopping, ['cancelled']);
      expect(await hypervisor.status(externalId, options)).toBe('running');
    });

    it.runIf(abilities.guestAgent)('hears no agent where there is none, and freezes nothing then', async () => {
      const off = await registered();
      expect(await hypervisor.pingAgent(off, options)).toBe(false);
      await rejects(hypervisor.freeze(off, options), [abilities.quiesce ? 'conflict' : 'not-supported']);
      await hypervisor.unregister(off, options);
      expect(await hypervisor.pingAgent((await idleMachine()).externalId, options)).toBe(false);
    });

    it('says what is missing when its hypervisor is not there, and fails as if it were away, not wrong', async () => {
      const externalId = await registered();
      const gone = bed.withoutHypervisor();
      const probed = await gone.probe(options);
      expect(probed).toEqual({ usable: false, reason: expect.stringMatching(/.{10}/u) as string });
      await rejects(gone.start(externalId, options), ['tool-missing', 'source-unreachable']);
      await hypervisor.unregister(externalId, options);
    });

    it.runIf(hooks.includes('crash'))('tells a machine that has died from one that was stopped, and starts it again', async () => {
      const externalId = await registered();
      await hypervisor.start(externalId, options);
      await bed.crash!(externalId);
      await becomes(externalId, 'crashed');
      await hypervisor.start(externalId, options);
      expect(await hypervisor.status(externalId, options)).toBe('running');
      await end(externalId);
    });

    it.runIf(hooks.includes('pause'))('sees that a machine is paused, does not take that for off, and stops it', async () => {
      const externalId = await registered();
      await hypervisor.start(externalId, options);
      await bed.pause!(externalId);
      await becomes(externalId, 'paused');
      await rejects(hypervisor.start(externalId, options), ['in-use']);
      await rejects(hypervisor.unregister(externalId, options), ['in-use']);
      await end(externalId);
    });

    it.runIf(hooks.includes('userOf'))('runs a machine as the user whom its disks belong to', async () => {
      const { machine, externalId } = await idleMachine();
      expect(machine.owner.uid).not.toBe(0);
      expect(await bed.userOf!(externalId)).toBe(machine.owner.uid);
    });

    it.runIf(hooks.includes('makeGuest'))('boots a system whose agent answers, makes its file systems quiet and lets them go on, and shuts it down by asking', async () => {
      const { externalId } = await hypervisor.register(await bed.makeGuest!(identity()), options);
      await hypervisor.start(externalId, options);
      expect(await waitUntil(() => bed.isGuestUp!(externalId), GUEST_TIMEOUT_MS)).toBe(true);
      expect(await waitUntil(() => hypervisor.pingAgent(externalId, options), GUEST_TIMEOUT_MS)).toBe(true);
      if (abilities.quiesce) {
        expect(await bed.freezeState!(externalId)).toBe('thawed');
        await hypervisor.freeze(externalId, options);
        expect(await bed.freezeState!(externalId)).toBe('frozen');
        expect(await hypervisor.status(externalId, options)).toBe('running');
        await hypervisor.thaw(externalId, options);
        expect(await bed.freezeState!(externalId)).toBe('thawed');
      }
      await hypervisor.stop(externalId, { ...options, force: false, timeoutMs: SHUTDOWN_TIMEOUT_MS });
      expect(await hypervisor.status(externalId, options)).toBe('shut-off');
      await hypervisor.unregister(externalId, options);
      expect(await hypervisor.status(externalId, options)).toBe('missing');
    });
  });
}

/** Fails in an operating way, of one of these kinds, with a sentence. */
async function rejects(asked: Promise<unknown>, kinds: readonly ErrorKind[]): Promise<void> {
  const error: unknown = await asked.then(() => null, (thrown: unknown) => thrown);
  expect(error).toBeInstanceOf(OffshootError);
  expect(kinds).toContain((error as OffshootError).kind);
  expect((error as OffshootError).message.length).toBeGreaterThan(10);
}
