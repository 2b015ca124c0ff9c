/**
 * FUSE messages built by hand, and replies taken apart, for tests without a kernel.
 *
 * Written from the kernel's header file with plain numbers, not from protocol.ts: a wrong offset there must not be repeated
 * here.
 */

export interface RequestFields {
  readonly opcode: number;
  readonly nodeId?: bigint;
  readonly unique?: bigint;
  readonly uid?: number;
  readonly gid?: number;
  readonly pid?: number;
  readonly body?: Uint8Array;
}

export interface Reply {
  readonly lengthField: number;
  readonly errno: number;
  readonly unique: bigint;
  readonly payload: Buffer;
}

export const RESENT = 1n << 63n;

export function request({ opcode, nodeId = 1n, unique = 0x1234_5678_9abcn, uid = 1000, gid = 1001, pid = 42, body = new Uint8Array() }: RequestFields): Buffer {
  const message = Buffer.alloc(40 + body.byteLength);
  message.writeUInt32LE(message.byteLength, 0);
  message.writeUInt32LE(opcode, 4);
  message.writeBigUInt64LE(unique, 8);
  message.writeBigUInt64LE(nodeId, 16);
  message.writeUInt32LE(uid, 24);
  message.writeUInt32LE(gid, 28);
  message.writeUInt32LE(pid, 32);
  message.set(body, 40);
  return message;
}

/** Fields of a struct, one after another: numbers are u32, bigints u64 (negative ones two's complement). */
export function struct(...fields: readonly (number | bigint)[]): Buffer {
  return Buffer.concat(fields.map((field) => {
    const bytes = Buffer.alloc(typeof field === 'bigint' ? 8 : 4);
    if (typeof field === 'bigint') bytes.writeBigUInt64LE(BigInt.asUintN(64, field));
    else bytes.writeUInt32LE(field);
    return bytes;
  }));
}

/** Strings as the kernel sends names: each with its NUL. */
export function names(...texts: readonly (string | Uint8Array)[]): Buffer {
  return Buffer.concat(texts.flatMap((text) => [Buffer.from(text), Buffer.of(0)]));
}

export function body(...parts: readonly Uint8Array[]): Buffer {
  return Buffer.concat(parts);
}

export function parseReply(message: Uint8Array): Reply {
  const bytes = Buffer.from(message);
  return {
    lengthField: bytes.readUInt32LE(0),
    errno: 0 - bytes.readInt32LE(4),
    unique: bytes.readBigUInt64LE(8),
    payload: bytes.subarray(16),
  };
}

export interface WireAttributes {
  readonly ino: bigint;
  readonly size: bigint;
  readonly blocks: bigint;
  readonly mtime: bigint;
  readonly mtimeNs: number;
  readonly mode: number;
  readonly linkCount: number;
  readonly uid: number;
  readonly gid: number;
  readonly blockSize: number;
}

/** fuse_attr. */
export function parseAttributes(bytes: Buffer, at: number): WireAttributes {
  return {
    ino: bytes.readBigUInt64LE(at),
    size: bytes.readBigUInt64LE(at + 8),
    blocks: bytes.readBigUInt64LE(at + 16),
    mtime: bytes.readBigInt64LE(at + 32),
    mtimeNs: bytes.readUInt32LE(at + 52),
    mode: bytes.readUInt32LE(at + 60),
    linkCount: bytes.readUInt32LE(at + 64),
    uid: bytes.readUInt32LE(at + 68),
    gid: bytes.readUInt32LE(at + 72),
    blockSize: bytes.readUInt32LE(at + 80),
  };
}

export interface WireDirent {
  readonly name: string;
  readonly ino: bigint;
  readonly offset: bigint;
  readonly type: number;
  /** READDIRPLUS only. */
  readonly nodeId: bigint | null;
}

export function parseDirents(payload: Buffer, plus: boolean): WireDirent[] {
  const entries: WireDirent[] = [];
  let at = 0;
  while (at < payload.byteLength) {
    const dirent = at + (plus ? 128 : 0);
    const nameBytes = payload.readUInt32LE(dirent + 16);
    entries.push({
      name: payload.toString('utf8', dirent + 24, dirent + 24 + nameBytes),
      ino: payload.readBigUInt64LE(dirent),
      offset: payload.readBigUInt64LE(dirent + 8),
      type: payload.readUInt32LE(dirent + 20),
      nodeId: plus ? payload.readBigUInt64LE(at) : null,
    });
    at = dirent + 24 + Math.ceil(nameBytes / 8) * 8;
  }
  return entries;
}
