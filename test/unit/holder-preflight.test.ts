/** The checks of a start: each refusal names what is wrong, and nothing is changed by looking. */
import { execFileSync } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import {
  checkApart,
  checkKernel,
  checkMountPoint,
  checkSocket,
  checkStore,
  resolveMountPoint,
} from '../../daemon/holder/preflight.js';

let scratch: string;

beforeEach(() => {
  scratch = realpathSync(mkdtempSync(join(tmpdir(), 'offshoot-preflight-')));
});

afterEach(() => {
  rmSync(scratch, { recursive: true, force: true });
});

function refusal(kind: string, words: string): unknown {
  return expect.objectContaining({ kind, message: expect.stringContaining(words) as string });
}

describe('the kernel', () => {
  it.each(['6.9', '6.9.0-rc1', '6.12.1-amd64', '7.0.0', '10.1'])('%s is new enough', (version) => {
    expect(() => {
      checkKernel(version);
    }).not.toThrow();
  });

  it.each(['6.8.12', '5.15.0-100-generic', '4.19', 'unknown'])('%s is too old', (version) => {
    expect(() => {
      checkKernel(version);
    }).toThrow(refusal('not-supported', `kernel ${version} is too old`));
  });
});

describe('the store', () => {
  it('may be missing, if its parent is there', () => {
    expect(checkStore(join(scratch, 'store'))).toEqual({ path: join(scratch, 'store'), exists: false });
    expect(readdirSync(scratch)).toEqual([]);
    expect(() => checkStore(join(scratch, 'a', 'store'))).toThrow(refusal('not-found', 'make it first'));
  });

  it('is known by its real path', () => {
    mkdirSync(join(scratch, 'real'));
    symlinkSync(join(scratch, 'real'), join(scratch, 'link'));
    expect(checkStore(join(scratch, 'link'))).toEqual({ path: join(scratch, 'real'), exists: true });
    expect(checkStore(join(scratch, 'link', 'new'))).toEqual({ path: join(scratch, 'real', 'new'), exists: false });
  });

  it('must be a directory', () => {
    writeFileSync(join(scratch, 'file'), '');
    expect(() => checkStore(join(scratch, 'file'))).toThrow(refusal('not-a-directory', 'is not a directory'));
    expect(() => checkStore(join(scratch, 'file', 'store'))).toThrow(refusal('not-found', 'is not a directory'));
  });

  it('must not be a loop of links, nor have control characters in its path', () => {
    symlinkSync(join(scratch, 'loop'), join(scratch, 'loop'));
    expect(() => checkStore(join(scratch, 'loop'))).toThrow(refusal('invalid-argument', 'loop'));
    expect(() => checkStore(join(scratch, 'a\nb'))).toThrow(refusal('invalid-argument', 'a\\nb'));
    expect(() => checkStore(`${scratch}/a\0b`)).toThrow(refusal('invalid-argument', 'control character'));
  });

  it('must not be open to other users', () => {
    chmodSync(scratch, 0o1777);
    expect(() => checkStore(scratch)).toThrow(refusal('not-permitted', 'mode 1777'));
  });
});

describe('the mount point', () => {
  const nothingMounted = () => false;

  it('is resolved without looking into what is mounted there', () => {
    const looked: string[] = [];
    symlinkSync('two', join(scratch, 'one'));
    symlinkSync(join(scratch, 'three'), join(scratch, 'two'));
    const isMountPoint = (path: string) => {
      looked.push(path);
      return path === join(scratch, 'three');
    };
    // 'three' does not even exist: asked about first, it is not looked at.
    expect(resolveMountPoint(`${scratch}/x/../one/`, isMountPoint)).toBe(join(scratch, 'three'));
    expect(looked).toEqual(['one', 'two', 'three'].map((name) => join(scratch, name)));
  });

  it('must exist', () => {
    expect(() => resolveMountPoint(join(scratch, 'missing'), nothingMounted)).toThrow(refusal('mount-unusable', 'mkdir -p'));
    expect(() => resolveMountPoint(join(scratch, 'missing', 'm'), nothingMounted)).toThrow(refusal('mount-unusable', 'does not exist'));
  });

  it('must not be a loop of links', () => {
    symlinkSync('b', join(scratch, 'a'));
    symlinkSync('a', join(scratch, 'b'));
    expect(() => resolveMountPoint(join(scratch, 'a'), nothingMounted)).toThrow(refusal('mount-unusable', 'loop'));
  });

  it('must be an empty directory', () => {
    expect(() => {
      checkMountPoint(scratch);
    }).not.toThrow();
    writeFileSync(join(scratch, 'file'), '');
    expect(() => {
      checkMountPoint(scratch);
    }).toThrow(refusal('mount-unusable', 'is not empty (1 entry)'));
    expect(() => {
      checkMountPoint(join(scratch, 'file'));
    }).toThrow(refusal('mount-unusable', 'is not a directory'));
  });
});

describe('store, mount and socket', () => {
  it.each([
    ['/a/store', '/a/mount', '/run/offshoot/offshoot.sock'],
    ['/a/store', '/a/store2', '/a/store/socket'],
    ['/a/mounts', '/a/mount', '/a/mount.sock'],
  ])('lie apart: %s %s %s', (store, mount, socket) => {
    expect(() => {
      checkApart(store, mount, socket);
    }).not.toThrow();
  });

  it.each([
    ['/a', '/a', '/s', 'the same directory'],
    ['/a/b/c', '/a', '/s', 'inside the mount point'],
    ['/a', '/a/b/c', '/s', 'inside the store'],
    ['/a', '/b', '/b/c/s', 'control socket'],
    ['/a', '/', '/s', 'inside the mount point'],
  ])('do not: %s %s %s', (store, mount, socket, words) => {
    expect(() => {
      checkApart(store, mount, socket);
    }).toThrow(refusal('invalid-argument', words));
  });
});

describe('the control socket', () => {
  let server: Server | undefined;

  afterEach(async () => {
    await new Promise((settle) => (server === undefined ? settle(undefined) : server.close(settle)));
    server = undefined;
  });

  async function listen(path: string): Promise<void> {
    const listening = createServer();
    server = listening;
    await new Promise<void>((settle) => listening.listen(path, settle));
  }

  it('may be missing', async () => {
    await expect(checkSocket(join(scratch, 's'))).resolves.toBe(join(scratch, 's'));
    await expect(checkSocket(join(scratch, 'missing', 's'))).rejects.toEqual(refusal('not-found', 'is missing'));
  });

  it('may have 107 bytes in its path, and no more', async () => {
    const longest = join(scratch, 'ä'.repeat(2)).padEnd(105, 'x');
    expect(Buffer.byteLength(longest)).toBe(107);
    await expect(checkSocket(longest)).resolves.toBe(longest);
    await expect(checkSocket(`${longest}x`)).rejects.toEqual(refusal('name-too-long', 'has 108 bytes'));
  });

  it('must not be answered by another daemon', async () => {
    await listen(join(scratch, 's'));
    await expect(checkSocket(join(scratch, 's'))).rejects.toEqual(refusal('in-use', 'another daemon answers'));
  });

  it('may be left over from a daemon that was killed', async () => {
    const path = join(scratch, 's');
    const script = `require('net').createServer().listen(process.argv[1], () => process.kill(process.pid, 'SIGKILL'))`;
    expect(() => execFileSync(process.execPath, ['-e', script, path])).toThrow();
    expect(readdirSync(scratch)).toEqual(['s']);
    await expect(checkSocket(path)).resolves.toBe(path);
  });

  it('must not be something else', async () => {
    writeFileSync(join(scratch, 's'), '');
    await expect(checkSocket(join(scratch, 's'))).rejects.toEqual(refusal('already-exists', 'is not a socket'));
  });
});
