/** One daemon at a time: the lock on the store, taken, refused, inherited. */
import { spawn } from 'node:child_process';
import type * as fs from 'node:fs';
import { closeSync, existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync, unlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { lockStore, lockStoreSoon, undoStoreLock, type StoreLock } from '../../daemon/holder/store-lock.js';

/** Called with each path after it was opened: the instant in which somebody else may act. */
const opened = vi.hoisted(() => ({ then: undefined as ((path: string) => void) | undefined }));

vi.mock('node:fs', async (importOriginal) => {
  const real = await importOriginal<typeof fs>();
  return {
    ...real,
    openSync: (...args: Parameters<typeof real.openSync>) => {
      const fd = real.openSync(...args);
      opened.then?.(String(args[0]));
      return fd;
    },
  };
});

let store: string;
let held: StoreLock[];

beforeEach(() => {
  store = mkdtempSync(join(tmpdir(), 'offshoot-lock-'));
  held = [];
});

afterEach(() => {
  for (const lock of held) closeSync(lock.fd);
  rmSync(store, { recursive: true, force: true });
});

function lock(): StoreLock {
  const taken = lockStore(store);
  held.push(taken);
  return taken;
}

function release(taken: StoreLock): void {
  held = held.filter((other) => other !== taken);
  closeSync(taken.fd);
}

describe('the lock of a store', () => {
  it('is had by one, whose pid the refusal names', () => {
    const taken = lock();
    expect(readFileSync(taken.path, 'utf8')).toBe(`${process.pid}\n`);
    expect(() => lockStore(store)).toThrow(
      expect.objectContaining({
        kind: 'store-locked',
        message: expect.stringContaining(`store in use by another daemon (pid ${process.pid})`) as string,
      }),
    );
    release(taken);
    lock();
  });

  it('is refused in words also when the file says nothing', () => {
    const taken = lock();
    writeFileSync(taken.path, '');
    expect(() => lockStore(store)).toThrow(expect.objectContaining({ kind: 'store-locked' }));
  });

  it('replaces a longer pid of before', () => {
    writeFileSync(join(store, 'lock'), '12345678901234567890\n');
    expect(readFileSync(lock().path, 'utf8')).toBe(`${process.pid}\n`);
  });

  it('lives on in a process that inherited it, and the refusal says that the holder has died', async () => {
    const taken = lock();
    const child = spawn('sleep', ['60'], { stdio: ['ignore', 'ignore', 'ignore', 'ignore', taken.fd] });
    try {
      // A pid that no process has: above the largest that the kernel gives.
      writeFileSync(taken.path, '4194305\n');
      release(taken);
      expect(() => lockStore(store)).toThrow(
        expect.objectContaining({ kind: 'store-locked', message: expect.stringContaining('its holder has died') as string }),
      );
    } finally {
      const ended = new Promise((settle) => child.once('exit', settle));
      child.kill('SIGKILL');
      await ended;
    }
    lock();
  });

  it('is waited for while servers of a dead holder end, and refused when one goes on', async () => {
    const taken = lock();
    const child = spawn('sleep', ['60'], { stdio: ['ignore', 'ignore', 'ignore', 'ignore', taken.fd] });
    writeFileSync(taken.path, '4194305\n');
    release(taken);
    try {
      await expect(lockStoreSoon(store, 1, 3)).rejects.toMatchObject({ kind: 'store-locked', context: { holderIsGone: true } });
      const waiting = lockStoreSoon(store, 1, Number.POSITIVE_INFINITY);
      child.kill('SIGKILL');
      closeSync((await waiting).fd);
    } finally {
      child.kill('SIGKILL');
    }
    // A living daemon is not waited for.
    lock();
    await expect(lockStoreSoon(store, 1, Number.POSITIVE_INFINITY)).rejects.toMatchObject({ kind: 'store-locked' });
  });

  it('is not taken on a file that was removed between its opening and its locking', () => {
    let removals = 0;
    opened.then = (path) => {
      if (removals === 3) return;
      removals += 1;
      unlinkSync(path);
    };
    try {
      lock();
    } finally {
      opened.then = undefined;
    }
    expect(removals).toBe(3);
    expect(() => lockStore(store)).toThrow(expect.objectContaining({ kind: 'store-locked' }));
  });

  it('is undone to what was before: the file goes if it was new', () => {
    const first = lockStore(store);
    undoStoreLock(first);
    expect(existsSync(first.path)).toBe(false);
    writeFileSync(first.path, '1\n');
    undoStoreLock(lockStore(store));
    expect(existsSync(first.path)).toBe(true);
    lock();
  });

  it('does not follow a link', () => {
    symlinkSync('/dev/null', join(store, 'lock'));
    expect(() => lockStore(store)).toThrow(expect.objectContaining({ message: expect.stringContaining('lock file') as string }));
  });
});
