/** LOOKUP of `.` and `..` by number, as NFS servers make the kernel ask: what somebody kept for months, asked of a server that has never seen it. */
import { afterEach, describe, expect, it } from 'vitest';

import { Errno } from '../../blockstore/errors.js';
import { ROOT_ID, type NewNode } from '../../blockstore/meta/rows.js';
import { StoreFileSystem } from '../../daemon/filesystem/store-file-system.js';
import { KernelDispatcher } from '../../daemon/transport/kernel/dispatch.js';
import { HandleTable } from '../../daemon/transport/kernel/handles.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { body, names, parseAttributes, parseReply, request, struct, type Reply, type RequestFields } from './messages.js';

const LOOKUP = 1;
const UNLINK = 10;
const OPEN = 14;
const RELEASE = 18;
const CREATE = 35;
const O_RDWR = 2;
const tables: HandleTable[] = [];

afterEach(() => { for (const table of tables.splice(0)) table.close(); });

type Ask = (fields: RequestFields) => Reply;

function serve(fixture: TestStore): Ask {
  const handles = HandleTable.load(fixture.runtimeDir);
  tables.push(handles);
  const fileSystem = new StoreFileSystem({ store: fixture.store, storeDir: fixture.storeDir, handles, beforeDiscard: () => undefined, onWarning: () => undefined });
  fileSystem.restore();
  const replies: Uint8Array[] = [];
  const dispatcher = new KernelDispatcher({
    fileSystem, reply: (message) => replies.push(message), onFatal: (error) => { throw error; }, logger: { debug: () => undefined, warn: () => undefined },
  });
  return (fields) => {
    dispatcher.handle(request(fields));
    return parseReply(replies.pop()!);
  };
}

function insert(fixture: TestStore, fields: Partial<NewNode> & Pick<NewNode, 'parentId' | 'name'>): bigint {
  return BigInt(fixture.store.meta.nodes.insert({
    kind: 'directory', mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: null, linkTarget: null, copyOnRead: false, fault: null, ...fields,
  }).id);
}

/** Node, generation and type of an entry. */
function entry({ errno, payload }: Reply): unknown {
  return errno === 0 ? [payload.readBigUInt64LE(0), payload.readBigUInt64LE(8), parseAttributes(payload, 40).mode & 0o170000] : errno;
}

const generationOf = (fixture: TestStore, id: bigint): bigint => BigInt(fixture.store.meta.nodes.byId(Number(id))?.generation ?? 0);
const dot = (ask: Ask, nodeId: bigint): unknown => entry(ask({ opcode: LOOKUP, nodeId, body: names('.') }));
const dotDot = (ask: Ask, nodeId: bigint): unknown => entry(ask({ opcode: LOOKUP, nodeId, body: names('..') }));

describe('a number that somebody kept', () => {
  it('is answered with the right generation by a server that has never seen it: directories, disks, files, links and what is frozen', () => {
    const fixture = new TestStore();
    const container = insert(fixture, { parentId: ROOT_ID, name: 'c' });
    const directory = insert(fixture, { parentId: Number(container), name: 'd' });
    const frozen = insert(fixture, { parentId: Number(container), name: '.snapshots', frozen: true });
    const link = insert(fixture, { parentId: Number(directory), name: 'l', kind: 'symlink', linkTarget: 'x' });
    const disk = BigInt(fixture.image('disk', patterned(1, 8192)).id);
    const made = serve(fixture)({ opcode: CREATE, nodeId: directory, body: body(struct(0o302, 0o100644, 0, 0), names('f')) }).payload;
    const file = made.readBigUInt64LE(0);
    const kinds: [bigint, number][] = [[1n, 0o040000], [container, 0o040000], [directory, 0o040000], [frozen, 0o040000], [link, 0o120000], [disk, 0o100000], [file, 0o100000]];
    const generations = new Map(kinds.map(([id]) => [id, generationOf(fixture, id)]));
    expect(new Set(generations.values()).size).toBe(kinds.length);

    fixture.kill();
    const ask = serve(fixture);
    for (const [id, type] of kinds) expect(dot(ask, id)).toEqual([id, generations.get(id), type]);
    expect(dotDot(ask, 1n)).toEqual(dot(ask, 1n));
    expect(dotDot(ask, container)).toEqual(dot(ask, 1n));
    for (const id of [directory, frozen]) expect(dotDot(ask, id)).toEqual(dot(ask, container));
    for (const id of [file, link]) expect(dotDot(ask, id)).toEqual(dot(ask, directory));
  });

  it('is ESTALE when the node is gone, was never there, or cannot be', () => {
    const fixture = new TestStore();
    const container = insert(fixture, { parentId: ROOT_ID, name: 'c' });
    const first = serve(fixture);
    const made = first({ opcode: CREATE, nodeId: container, body: body(struct(0o302, 0o100644, 0, 0), names('f')) }).payload;
    const file = made.readBigUInt64LE(0);
    expect(first({ opcode: RELEASE, nodeId: file, body: struct(made.readBigUInt64LE(128), O_RDWR, 0, 0n) }).errno).toBe(0);
    expect(first({ opcode: UNLINK, nodeId: container, body: names('f') }).errno).toBe(0);
    fixture.kill();
    const ask = serve(fixture);
    for (const id of [file, 4711n, 2n ** 52n]) expect([dot(ask, id), dotDot(ask, id)]).toEqual([Errno.ESTALE, Errno.ESTALE]);
    // What is asked for by a name is missing, not stale.
    expect(entry(ask({ opcode: LOOKUP, nodeId: container, body: names('f') }))).toBe(Errno.ENOENT);
  });

  it('of what has lost its name is right for those who have it open, and ESTALE from the last close on', () => {
    const fixture = new TestStore();
    const container = insert(fixture, { parentId: ROOT_ID, name: 'c' });
    const first = serve(fixture);
    const made = first({ opcode: CREATE, nodeId: container, body: body(struct(0o302, 0o100644, 0, 0), names('f')) }).payload;
    const file = made.readBigUInt64LE(0);
    const again = first({ opcode: OPEN, nodeId: file, body: struct(O_RDWR, 0) }).payload.readBigUInt64LE(0);
    expect(first({ opcode: UNLINK, nodeId: container, body: names('f') }).errno).toBe(0);
    fixture.kill();
    const ask = serve(fixture);
    expect([dot(ask, file), dotDot(ask, file)]).toEqual([[file, generationOf(fixture, file), 0o100000], Errno.ESTALE]);
    for (const handle of [made.readBigUInt64LE(128), again]) ask({ opcode: RELEASE, nodeId: file, body: struct(handle, O_RDWR, 0, 0n) });
    expect(dot(ask, file)).toBe(Errno.ESTALE);
  });

  it('without a name and not open is ESTALE also before it has been taken away', () => {
    const fixture = new TestStore();
    const ask = serve(fixture);
    const container = insert(fixture, { parentId: ROOT_ID, name: 'c' });
    const id = insert(fixture, { parentId: Number(container), name: 'l', kind: 'symlink', linkTarget: 'x' });
    fixture.store.meta.nodes.orphan(Number(id));
    expect(dot(ask, id)).toBe(Errno.ESTALE);
  });
});
