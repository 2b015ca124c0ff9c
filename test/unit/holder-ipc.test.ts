/** What crosses the process boundary is checked; what is not understood is nothing. */
import { describe, expect, it } from 'vitest';

import { readHolderMessage, readServerMessage, readStartReport } from '../../daemon/holder/ipc.js';
import { parseHolderOptions, parseServerOptions } from '../../daemon/holder/options.js';

describe('messages', () => {
  it('read what was sent', () => {
    expect(readServerMessage({ type: 'ready' })).toEqual({ type: 'ready' });
    expect(readServerMessage({ type: 'unmount', requestId: 3 })).toEqual({ type: 'unmount', requestId: 3, force: false });
    expect(readServerMessage({ type: 'unmount', requestId: 3, force: true })).toEqual({ type: 'unmount', requestId: 3, force: true });
    expect(readServerMessage({ type: 'failed', error: { kind: 'no-space', message: 'full' } })).toEqual({
      type: 'failed',
      error: { kind: 'no-space', message: 'full' },
    });
    expect(readHolderMessage({ type: 'unmount-refused', requestId: 3, message: 'why' })).toEqual({
      type: 'unmount-refused',
      requestId: 3,
      message: 'why',
    });
  });

  it.each([null, 1, 'ready', [], {}, { type: 'toString' }, { type: 'unmount' }, { type: 'failed' }, { type: 'failed', error: { kind: 1 } }])(
    'make nothing of %j',
    (value) => {
      expect(readServerMessage(value)).toBeUndefined();
      expect(readHolderMessage(value)).toBeUndefined();
    },
  );

  it('know no kind of error that the tables do not know', () => {
    expect(readServerMessage({ type: 'failed', error: { kind: 'constructor', message: 'm' } })).toEqual({
      type: 'failed',
      error: { kind: 'internal', message: 'm' },
    });
    expect(readStartReport({ ready: false, error: { kind: 'nonsense', message: 'm' } })).toEqual({
      ready: false,
      error: { kind: 'internal', message: 'm' },
    });
  });
});

describe('options', () => {
  const common = { storeDir: '/s', mountDir: '/m', socketPath: '/k', workers: 2, transport: 'kernel', logLevel: 'info', sourceTimeoutSeconds: 30 };
  const holder = { ...common, foreground: false, reportFd: 3, serverEntry: null, spare: true, stored: [{ fd: 4, connection: 57 }] };
  const server = { ...common, runtimeDir: '/r', restarts: 0, holderPid: 1, holderVersion: '0.1.0', standby: false, connectionIsStored: false };

  it('read what was written', () => {
    expect(parseHolderOptions(JSON.stringify(holder))).toEqual(holder);
    expect(parseServerOptions(JSON.stringify(server))).toEqual(server);
  });

  it.each([
    ['storeDir', 'relative'],
    ['mountDir', ''],
    ['socketPath', '/a\0b'],
    ['workers', 0],
    ['workers', 65],
    ['workers', 1.5],
    ['transport', 'smoke'],
    ['logLevel', 'loud'],
    ['foreground', 'yes'],
    ['reportFd', 2],
    ['stored', 'nothing'],
  ])('refuse %s = %j, naming it', (name, value) => {
    expect(() => parseHolderOptions(JSON.stringify({ ...holder, [name]: value }))).toThrow(
      expect.objectContaining({ kind: 'invalid-argument', message: expect.stringContaining(name) as string }),
    );
  });

  it.each([undefined, '', '{', '[]', 'null'])('refuse %j', (json) => {
    expect(() => parseHolderOptions(json)).toThrow(expect.objectContaining({ kind: 'invalid-argument' }));
  });
});
