/**
 * Random FUSE messages: sound ones about things that exist, with numbers from the edges of what 64 bits can say, then some of
 * them damaged: bytes changed, cut short, made longer, a length that is not theirs.
 */
import * as fc from 'fast-check';

import { body, names, request, struct } from '../../protocol/messages.js';

export interface Damage {
  /** Bytes of the body that are left, as a fraction of it. */
  readonly keep: number | null;
  /** Whether the header agrees with what is left. */
  readonly honest: boolean;
  readonly changes: readonly (readonly [number, number])[];
  readonly extra: Uint8Array;
  readonly lengthField: number | null;
}

export interface Step {
  readonly opcode: number;
  readonly nodeId: bigint;
  /** The upper half of `unique`; bit 31 of it says that the request comes again. */
  readonly uniqueHigh: number;
  readonly body: Uint8Array;
  readonly damage: Damage | null;
}

export interface FuzzNodes {
  readonly container: number;
  readonly disks: readonly number[];
  readonly file: number;
}

const MAX_64 = (1n << 64n) - 1n;
const DISK_END = 96n * 1024n + 1536n;
const EDGES: readonly bigint[] = [
  0n, 1n, 511n, 512n, 4095n, 4096n, 4097n, 8192n, 40_000n, DISK_END - 512n, DISK_END - 1n, DISK_END, DISK_END + 1n, 1n << 20n, (1n << 31n) - 1n, 1n << 31n,
  (1n << 32n) - 1n, 1n << 32n, (1n << 32n) + 4096n, 1n << 44n, (1n << 46n) - 1n, 1n << 46n, (1n << 46n) + 1n, (1n << 53n) - 1n, 1n << 53n, (1n << 63n) - 1n,
  1n << 63n, MAX_64 - 4095n, MAX_64,
];
/** Larger ones would have room reserved for them, which the machine may really have. */
const RESERVABLE_BYTES_MAX = 1n << 20n;
const RESERVABLE_AGAIN_FROM = 1n << 46n;

const u64 = fc.oneof(
  { weight: 3, arbitrary: fc.bigInt({ min: 0n, max: DISK_END }) },
  { weight: 3, arbitrary: fc.constantFrom(...EDGES) },
  { weight: 1, arbitrary: fc.bigInt({ min: 0n, max: MAX_64 }) },
);
const u32 = fc.oneof(fc.constantFrom(0, 1, 2, 3, 4, 0x10, 0x11, 512, 4096, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff), fc.integer({ min: 0, max: 0xffff_ffff }));
const size = fc.oneof({ weight: 5, arbitrary: fc.constantFrom(0, 1, 511, 512, 4096, 5000, 8192, 65_536) }, { weight: 1, arbitrary: u32 });
const ioFlags = fc.constantFrom(0, 0, 0, 0o10000, 0o4010000, 0o40000, 0o50000, 0xffff_ffff);
const handle = fc.oneof(fc.bigInt({ min: 0n, max: 8n }), u64);
const name = fc.oneof(
  { weight: 5, arbitrary: fc.constantFrom('base', 'one', 'two', 'file', 'made', 'other', 'c') },
  { weight: 1, arbitrary: fc.constantFrom('', '.', '..', 'a/b', 'x'.repeat(255), 'x'.repeat(256), 'é', '\u202e', 'a\nb') },
);

/** A request about the nodes that are there, most of them about the disks. */
function soundRequest(nodes: FuzzNodes): fc.Arbitrary<{ readonly opcode: number; readonly nodeId: bigint; readonly body: Uint8Array }> {
  const disk = fc.oneof({ weight: 8, arbitrary: fc.constantFrom(...nodes.disks.map(BigInt)) }, { weight: 1, arbitrary: fc.constant(BigInt(nodes.file)) }, { weight: 1, arbitrary: u64 });
  const directory = fc.oneof({ weight: 6, arbitrary: fc.constantFrom(1n, BigInt(nodes.container)) }, { weight: 1, arbitrary: u64 });
  const any = fc.oneof(disk, directory);
  const row = <T>(weight: number, opcode: number, node: fc.Arbitrary<bigint>, fields: fc.Arbitrary<T>, make: (fields: T) => Uint8Array) => ({
    weight, arbitrary: fc.tuple(node, fields).map(([nodeId, values]) => ({ opcode, nodeId, body: make(values) })),
  });
  const io = fc.record({ handle, offset: u64, size, flags: ioFlags });
  const write = fc.record({ handle, offset: u64, bytes: fc.oneof(fc.constantFrom(1, 100, 512, 4096, 6000, 20_000).map((length) => Buffer.alloc(length, length % 251 + 1)), fc.uint8Array({ maxLength: 600 })), flags: ioFlags, lie: fc.constantFrom(0, 0, 0, 0, 1, -1, 4096) });
  const range = fc.record({ handle, offset: u64, length: u64, mode: fc.oneof(fc.constantFrom(0, 1, 3, 0x10, 0x11), u32) });
  const reservable = range.map((fields) => {
    const reserves = fields.mode === 0 || fields.mode === 1;
    const isReal = fields.length > RESERVABLE_BYTES_MAX && fields.length < RESERVABLE_AGAIN_FROM;
    return reserves && isReal ? { ...fields, length: RESERVABLE_BYTES_MAX } : fields;
  });
  // Most of them long enough to be shared, and alike in their blocks.
  const place = fc.oneof({ weight: 3, arbitrary: fc.constantFrom(0n, 100n, 4096n, 8192n, 20_480n) }, { weight: 1, arbitrary: u64 });
  const copy = fc.record({
    handle, target: disk, from: place, to: place, length: fc.oneof({ weight: 3, arbitrary: fc.constantFrom(65_536n, 73_728n, DISK_END, MAX_64) }, { weight: 1, arbitrary: u64 }),
    flags: fc.oneof({ weight: 8, arbitrary: fc.constant(0n) }, { weight: 1, arbitrary: u64 }),
  });
  const copyBody = (f: { handle: bigint; target: bigint; from: bigint; to: bigint; length: bigint; flags: bigint }): Uint8Array =>
    struct(f.handle, f.from, f.target, f.handle, f.to, f.length, f.flags);
  return fc.oneof(
    row(12, 15, disk, io, (f) => struct(f.handle, f.offset, f.size, 0, 0n, f.flags, 0)),
    row(12, 16, disk, write, (f) => body(struct(f.handle, f.offset, Math.max(0, f.bytes.length + f.lie), 0, 0n, f.flags, 0), f.bytes)),
    row(6, 43, disk, reservable, (f) => struct(f.handle, f.offset, f.length, f.mode, 0)),
    row(4, 46, disk, fc.record({ handle, offset: u64, whence: fc.oneof(fc.constantFrom(3, 4), u32) }), (f) => struct(f.handle, f.offset, f.whence, 0)),
    row(3, 47, disk, copy, copyBody),
    row(3, 53, disk, copy, copyBody),
    row(2, 14, any, u32, (flags) => struct(flags, 0)),
    row(1, 18, any, handle, (fh) => struct(fh, 0, 0, 0n)),
    row(2, 20, any, handle, (fh) => struct(fh, 0, 0)),
    row(1, 25, any, handle, (fh) => struct(fh, 0, 0, 0n)),
    row(2, 3, any, u32, (flags) => struct(flags, 0, 0n)),
    row(3, 4, any, fc.record({ valid: fc.oneof(fc.constantFrom(1, 2, 4, 8, 0x10, 0x20, 0x80, 0x100, 0x1f), u32), size: u64, time: u64, ns: u32, mode: u32, uid: u32 }), (f) =>
      struct(f.valid, 0, 0n, f.size, 0n, f.time, f.time, f.time, f.ns, f.ns, f.ns, f.mode, 0, f.uid, f.uid, 0)),
    row(2, 1, directory, name, (text) => names(text)),
    row(1, 2, any, u64, (count) => struct(count)),
    row(1, 42, any, u32, (count) => struct(count, 0, 3n, 1n)),
    row(1, 5, any, fc.constant(0), () => Buffer.alloc(0)),
    row(1, 6, directory, fc.tuple(name, name), ([at, target]) => names(at, target)),
    row(1, 8, directory, fc.tuple(u32, name), ([mode, text]) => body(struct(mode, 0, 0, 0), names(text))),
    row(1, 9, directory, fc.tuple(u32, name), ([mode, text]) => body(struct(mode, 0), names(text))),
    row(1, 10, directory, name, (text) => names(text)),
    row(1, 11, directory, name, (text) => names(text)),
    row(1, 12, directory, fc.tuple(directory, name, name), ([to, from, at]) => body(struct(to), names(from, at))),
    row(1, 45, directory, fc.tuple(directory, u32, name, name), ([to, flags, from, at]) => body(struct(to, flags, 0), names(from, at))),
    row(1, 13, directory, fc.tuple(u64, name), ([node, text]) => body(struct(node), names(text))),
    row(1, 17, any, fc.constant(0), () => Buffer.alloc(0)),
    row(1, 28, directory, fc.record({ offset: u64, size }), (f) => struct(0n, f.offset, f.size, 0, 0n, 0, 0)),
    row(1, 44, directory, fc.record({ offset: u64, size }), (f) => struct(0n, f.offset, f.size, 0, 0n, 0, 0)),
    row(1, 35, directory, fc.tuple(u32, u32, name), ([flags, mode, text]) => body(struct(flags, mode, 0, 0), names(text))),
    row(1, 52, any, u32, (mask) => struct(0, 0, 0n, 0, mask)),
    row(1, 0, any, fc.uint8Array({ maxLength: 120 }), (bytes) => bytes),
  );
}

const damage: fc.Arbitrary<Damage> = fc.record({
  keep: fc.option(fc.double({ min: 0, max: 1, noNaN: true }), { freq: 3 }),
  honest: fc.boolean(),
  changes: fc.array(fc.tuple(fc.nat(200), fc.oneof(fc.constantFrom(0, 0x7f, 0x80, 0xff), fc.nat(255))), { maxLength: 4 }),
  extra: fc.oneof({ weight: 4, arbitrary: fc.constant(new Uint8Array()) }, { weight: 1, arbitrary: fc.uint8Array({ maxLength: 64 }) }),
  lengthField: fc.option(u32, { freq: 6 }),
});

export function stepsOn(nodes: FuzzNodes): fc.Arbitrary<Step[]> {
  const step = fc.record({
    sound: soundRequest(nodes),
    opcode: fc.option(fc.oneof(fc.integer({ min: 0, max: 60 }), u32), { freq: 20 }),
    uniqueHigh: fc.oneof(fc.constant(0), u32),
    damage: fc.option(damage, { freq: 2 }),
  }).map(({ sound, opcode, ...rest }) => ({ ...sound, ...rest, opcode: opcode ?? sound.opcode }));
  return fc.array(step, { minLength: 1, maxLength: 300, size: 'max' });
}

/** The bytes of a step, the `index`th of its case: so that no two have the same number. */
export function bytesOfStep(step: Step, index: number): Buffer {
  const unique = BigInt(step.uniqueHigh) * (1n << 32n) + BigInt(index + 1);
  const { damage: harm } = step;
  let content = Buffer.from(step.body);
  if (harm?.keep !== null && harm?.keep !== undefined) content = content.subarray(0, Math.floor(content.length * harm.keep));
  if (harm !== null) content = Buffer.concat([content, harm.extra]);
  const message = request({ opcode: step.opcode, nodeId: step.nodeId, unique, body: content });
  if (harm === null) return message;
  for (const [at, value] of harm.changes) {
    // Neither the length nor the number: without them the rest would not be looked at.
    const place = at % (message.length - 4) + 4;
    if (place < 8 || place >= 16) message[place] = value;
  }
  if (harm.lengthField !== null) message.writeUInt32LE(harm.lengthField, 0);
  else if (harm.honest) return message;
  // Cut without telling: the header says more than there is.
  return harm.keep === null ? message : message.subarray(0, Math.max(1, Math.floor(message.length * harm.keep)));
}
