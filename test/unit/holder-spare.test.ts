/** The warm spare, the upgrade and the watchdog, with servers and clock made of data (`holder-world.ts`). */
import { describe, expect, it } from 'vitest';

import { HOLDER_PROTOCOL, type BuildIdentity } from '../../daemon/holder/ipc.js';
import { misfitOf } from '../../daemon/holder/upgrade.js';
import { KILLED, World, type FakeServer } from './holder-world.js';

const OLD: BuildIdentity = { version: '1.0.0', holderProtocol: HOLDER_PROTOCOL, storeSchema: 1, runtimeFormat: 1 };
const NEW: BuildIdentity = { ...OLD, version: '2.0.0' };

function serving(options: ConstructorParameters<typeof World>[0] = {}): World {
  const world = new World(options);
  world.holder.start();
  world.server.say({ type: 'hello', build: OLD });
  world.server.say({ type: 'ready' });
  return world;
}

describe('the spare', () => {
  it('is started when the server has served for a moment, and goes when that one is gone', () => {
    const world = serving({ keepsSpare: true });
    world.pass(999);
    expect(world.servers).toHaveLength(1);
    world.pass(1);
    const spare = world.server;
    expect(spare).toMatchObject({ standby: true, received: [] });
    expect(world.state?.sparePid).toBeNull();
    spare.say({ type: 'hello', build: OLD });
    expect(world.state).toMatchObject({ sparePid: spare.pid, serverPid: 1_000 });

    world.servers[0]?.end(KILLED);
    expect(spare.received).toEqual([{ type: 'go', restarts: 1 }]);
    expect(world.servers).toHaveLength(2);
    expect(world.state).toMatchObject({ serverPid: spare.pid, sparePid: null, restarts: 1, state: 'restarting' });
    world.pass(50);
    spare.say({ type: 'ready' });
    expect(world.state).toMatchObject({ state: 'running', lastStallMs: 50 });
    world.pass(1_000);
    expect(world.servers).toHaveLength(3);
  });

  it('goes although it is not warm yet, and a kill before there is one starts a server as ever', () => {
    const world = serving({ keepsSpare: true });
    world.pass(1_000);
    world.servers[0]?.end(KILLED);
    expect(world.server.received).toEqual([{ type: 'go', restarts: 1 }]);
    world.server.say({ type: 'ready' });
    world.server.end(KILLED);
    expect(world.server).toMatchObject({ standby: false, restarts: 2, received: [] });
  });

  it('that ends by itself ends nothing else, and another is tried later', () => {
    const world = serving({ keepsSpare: true });
    world.pass(1_000);
    world.server.end({ code: 1, signal: null });
    expect(world.state).toMatchObject({ state: 'running', serverPid: 1_000, sparePid: null, restarts: 0 });
    world.pass(29_999);
    expect(world.servers).toHaveLength(2);
    world.pass(1);
    expect(world.server.standby).toBe(true);
  });

  it('is gone before the holder ends', () => {
    const world = serving({ keepsSpare: true });
    world.pass(1_000);
    const spare = world.server;
    world.servers[0]?.say({ type: 'unmount', requestId: 1, force: false });
    world.servers[0]?.end({ code: 0, signal: null });
    expect(spare.killed).toBe(true);
    expect(world.end).toBeUndefined();
    spare.end(KILLED);
    expect(world.end).toEqual({ kind: 'finished' });
  });

  it('is not kept when nobody wants it', () => {
    const world = serving();
    world.pass(600_000);
    expect(world.servers).toHaveLength(1);
  });
});

describe('an upgrade', () => {
  /** Gives the candidate, loaded or not. */
  async function begin(world: World, build: BuildIdentity | null = NEW): Promise<{ readonly old: FakeServer; readonly candidate: FakeServer }> {
    const [old] = world.servers;
    if (old === undefined) throw new Error('no server');
    old.say({ type: 'upgrade', requestId: 7, entry: '/new/main.js' });
    const candidate = world.server;
    if (build !== null) candidate.say({ type: 'hello', build });
    await settled();
    return { old, candidate };
  }
  const settled = (): Promise<void> => new Promise((resolve) => { setImmediate(resolve); });

  it('loads the new build, lets the old one hand over, and the new one serves', async () => {
    const world = serving();
    const { old, candidate } = await begin(world, null);
    expect(candidate).toMatchObject({ standby: true, entry: '/new/main.js' });
    expect(old.received).toEqual([]);
    candidate.say({ type: 'hello', build: NEW });
    await settled();
    expect(old.received).toEqual([{ type: 'upgrade-accepted', requestId: 7, upgradeId: 1 }, { type: 'hand-over' }]);
    expect(candidate.received).toEqual([]);
    old.end({ code: 75, signal: null });
    expect(candidate.received).toEqual([{ type: 'go', restarts: 1 }]);
    world.pass(120);
    candidate.say({ type: 'ready' });
    expect(world.state).toMatchObject({
      state: 'running', serverPid: candidate.pid, upgrade: { id: 1, state: 'done', fromVersion: '1.0.0', toVersion: '2.0.0', fromServerPid: old.pid, serverPid: candidate.pid, stallMs: 120, error: null },
    });
    candidate.end(KILLED);
    expect(world.server).toMatchObject({ entry: '/new/main.js', restarts: 2 });
    expect(world.end).toBeUndefined();
  });

  it('goes on when the old server dies instead of handing over', async () => {
    const world = serving();
    const { old, candidate } = await begin(world);
    old.end(KILLED);
    candidate.say({ type: 'ready' });
    expect(world.state?.upgrade).toMatchObject({ state: 'done' });
  });

  it('kills an old server that does not hand over', async () => {
    const world = serving();
    const { old } = await begin(world);
    world.pass(59_999);
    expect(old.killed).toBe(false);
    world.pass(1);
    expect(old.killed).toBe(true);
  });

  it.each<[string, (candidate: FakeServer, world: World) => void, string]>([
    ['says why it cannot start', (candidate) => {
      candidate.say({ type: 'failed', error: { kind: 'store-version', message: 'too old for it' } });
      candidate.end({ code: 1, signal: null });
    }, 'too old for it'],
    ['dies', (candidate) => { candidate.end(KILLED); }, 'was killed by SIGKILL before it was ready'],
    ['takes too long', (candidate, world) => {
      world.pass(60_000);
      expect(candidate.killed).toBe(true);
      candidate.end(KILLED);
    }, 'was killed by SIGKILL before it was ready'],
  ])('goes back to the old build when the new one %s', async (_, fail, reason) => {
    const world = serving();
    const { old, candidate } = await begin(world);
    old.end({ code: 75, signal: null });
    fail(candidate, world);
    expect(world.server).toMatchObject({ entry: null, restarts: 2 });
    expect(world.state?.upgrade).toMatchObject({ state: 'rolled-back', serverPid: null });
    world.server.say({ type: 'ready' });
    expect(world.state).toMatchObject({
      state: 'running', upgrade: { state: 'rolled-back', serverPid: world.server.pid, error: { message: expect.stringContaining(reason) as string } },
    });
    // Neither end counts as a crash.
    for (let crash = 0; crash < 4; crash += 1) {
      world.server.end(KILLED);
      world.server.say({ type: 'ready' });
    }
    expect(world.state?.state).toBe('running');
  });

  it('goes back to the old build by its spare, and replaces the spare after an upgrade that went well', async () => {
    const world = serving({ keepsSpare: true });
    world.pass(1_000);
    const spare = world.server;
    spare.say({ type: 'hello', build: OLD });
    const failing = await begin(world);
    failing.old.end({ code: 75, signal: null });
    failing.candidate.end(KILLED);
    expect(spare.received).toEqual([{ type: 'go', restarts: 2 }]);

    const other = serving({ keepsSpare: true });
    other.pass(1_000);
    const outdated = other.server;
    outdated.say({ type: 'hello', build: OLD });
    const { old, candidate } = await begin(other);
    old.end({ code: 75, signal: null });
    candidate.say({ type: 'ready' });
    expect(outdated.killed).toBe(true);
    other.pass(1_000);
    expect(other.server).toMatchObject({ standby: true, entry: '/new/main.js' });
  });

  it.each<[string, (world: World) => Promise<void> | void, string]>([
    ['does not start', (world) => { world.server.end({ code: 1, signal: null }); }, 'the new build does not start: its server ended with code 1'],
    ['is never loaded', (world) => { world.pass(30_000); }, 'was not loaded within'],
    ['speaks another protocol', (world) => { world.server.say({ type: 'hello', build: { ...NEW, holderProtocol: HOLDER_PROTOCOL + 1 } }); }, 'the holder speaks protocol'],
    ['has another store schema', (world) => { world.server.say({ type: 'hello', build: { ...NEW, storeSchema: 2 } }); }, 'the store has schema 1, the new build makes it 2'],
  ])('is refused, and nothing is disturbed, when the new build %s', async (_, fail, reason) => {
    const world = serving();
    const { old, candidate } = await begin(world, null);
    await fail(world);
    await settled();
    expect(old.received.filter(({ type }) => type !== 'ping')).toEqual([{ type: 'upgrade-refused', requestId: 7, error: expect.objectContaining({ message: expect.stringContaining(reason) as string }) as unknown }]);
    expect(candidate.killed || candidate.hasEnded).toBe(true);
    expect(world.state).toMatchObject({ state: 'running', serverPid: old.pid, upgrade: null });
  });

  it('is refused for a program that others can change, and while another is under way', async () => {
    const world = serving();
    world.server.say({ type: 'upgrade', requestId: 1, entry: '/untrusted' });
    await settled();
    expect(world.servers).toHaveLength(1);
    expect(world.server.received).toMatchObject([{ type: 'upgrade-refused', error: { kind: 'not-permitted' } }]);
    const { old } = await begin(world, null);
    old.say({ type: 'upgrade', requestId: 8, entry: '/third' });
    await settled();
    expect(old.received.at(-1)).toMatchObject({ type: 'upgrade-refused', requestId: 8, error: { kind: 'busy' } });
  });

  it('names every difference', () => {
    expect(misfitOf(OLD, NEW)).toBeNull();
    expect(misfitOf(OLD, { ...NEW, storeSchema: 2, runtimeFormat: 3 })).toMatch(/2\.0\.0 cannot follow 1\.0\.0.*schema 1.*2; .*format 1.*3\. Nothing was changed/su);
  });
});

describe('the watchdog', () => {
  it('says when the server is silent, and when it answers again; then the status says so too', () => {
    const world = serving();
    world.pass(5_000);
    expect(world.server.received).toEqual([{ type: 'ping' }]);
    world.pass(10_000);
    expect(world.logged.join('\n')).not.toContain('does not answer');
    world.pass(5_000);
    expect(world.logged.at(-1)).toContain('does not answer');
    world.pass(4_000);
    world.server.say({ type: 'pong' });
    expect(world.state?.lastHang).toEqual({ ms: 19_000, serverPid: 1_000, at: 'time 24000' });
    world.pass(600);
    expect(world.server.killed).toBe(false);
  });

  it('asks on and on a server that answers, and says nothing', () => {
    const world = serving();
    for (let round = 0; round < 100; round += 1) {
      world.pass(5_000);
      world.server.say({ type: 'pong' });
    }
    expect(world.server.received.length).toBeGreaterThan(40);
    expect(world.state?.lastHang).toBeNull();
    expect(world.logged.join('\n')).not.toContain('does not answer');
  });

  it.each([['S', true], ['R', true], ['T', false], ['t', false], ['D', false]])('a main thread in state %s for minutes: killed %s', (processState, killed) => {
    const world = serving();
    world.processState = processState;
    world.pass(600_000);
    expect(world.server.killed).toBe(killed);
    if (!killed) return;
    world.server.end(KILLED);
    expect(world.servers).toHaveLength(2);
  });

  it('has no patience left over from a server that is gone', () => {
    const world = serving();
    world.pass(110_000);
    world.server.end(KILLED);
    world.server.say({ type: 'ready' });
    world.pass(100_000);
    expect(world.server.killed).toBe(false);
  });
});

describe('a mount that was taken over', () => {
  it('begins with the next number, and a first server that fails costs nobody the mount', () => {
    const world = new World({ takenOverAfter: 41 });
    world.holder.start();
    expect(world.server).toMatchObject({ restarts: 42, standby: false });
    world.server.end(KILLED);
    expect(world.end).toBeUndefined();
    expect(world.server.restarts).toBe(43);
    expect(world.readyPids).toEqual([]);
    world.server.say({ type: 'ready' });
    expect(world.readyPids).toEqual([world.server.pid]);
  });
});
