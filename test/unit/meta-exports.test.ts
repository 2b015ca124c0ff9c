/** Tables of schema 5: exports, container files, attachments, deployed machines. */
import { describe, expect, it } from 'vitest';

import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { databasePath, expectError, openStore } from '../support/meta-store-fixture.js';

function directory(store: MetaStore, name: string): number {
  return store.nodes.insert({
    parentId: ROOT_ID, name, kind: 'directory', mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: null, linkTarget: null, copyOnRead: false, fault: null,
  }).id;
}

describe('exports', () => {
  it('shows a node once in each way, keeps what was written over a restart, and goes with its node', () => {
    const path = databasePath();
    const store = openStore(path);
    const nodeId = directory(store, 'vms');
    const fields = { uuid: 'a', nodeId, kind: 'nfs', clients: ['192.0.2.0/24'], readOnly: false, options: { squash: 'root' } } as const;
    const row = store.exports.insert(fields);
    expectError('already-exists', () => store.exports.insert({ ...fields, uuid: 'b' }));
    store.exports.insert({ ...fields, uuid: 'b', kind: 'smb' });
    store.exports.setOptions(row.id, { port: '2049' });
    store.close();
    const again = openStore(path);
    expect(again.exports.ofKind('nfs')).toEqual([{ ...row, options: { port: '2049' } }]);
    again.exports.remove(row.id);
    expect(again.exports.byId(row.id)).toBeUndefined();
    again.exports.restore(row);
    expect(again.exports.byId(row.id)).toEqual(row);
    again.nodes.remove(nodeId);
    expect(again.exports.all()).toEqual([]);
  });
});

describe('attachments', () => {
  it('are one for a file, with the device once it is known', () => {
    const store = openStore(databasePath());
    const nodeId = directory(store, 'a');
    const id = store.attachments.insert({ nodeId, purpose: 'stage', jobId: 7 });
    expect(store.attachments.byNode(nodeId)).toMatchObject({ device: null, purpose: 'stage', jobId: 7 });
    store.attachments.attached(id, '/dev/loop7');
    expect(expectError('in-use', () => store.attachments.insert({ nodeId, purpose: 'block', jobId: null })).message).toContain('/dev/loop7');
    expect(store.attachments.ofJob(7)).toHaveLength(1);
    expect(store.attachments.count()).toBe(1);
    store.attachments.remove(id);
    expect(store.attachments.count()).toBe(0);
  });
});

describe('deployed machines', () => {
  function deployed(store: MetaStore): { readonly vdiskId: number; readonly id: number; readonly fileId: number } {
    const fileId = directory(store, 'file');
    const vdiskId = store.vdisks.insert({ uuid: 'v', nodeId: fileId, format: 'qemu', configuration: 'a.json', name: 'a', description: { partitions: [1] }, state: 'making', jobId: 3 });
    const id = store.deployments.insert({ vdiskId, nodeId: directory(store, 'clone'), name: 'web', uuid: 'u1', macs: ['m1', 'm2'], mountPoint: '/run/web', jobId: 4 });
    return { vdiskId, id, fileId };
  }

  it('keep their place through their states, and outlive the container file that they came from', () => {
    const store = openStore(databasePath());
    const { vdiskId, id, fileId } = deployed(store);
    store.vdisks.describe(vdiskId, { partitions: [2] });
    store.vdisks.ready(vdiskId);
    expect(store.vdisks.byNode(fileId)).toMatchObject({ description: { partitions: [2] }, state: 'ready', jobId: 3 });
    store.deployments.asked(id, 'qemu');
    store.deployments.registered(id, 'qemu', 'x');
    store.deployments.ready(id);
    expect(store.deployments.ofVdisk(vdiskId)).toMatchObject([{ name: 'web', macs: ['m1', 'm2'], state: 'ready', jobId: null, externalId: 'x' }]);
    store.deployments.ending(id, 9);
    expect(store.deployments.ofJob(9)).toMatchObject([{ id, state: 'ending' }]);
    store.nodes.remove(fileId);
    expect(store.vdisks.all()).toEqual([]);
    expect(store.deployments.byId(id)).toMatchObject({ vdiskId: null, name: 'web' });
  });

  it('share no name, UUID or MAC with each other, nor with machines of the store, whichever was first', () => {
    const store = openStore(databasePath());
    deployed(store);
    const machine = { nodeId: directory(store, 'm'), format: 'libvirt', configuration: 'a.xml', name: 'other', uuid: 'u9', macs: ['m9'], state: 'ready', jobId: null } as const;
    for (const clash of [{ name: 'web' }, { uuid: 'u1' }, { macs: ['m8', 'm2'] }]) {
      expect(expectError('already-exists', () => store.machines.insert({ ...machine, ...clash })).message).toContain('"web"');
    }
    store.machines.insert(machine);
    const next = { vdiskId: null, nodeId: directory(store, 'second'), name: 'second', uuid: 'u2', macs: ['m3'], mountPoint: '/run/second', jobId: 5 };
    for (const clash of [{ name: 'other' }, { uuid: 'u9' }, { macs: ['m9'] }, { name: 'web' }, { uuid: 'u1' }, { macs: ['m1'] }]) {
      expectError('already-exists', () => store.deployments.insert({ ...next, ...clash }));
    }
    store.deployments.insert(next);
    expect(store.deployments.all()).toHaveLength(2);
  });
});
