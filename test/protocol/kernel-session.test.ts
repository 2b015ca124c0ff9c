/** INIT, what is kept of it, the open handle table, notifications: what a session is made of, without a kernel. */
import { appendFileSync, existsSync, mkdtempSync, readFileSync, readdirSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { Errno, OffshootError } from '../../blockstore/errors.js';
import type { OpenMode } from '../../daemon/filesystem/types.js';
import { HandleTable } from '../../daemon/transport/kernel/handles.js';
import { parseMountTable } from '../../daemon/transport/kernel/mount.js';
import { DEFAULT_SESSION_LIMITS, isTaken, negotiate, type Negotiation, type SessionParameters } from '../../daemon/transport/kernel/negotiation.js';
import { invalidateAttributesMessage, resendMessage } from '../../daemon/transport/kernel/notify.js';
import { loadSession, saveSession } from '../../daemon/transport/kernel/session.js';
import { DispatchBench } from './dispatch-bench.js';
import { body, struct } from './messages.js';

/** INIT as kernel 6.18 sends it. */
const OFFERED = 0x73ff_fffb;
const OFFERED_2 = 0x5fd;

function initBody(fields: { major?: number; minor?: number; flags?: number; flags2?: number } = {}): Buffer {
  return body(struct(fields.major ?? 7, fields.minor ?? 45, 131072, fields.flags ?? OFFERED, fields.flags2 ?? OFFERED_2), Buffer.alloc(44));
}

function agreed(negotiation: Negotiation): { readonly payload: Buffer; readonly parameters: SessionParameters } {
  if (negotiation.outcome !== 'agreed') throw new Error(negotiation.outcome);
  return { payload: Buffer.from(negotiation.payload), parameters: negotiation.parameters };
}

let dir: string;
beforeEach(() => { dir = mkdtempSync(join(tmpdir(), 'offshoot-session-')); });
afterEach(() => { rmSync(dir, { recursive: true, force: true }); });

describe('INIT', () => {
  it('takes exactly what PROTOCOL.md says, from what kernel 6.18 offers', () => {
    const { payload, parameters } = agreed(negotiate(initBody(), DEFAULT_SESSION_LIMITS));
    expect(payload.byteLength).toBe(64);
    expect([payload.readUInt32LE(0), payload.readUInt32LE(4), payload.readUInt32LE(8)]).toEqual([7, 45, 131072]);
    const bits = [0, 5, 12, 13, 14, 15, 18, 21, 22, 28, 30].reduce((word, bit) => word + 2 ** bit, 0);
    expect(payload.readUInt32LE(12)).toBe(bits);
    // PASSTHROUGH 37, NO_EXPORT_SUPPORT 38, HAS_RESEND 39.
    expect(payload.readUInt32LE(32)).toBe(2 ** 5 + 2 ** 6 + 2 ** 7);
    expect([payload.readUInt16LE(16), payload.readUInt16LE(18)]).toEqual([512, 384]);
    expect([payload.readUInt32LE(20), payload.readUInt32LE(24), payload.readUInt16LE(28), payload.readUInt32LE(36)]).toEqual([1048576, 1000, 256, 1]);
    expect(payload.subarray(40)).toEqual(Buffer.alloc(24));
    expect(parameters).toMatchObject({ kernelMinor: 45, minor: 45, passthrough: true, exportSupport: false, flags: bits });
    expect([isTaken(parameters, 16), isTaken(parameters, 1), isTaken(parameters, 3), isTaken(parameters, 36), isTaken(parameters, 41)]).toEqual(new Array(5).fill(false));
    expect([isTaken(parameters, 39), isTaken(parameters, 30)]).toEqual([true, true]);
  });

  it('takes nothing that is not offered, whatever is', () => {
    fc.assert(fc.property(fc.nat(0xffff_ffff), fc.nat(0xffff_ffff), fc.integer({ min: 40, max: 60 }), (low, high, minor) => {
      const [flags, flags2] = [Number(BigInt(low) | (1n << 30n)), Number(BigInt(high) | (1n << 7n))];
      const { payload } = agreed(negotiate(initBody({ minor, flags, flags2 }), DEFAULT_SESSION_LIMITS));
      expect(BigInt(payload.readUInt32LE(12)) & ~BigInt(flags)).toBe(0n);
      expect(BigInt(payload.readUInt32LE(32)) & ~BigInt(flags2)).toBe(0n);
      expect(payload.readUInt32LE(4)).toBe(Math.min(minor, 45));
      expect(payload.readUInt32LE(36)).toBe((flags2 / 32) % 2 >= 1 ? 1 : 0);
    }));
  });

  it('an export is agreed on when asked for', () => {
    const { parameters } = agreed(negotiate(initBody(), { ...DEFAULT_SESSION_LIMITS, exportSupport: true }));
    expect([isTaken(parameters, 4), isTaken(parameters, 38)]).toEqual([true, false]);
  });

  it.each([
    ['7.39', initBody({ minor: 39 })],
    ['7.12 in its short form', struct(7, 12, 0, 0)],
    ['6.9', initBody({ major: 6, minor: 9 })],
    ['7.45 without RESEND', initBody({ flags2: OFFERED_2 - 2 ** 7 })],
    ['7.45 in the short form', struct(7, 45, 131072, OFFERED)],
  ])('a kernel that speaks %s is refused, and told so, and the server ends with a sentence that helps', (_, short) => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 26, nodeId: 0n, body: short })).toMatchObject({ errno: Errno.EIO, lengthField: 16 });
    expect(bench.sessions).toEqual([]);
    expect(bench.fatal).toHaveLength(1);
    expect(bench.fatal[0]).toMatchObject({ kind: 'not-supported' });
    expect(bench.fatal[0]?.message).toMatch(/FUSE \d+\.\d+.*7\.40.*Linux 6\.9.*--transport fuse-native/);
  });

  it('a kernel with a newer major version is told ours, and asked again', () => {
    const bench = new DispatchBench();
    const reply = bench.ask({ opcode: 26, nodeId: 0n, body: initBody({ major: 8, minor: 0 }) });
    expect([reply.errno, reply.payload.byteLength, reply.payload.readUInt32LE(0)]).toEqual([0, 64, 7]);
    expect([bench.sessions, bench.fatal]).toEqual([[], []]);
    expect(bench.ask({ opcode: 26, nodeId: 0n, body: initBody() }).errno).toBe(0);
    expect(bench.sessions).toHaveLength(1);
  });

  it('is kept before it is answered, and not answered when it cannot be kept', () => {
    const order: string[] = [];
    const bench = new DispatchBench({ onSession: () => { order.push('kept'); }, reply: () => { order.push('answered'); } });
    bench.dispatcher.handle(Buffer.concat([struct(104, 26, 2n, 0n, 0, 0, 0, 0), initBody()]));
    expect(order).toEqual(['kept', 'answered']);
    const full = new DispatchBench({ onSession: () => { throw new TypeError('no'); } });
    full.dispatcher.handle(Buffer.concat([struct(104, 26, 2n, 0n, 0, 0, 0, 0), initBody()]));
    expect([full.replies.length, full.fatal.length]).toEqual([0, 1]);
  });
});

describe('session.json', () => {
  const { parameters } = agreed(negotiate(initBody(), DEFAULT_SESSION_LIMITS));

  it('gives the next server what was agreed', () => {
    expect(loadSession(dir)).toBeNull();
    saveSession(dir, parameters);
    expect(loadSession(dir)).toEqual(parameters);
    saveSession(dir, { ...parameters, backgroundMax: 7 });
    expect(loadSession(dir)).toEqual({ ...parameters, backgroundMax: 7 });
    expect(readdirSync(dir)).toEqual(['session.json']);
    expect(statSync(join(dir, 'session.json')).mode % 0o1000).toBe(0o600);
  });

  it.each(['', '{', 'null', '[]', '{"format":1}', '{"format":2}', '"text"'])('refuses %j', (text) => {
    writeFileSync(join(dir, 'session.json'), text);
    expect(() => loadSession(dir)).toThrow(expect.objectContaining({ kind: 'store-damaged' }) as Error);
  });

  it('refuses fields that are missing or of another kind', () => {
    for (const name of Object.keys(parameters)) {
      for (const value of [undefined, null, 'x', -1]) {
        writeFileSync(join(dir, 'session.json'), JSON.stringify({ format: 1, ...parameters, [name]: value }));
        expect(() => loadSession(dir), `${name}: ${String(value)}`).toThrow(OffshootError);
      }
    }
  });

  it('says where there is no room', () => {
    expect(() => { saveSession(join(dir, 'gone'), parameters); }).toThrow(/session could not be written to .*gone/);
  });
});

describe('the open handle table', () => {
  const logPath = (): string => join(dir, 'handles.log');

  it('counts opens, and knows what a handle was', () => {
    const table = HandleTable.load(dir);
    const [a, b, c] = [table.add(5, 2, 'direct'), table.add(5, 0, 'direct'), table.add(9, 1, 'cached')];
    expect([a, b, c]).toEqual([1, 2, 3]);
    expect([table.openCountOf(5), table.openCountOf(9), table.openCountOf(1)]).toEqual([2, 1, 0]);
    expect(table.get(c)).toEqual({ handle: 3, nodeId: 9, flags: 1, mode: 'cached', requestKey: 0 });
    expect(table.remove(a)).toEqual({ handle: 1, nodeId: 5, flags: 2, mode: 'direct', requestKey: 0 });
    expect(table.remove(a)).toBeUndefined();
    expect(table.remove(4711)).toBeUndefined();
    expect(table.openCountOf(5)).toBe(1);
    expect(table.entries().map((entry) => entry.handle)).toEqual([2, 3]);
    table.close();
  });

  it('outlives its process at every instant: what add returned is there, and no number comes twice', () => {
    fc.assert(fc.property(fc.array(fc.oneof(
      fc.record({ nodeId: fc.integer({ min: 1, max: 2 ** 45 }), flags: fc.nat(0xffff_ffff), mode: fc.constantFrom<OpenMode>('direct', 'cached'), requestKey: fc.oneof(fc.constant(0), fc.nat(2 ** 48 - 1)) }),
      fc.nat(30), fc.constant('restart' as const),
    ), { maxLength: 60 }), (steps) => {
      rmSync(logPath(), { force: true });
      let table = HandleTable.load(dir);
      const model = new Map<number, object>();
      const given = new Set<number>();
      for (const step of steps) {
        if (step === 'restart') {
          // Not closed: killed.
          const killed = table;
          table = HandleTable.load(dir);
          killed.close();
        } else if (typeof step === 'number') {
          const handle = [...given][step % Math.max(1, given.size)] ?? 1;
          expect(table.remove(handle)).toEqual(model.get(handle));
          model.delete(handle);
        } else {
          const handle = table.add(step.nodeId, step.flags, step.mode, step.requestKey);
          expect(given.has(handle)).toBe(false);
          given.add(handle);
          model.set(handle, { handle, ...step });
        }
        expect(table.entries()).toEqual([...model.values()]);
      }
      table.close();
    }), { numRuns: 60 });
  });

  it('drops a last record that is cut short or half written, at every byte', () => {
    const table = HandleTable.load(dir);
    table.add(5, 2, 'direct');
    table.add(6, 2, 'direct');
    table.close();
    const log = readFileSync(logPath());
    for (let length = log.byteLength - 31; length < log.byteLength; length++) {
      writeFileSync(logPath(), log.subarray(0, length));
      const cut = HandleTable.load(dir);
      expect(cut.entries().map((entry) => entry.nodeId)).toEqual([5]);
      expect(cut.add(7, 0, 'cached')).toBe(2);
      cut.close();
      writeFileSync(logPath(), Buffer.concat([log.subarray(0, length), Buffer.alloc(log.byteLength - length, 0xee)]));
      const torn = HandleTable.load(dir);
      expect(torn.entries().map((entry) => entry.nodeId).slice(0, 1)).toEqual([5]);
      torn.close();
    }
  });

  it('refuses damage anywhere else', () => {
    const table = HandleTable.load(dir);
    for (let node = 1; node <= 5; node++) table.add(node, 2, 'direct');
    table.close();
    const log = readFileSync(logPath());
    for (let at = 0; at < log.byteLength - 32; at += 3) {
      const damaged = Buffer.from(log);
      damaged[at] = (damaged[at] ?? 0) ^ 0x10;
      // Bytes behind the checksum mean nothing.
      if (at % 32 >= 28) continue;
      writeFileSync(logPath(), damaged);
      expect(() => HandleTable.load(dir), `byte ${at}`).toThrow(expect.objectContaining({ kind: 'store-damaged' }) as Error);
    }
    writeFileSync(logPath(), '');
    expect(() => HandleTable.load(dir)).toThrow(OffshootError);
  });

  it('is compacted at start, and while a busy file is opened and closed for ever', () => {
    const table = HandleTable.load(dir);
    const kept = table.add(3, 2, 'cached');
    for (let round = 0; round < 6000; round++) table.remove(table.add(4, 0, 'cached'));
    expect(statSync(logPath()).size).toBeLessThan(32 * 5000);
    table.close();
    writeFileSync(join(dir, 'handles.log.new'), 'left over');
    const next = HandleTable.load(dir);
    expect(statSync(logPath()).size).toBe(64);
    expect(existsSync(join(dir, 'handles.log.new'))).toBe(false);
    expect(next.entries().map((entry) => entry.handle)).toEqual([kept]);
    expect(next.add(1, 0, 'cached')).toBe(6002);
    next.close();
  });

  it('writes over what a failed write left', () => {
    const table = HandleTable.load(dir);
    table.add(5, 2, 'direct');
    appendFileSync(logPath(), 'half a record');
    table.add(6, 2, 'direct');
    table.close();
    const next = HandleTable.load(dir);
    expect(next.entries().map((entry) => entry.nodeId)).toEqual([5, 6]);
    next.close();
    truncateSync(logPath(), 32);
    const emptied = HandleTable.load(dir);
    expect(emptied.entries()).toEqual([]);
    expect(emptied.add(1, 0, 'cached')).toBe(3);
    emptied.close();
  });
});

describe('notifications', () => {
  it('have number 0 and a positive code', () => {
    expect(Buffer.from(resendMessage())).toEqual(struct(16, 7, 0n));
    expect(Buffer.from(invalidateAttributesMessage(2 ** 40 + 1))).toEqual(struct(40, 2, 0n, (1n << 40n) + 1n, -1n, 0n));
  });
});

describe('the mount table', () => {
  it('is read with blanks in paths, optional fields, and lines that are none', () => {
    const table = [
      '27 1 254:0 / / rw,relatime - ext4 /dev/vda rw',
      '90 27 0:57 / /mnt/a\\040b\\134c\\012d rw,nosuid shared:12 master:3 - fuse.offshoot offshoot rw,user_id=0',
      '', 'nonsense', '1 2 3',
    ].join('\n');
    expect(parseMountTable(table)).toEqual([
      { mountId: 27, parentId: 1, deviceMinor: 0, mountDir: '/', fileSystemType: 'ext4', source: '/dev/vda' },
      { mountId: 90, parentId: 27, deviceMinor: 57, mountDir: '/mnt/a b\\c\nd', fileSystemType: 'fuse.offshoot', source: 'offshoot' },
    ]);
  });
});
