/** The holder's conduct, with servers, mount and clock made of data: every path of the diagram in holder.ts. */
import { describe, expect, it } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { KILLED, World } from './holder-world.js';

describe('the start', () => {
  it('reports ready once, and the state', () => {
    const world = new World();
    world.startReady();
    world.server.say({ type: 'ready' });
    expect(world.readyPids).toEqual([1_000]);
    expect(world.state).toMatchObject({ serverPid: 1_000, restarts: 0, state: 'running', lastExit: null, lastStallMs: null });
  });

  it('fails with the kind and the message that the server reported', () => {
    const world = new World();
    world.holder.start();
    world.server.say({ type: 'failed', error: { kind: 'store-version', message: 'too new' } });
    world.server.end({ code: 1, signal: null });
    expect(world.end).toEqual({ kind: 'not-started', error: new OffshootError('store-version', 'too new') });
    world.pass(600_000);
    expect(world.servers).toHaveLength(1);
  });

  it('kills a server that reported a failure and does not end', () => {
    const world = new World();
    world.holder.start();
    world.server.say({ type: 'failed', error: { kind: 'store-version', message: 'too new' } });
    world.pass(4_999);
    expect(world.server.killed).toBe(false);
    world.pass(1);
    expect(world.server.killed).toBe(true);
  });

  it.each([
    [{ code: 3, signal: null }, 'ended with code 3'],
    [{ code: 0, signal: null }, 'ended with code 0'],
    [KILLED, 'killed by SIGKILL'],
    [{ code: null, signal: null, error: 'spawn EAGAIN' }, 'spawn EAGAIN'],
  ])('fails when the server ends without a word: %o', (exit, words) => {
    const world = new World();
    world.holder.start();
    world.server.end(exit);
    expect(world.end).toMatchObject({ kind: 'not-started', error: { kind: 'internal', message: expect.stringContaining(words) as string } });
  });

  it('is given up by a stop, which kills the server that has served nobody', () => {
    const world = new World();
    world.holder.start();
    world.holder.stop();
    expect(world.server.killed).toBe(true);
    world.server.end(KILLED);
    expect(world.end).toMatchObject({ kind: 'not-started', error: { kind: 'cancelled' } });
  });

  it('cannot be given up any more once it is over', () => {
    const world = new World();
    world.startReady();
    world.holder.giveUp(new OffshootError('cancelled', 'too late'));
    expect(world.server.killed).toBe(false);
  });

  it('says from time to time that the server takes long, and does not kill it', () => {
    const world = new World();
    world.holder.start();
    world.pass(95_000);
    expect(world.logged.filter((line) => line.includes('not ready yet'))).toHaveLength(3);
    expect(world.server.killed).toBe(false);
  });
});

describe('a server that ends', () => {
  it('is followed by the next at once, and the stall is measured until guests are served', () => {
    const world = new World();
    world.startReady();
    world.pass(70_000);
    world.server.end(KILLED);
    expect(world.servers).toHaveLength(2);
    expect(world.server.restarts).toBe(1);
    expect(world.state).toMatchObject({ state: 'restarting', serverPid: 1_001, restarts: 1, lastExit: { code: null, signal: 'SIGKILL', at: 'time 70000' } });
    world.pass(40);
    world.server.say({ type: 'serving' });
    world.pass(300);
    world.server.say({ type: 'ready' });
    expect(world.state).toMatchObject({ state: 'running', serverPid: 1_001, restarts: 1, lastStallMs: 40 });
    expect(world.readyPids).toEqual([1_000]);
  });

  it('is followed after a back-off when the one before was never ready', () => {
    const world = new World();
    world.startReady();
    world.server.end(KILLED);
    world.server.end(KILLED);
    expect(world.state?.state).toBe('restarting');
    world.pass(99);
    expect(world.servers).toHaveLength(2);
    world.pass(1);
    expect(world.servers).toHaveLength(3);
  });

  it('is one stall for guests, however many servers it took', () => {
    const world = new World();
    world.startReady();
    world.server.end(KILLED);
    world.pass(100);
    world.server.say({ type: 'failed', error: { kind: 'no-space', message: 'full' } });
    world.server.end({ code: 1, signal: null });
    world.pass(200);
    world.server.say({ type: 'ready' });
    expect(world.state).toMatchObject({ restarts: 2, lastStallMs: 300 });
    expect(world.end).toBeUndefined();
  });

  it('is restarted after exit code 0 while the mount is there', () => {
    const world = new World();
    world.startReady();
    world.server.end({ code: 0, signal: null });
    world.pass(100);
    expect(world.servers).toHaveLength(2);
  });

  it('is restarted when the next could not even be started', () => {
    const world = new World();
    world.startReady();
    world.server.end(KILLED);
    world.pass(100);
    world.server.end({ code: null, signal: null, error: 'spawn ENOMEM' });
    world.pass(200);
    expect(world.servers).toHaveLength(3);
  });

  it('is not mistaken for the newest when it speaks late', () => {
    const world = new World();
    world.startReady();
    const first = world.server;
    first.end(KILLED);
    world.pass(100);
    first.say({ type: 'ready' });
    first.end({ code: 0, signal: null });
    expect(world.state?.state).toBe('restarting');
    expect(world.servers).toHaveLength(2);
  });
});

describe('a crash loop', () => {
  it('stays down with everything kept, and goes on when asked', () => {
    const world = new World();
    world.startReady();
    world.crashUntilDown();
    expect(world.state).toMatchObject({ state: 'down', restarts: 4 });
    expect(world.logged.at(-1)).toContain(`kill -USR1 ${process.pid}`);
    world.pass(3_600_000);
    expect(world.servers).toHaveLength(5);
    expect(world.end).toBeUndefined();
    expect(world.unmountRequests).toEqual([]);

    world.holder.retry();
    expect(world.servers).toHaveLength(6);
    expect(world.server.restarts).toBe(5);
    world.server.say({ type: 'ready' });
    expect(world.state).toMatchObject({ state: 'running', restarts: 5 });
  });

  it('ends without a server when told to stop and nobody uses the mount: the journal is kept', () => {
    const world = new World();
    world.startReady();
    world.crashUntilDown();
    world.holder.stop();
    expect(world.end).toEqual({ kind: 'abandoned' });
  });

  it('goes on waiting when told to stop and somebody uses the mount', () => {
    const world = new World();
    world.busyWith = 'a guest';
    world.startReady();
    world.crashUntilDown();
    world.holder.stop();
    expect(world.end).toBeUndefined();
    world.holder.retry();
    world.server.say({ type: 'ready' });
    expect(world.state?.state).toBe('running');
  });

  it('is not entered by asking for another try while all is well', () => {
    const world = new World();
    world.startReady();
    world.holder.retry();
    expect(world.servers).toHaveLength(1);
  });
});

describe('the end', () => {
  it('comes when the server asked for the unmount and ends with 0', () => {
    const world = new World();
    world.startReady();
    world.holder.stop();
    expect(world.server.received).toEqual([{ type: 'shutdown' }]);
    world.server.say({ type: 'unmount', requestId: 7, force: false });
    expect(world.server.received.at(-1)).toEqual({ type: 'unmounted', requestId: 7 });
    expect(world.end).toBeUndefined();
    world.server.end({ code: 0, signal: null });
    expect(world.end).toEqual({ kind: 'finished' });
  });

  it('does not come while the mount is in use', () => {
    const world = new World();
    world.busyWith = 'a guest';
    world.startReady();
    world.server.say({ type: 'unmount', requestId: 1, force: false });
    expect(world.server.received).toEqual([{ type: 'unmount-refused', requestId: 1, message: 'in use by a guest' }]);
    world.server.end({ code: 0, signal: null });
    world.pass(100);
    expect(world.servers).toHaveLength(2);
  });

  it('comes by force although the mount is in use', () => {
    const world = new World();
    world.busyWith = 'a guest';
    world.startReady();
    world.server.say({ type: 'unmount', requestId: 1, force: true });
    expect(world.server.received).toEqual([{ type: 'unmounted', requestId: 1 }]);
  });

  it('waits for a server that can close the store when the one that unmounted was killed', () => {
    const world = new World();
    world.startReady();
    world.server.say({ type: 'unmount', requestId: 1, force: false });
    world.server.end(KILLED);
    world.pass(100);
    expect(world.servers).toHaveLength(2);
    world.server.say({ type: 'unmount', requestId: 1, force: false });
    expect(world.server.received).toEqual([{ type: 'unmounted', requestId: 1 }]);
    expect(world.unmountRequests).toHaveLength(1);
    world.server.end({ code: 0, signal: null });
    expect(world.end).toEqual({ kind: 'finished' });
  });

  it('keeps the journal when no server can close the store after the unmount', () => {
    const world = new World();
    world.startReady();
    world.server.say({ type: 'unmount', requestId: 1, force: false });
    world.crashUntilDown();
    expect(world.end).toEqual({ kind: 'abandoned' });
  });

  it('comes when somebody unmounted by hand', () => {
    const world = new World();
    world.startReady();
    world.isMounted = false;
    world.server.end({ code: 0, signal: null });
    expect(world.end).toEqual({ kind: 'finished' });
  });

  it('is remembered when it was asked for between two servers', () => {
    const world = new World();
    world.startReady();
    world.server.end(KILLED);
    world.holder.stop();
    world.pass(100);
    expect(world.server.received).toEqual([]);
    world.server.say({ type: 'ready' });
    expect(world.server.received).toEqual([{ type: 'shutdown' }]);
  });
});
