/** OPEN, CREATE and MKNOD that a server had done when it died: the second delivery is given the same handle, so that none is left open for ever. */
import { readdirSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';

import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { StoreFileSystem } from '../../daemon/filesystem/store-file-system.js';
import { KernelDispatcher } from '../../daemon/transport/kernel/dispatch.js';
import { HandleTable } from '../../daemon/transport/kernel/handles.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { body, names, parseReply, request, RESENT, struct, type RequestFields } from './messages.js';

const O_RDWR = 2;
const O_CREAT_EXCL_RDWR = 0o302;
const tables: HandleTable[] = [];

afterEach(() => { for (const table of tables.splice(0)) table.close(); });

/** A server on the fixture's store: its dispatcher, and what it has open. */
function serve(fixture: TestStore): { readonly ask: (fields: RequestFields) => Buffer; readonly handles: HandleTable; readonly fileSystem: StoreFileSystem } {
  const handles = HandleTable.load(fixture.runtimeDir);
  tables.push(handles);
  const fileSystem = new StoreFileSystem({ store: fixture.store, storeDir: fixture.storeDir, handles, beforeDiscard: () => undefined, onWarning: () => undefined });
  fileSystem.restore();
  const replies: Uint8Array[] = [];
  const dispatcher = new KernelDispatcher({
    fileSystem, reply: (message) => replies.push(message), onFatal: (error) => { throw error; }, logger: { debug: () => undefined, warn: () => undefined },
  });
  const ask = (fields: RequestFields): Buffer => {
    dispatcher.handle(request(fields));
    const { errno, payload } = parseReply(replies.pop()!);
    expect(errno).toBe(0);
    return payload;
  };
  return { ask, handles, fileSystem };
}

/** Files are made in containers only. */
function containerIn(fixture: TestStore): bigint {
  const { meta } = fixture.store;
  return BigInt(meta.nodes.insert({
    parentId: ROOT_ID, name: 'c', kind: 'directory', mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: null, linkTarget: null,
    copyOnRead: false, fault: null,
  }).id);
}

function openHandle(payload: Buffer, at = 0): bigint {
  return payload.readBigUInt64LE(at);
}

describe('after the death of a server that had not answered', () => {
  it('OPEN is given the handle that is recorded, and its RELEASE leaves nothing open', () => {
    const fixture = new TestStore();
    const node = fixture.image('disk', patterned(1, 8192));
    const open: RequestFields = { opcode: 14, nodeId: BigInt(node.id), unique: (1n << 33n) + 10n, body: struct(O_RDWR, 0) };
    const first = openHandle(serve(fixture).ask(open));
    fixture.kill();
    const next = serve(fixture);
    const second = openHandle(next.ask({ ...open, unique: RESENT | open.unique! }));
    expect(second).toBe(first);
    expect(next.handles.openCountOf(node.id)).toBe(1);
    next.ask({ opcode: 18, nodeId: BigInt(node.id), unique: 12n, body: struct(second, O_RDWR, 0, 0n) });
    expect(next.fileSystem.openCount(node.id)).toBe(0);
    expect(fixture.store.disks.isUsed(node.id)).toBe(false);
  });

  it('another OPEN of the same node is given a handle of its own', () => {
    const fixture = new TestStore();
    const node = fixture.image('disk', patterned(1, 8192));
    const open = (unique: bigint): RequestFields => ({ opcode: 14, nodeId: BigInt(node.id), unique, body: struct(O_RDWR, 0) });
    const first = openHandle(serve(fixture).ask(open(10n)));
    fixture.kill();
    const next = serve(fixture);
    expect(openHandle(next.ask(open(10n)))).not.toBe(first);
    expect(openHandle(next.ask(open(RESENT | 12n)))).not.toBe(first);
    expect(openHandle(next.ask(open(RESENT | (1n << 33n) | 10n)))).not.toBe(first);
    expect(next.handles.openCountOf(node.id)).toBe(4);
  });

  it('CREATE is given the file and the handle that are there', () => {
    const fixture = new TestStore();
    const create: RequestFields = { opcode: 35, nodeId: containerIn(fixture), unique: 10n, body: body(struct(O_CREAT_EXCL_RDWR, 0o100644, 0, 0), names('made')) };
    const first = serve(fixture).ask(create);
    fixture.kill();
    const next = serve(fixture);
    const second = next.ask({ ...create, unique: RESENT | 10n });
    expect([second.readBigUInt64LE(0), openHandle(second, 128)]).toEqual([first.readBigUInt64LE(0), openHandle(first, 128)]);
    expect(next.handles.entries()).toHaveLength(1);
  });

  it('MKNOD leaves nothing open, although the server died before it had closed the file', () => {
    const fixture = new TestStore();
    const server = serve(fixture);
    server.fileSystem.release = () => { throw new Error('killed here'); };
    const make: RequestFields = { opcode: 8, nodeId: containerIn(fixture), unique: 10n, body: body(struct(0o100644, 0, 0, 0), names('made')) };
    expect(() => server.ask(make)).toThrow('killed here');
    expect(server.handles.entries()).toHaveLength(1);
    fixture.kill();
    const next = serve(fixture);
    next.ask({ ...make, unique: RESENT | 10n });
    expect(next.handles.entries()).toEqual([]);
    expect(readdirSync(fixture.runtimeDir)).toContain('handles.log');
  });
});
