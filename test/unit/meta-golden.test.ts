/**
 * Stores as released versions wrote them, opened by this one. `test/fixtures/store-vN` is never made anew: it was written by the
 * program of its time. (Until its schema is released, `scripts/golden-store --force` makes it: what is in it is in `test/support/golden-store.ts`.)
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

import Database from 'better-sqlite3';
import { afterAll, describe, expect, it } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { SCHEMA_VERSION } from '../../blockstore/meta/migrations.js';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { controlParts } from '../support/control-parts.js';
import { GOLDEN_CONTENT, GOLDEN_MACHINE, GOLDEN_QUOTA_BYTES, GOLDEN_RECORDS, GOLDEN_STREAM } from '../support/golden-store.js';
import { encodeStream } from '../support/power/streams.js';
import { writtenBytes } from '../support/power/window.js';

const cleanup = createCleanup();

afterAll(() => cleanup.run());

/** A copy of the fixture, as a store directory. */
function goldenStore(version: number): string {
  const storeDir = makeTmpfsDir('golden', cleanup);
  const fixture = path.join(import.meta.dirname, '../fixtures', `store-v${version}`);
  for (const name of fs.readdirSync(fixture)) {
    const id = Number(/^(\d+)\.layer$/u.exec(name)?.[1]);
    const target = Number.isNaN(id) ? path.join(storeDir, name) : path.join(storeDir, 'layers', (id % 256).toString(16).padStart(2, '0'), name);
    fs.mkdirSync(path.dirname(target), { recursive: true });
    fs.copyFileSync(path.join(fixture, name), target);
  }
  return storeDir;
}

describe('a store of version 1', () => {
  it('is what version 1 wrote, and not what this program would', () => {
    const database = new Database(path.join(import.meta.dirname, '../fixtures/store-v1/offshoot.db'), { readonly: true });
    expect(database.pragma('user_version', { simple: true })).toBe(1);
    database.close();
  });

  it('is brought to the newest version with its content, its names and its faults, and is sound', () => {
    const storeDir = goldenStore(1);
    const test = new TestStore({ storeDir });
    const { meta } = test.store;
    expect(meta.nodes.children(ROOT_ID, 0, 10).map((node) => [node.name, node.fault])).toEqual([['image', null], ['clone', null], ['second', 'a fault of long ago']]);
    expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [], faulted: [{ path: 'second' }] });

    const image = patterned(1, 65536, (block) => block % 3 === 2);
    const changed = Buffer.from(image);
    changed.fill(7, 2 * 4096, 3 * 4096);
    const [imageNode, cloneNode, secondNode] = meta.nodes.children(ROOT_ID, 0, 10);
    test.expectContent(imageNode!, image);
    test.expectContent(secondNode!, changed);
    changed.fill(9, 4096, 2 * 4096);
    test.expectContent(cloneNode!, changed);

    // What version 2 brought is there, and empty: the background work makes it.
    expect(meta.checksums.damages()).toEqual([]);
    expect(meta.checksums.unfinished()).toHaveLength(2);
    const database = new Database(path.join(storeDir, 'offshoot.db'), { readonly: true });
    expect(database.pragma('user_version', { simple: true })).toBe(SCHEMA_VERSION);
    database.close();
  });
});

describe('a store of version 3', () => {
  const FIXTURE = path.join(import.meta.dirname, '../fixtures/store-v3.tar.gz');

  function unpacked(): string {
    const storeDir = makeTmpfsDir('golden', cleanup);
    execFileSync('tar', ['-xzf', FIXTURE, '-C', storeDir]);
    return storeDir;
  }

  it('is what version 3 wrote, in a few kilobytes', () => {
    const database = new Database(path.join(unpacked(), 'offshoot.db'), { readonly: true });
    expect(database.pragma('user_version', { simple: true })).toBe(3);
    for (const table of ['snapshots', 'snapshot_clones', 'quotas', 'shared_extents', 'ownership', 'jobs']) {
      expect(database.prepare(`SELECT count(*) FROM ${table}`).pluck().get(), table).toBeGreaterThan(0);
    }
    database.close();
    expect(fs.statSync(FIXTURE).size).toBeLessThan(32 * 1024);
  });

  it('is opened with all that is in it: disks, files, links, snapshots, limits, shared extents, merged layers', () => {
    const test = new TestStore({ storeDir: unpacked() });
    const { meta, quotas } = test.store;
    expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [], faulted: [] });
    for (const [name, content] of GOLDEN_CONTENT) test.expectContent(meta.nodes.byPath(name)!, content);
    const { references } = controlParts(test.store);
    expect(meta.snapshots.all().map((snapshot) => references.nameOf(snapshot))).toEqual(['vm@s1', 'vm/a.img@s2']);
    // What version 4 brought is there, and empty.
    expect(meta.machines.all()).toEqual([]);
    meta.machines.insert({ nodeId: meta.nodes.byPath('vm')!.id, format: 'libvirt', configuration: 'a.xml', name: 'a', uuid: 'u', macs: ['m'], state: 'ready', jobId: null });
    expect(meta.machines.byMac('m')).toMatchObject({ name: 'a' });
    expect(meta.nodes.byPath('vm/.snapshots/s1/a.img')).toMatchObject({ frozen: true });
    expect(meta.nodes.byPath('vm/.snapshots/s1/link')).toMatchObject({ kind: 'symlink', linkTarget: 'etc/f' });
    expect(meta.snapshots.clonesOf(meta.nodes.byPath('vm/.snapshots/s1/a.img')!.id)).toEqual([meta.nodes.byPath('web/a.img')!.id]);
    expect(quotas.of(meta.nodes.byPath('vm')!.id)).toMatchObject({ limitBytes: GOLDEN_QUOTA_BYTES });
    expect(meta.layers.chain(meta.nodes.byPath('web/a.img')!.layerId!).length, 'five layers above the snapshot, two of which were merged into others').toBeLessThan(7);
  });

  it('can be gone on with: written, gone back to its snapshots, and its interrupted receive received to the end', async () => {
    const test = new TestStore({ storeDir: unpacked() });
    const { meta } = test.store;
    const { receives, snapshots } = controlParts(test.store);
    test.expectContent(meta.nodes.byPath('vm/a.img')!, GOLDEN_CONTENT.get('vm/a.img')!);
    test.store.disks.retireIdle(meta.nodes.byPath('vm/a.img')!.id);
    await snapshots.revert('vm/a.img@s2');
    test.expectContent(meta.nodes.byPath('vm/a.img')!, GOLDEN_CONTENT.get('vm/.snapshots/s2/a.img')!);
    await snapshots.revert('vm@s1');
    test.expectContent(meta.nodes.byPath('vm/a.img')!, GOLDEN_CONTENT.get('vm/.snapshots/s1/a.img')!);
    expect(meta.nodes.byPath('vm/shared.img')).toBeUndefined();

    const [kept] = await receives.list();
    expect(kept).toMatchObject({ uuid: GOLDEN_STREAM.uuid, state: 'paused', durableRecords: GOLDEN_RECORDS });
    const whole = encodeStream(GOLDEN_STREAM);
    const check = whole.records[GOLDEN_RECORDS - 1]!.subarray(-32).toString('hex');
    const { receiveId } = await receives.begin(GOLDEN_STREAM.target, encodeStream(GOLDEN_STREAM, { records: GOLDEN_RECORDS, check }).json);
    await receives.add(receiveId, GOLDEN_RECORDS, Buffer.concat(whole.records.slice(GOLDEN_RECORDS)));
    await receives.finish(receiveId);
    test.expectContent(meta.nodes.byPath('received/c.img')!, writtenBytes(GOLDEN_STREAM.nodes[0]!.content));
    expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [] });
  });
});

describe('a store of version 4', () => {
  const FIXTURE = path.join(import.meta.dirname, '../fixtures/store-v4.tar.gz');

  function unpacked(): string {
    const storeDir = makeTmpfsDir('golden', cleanup);
    execFileSync('tar', ['-xzf', FIXTURE, '-C', storeDir]);
    return storeDir;
  }

  it('is what version 4 wrote, with a machine in it', () => {
    const database = new Database(path.join(unpacked(), 'offshoot.db'), { readonly: true });
    expect(database.pragma('user_version', { simple: true })).toBe(4);
    for (const table of ['machines', 'machine_macs', 'snapshots', 'shared_extents']) expect(database.prepare(`SELECT count(*) FROM ${table}`).pluck().get(), table).toBeGreaterThan(0);
    database.close();
    expect(fs.statSync(FIXTURE).size).toBeLessThan(32 * 1024);
  });

  it('is opened with its machine, and what version 5 brought is there, and empty', () => {
    const test = new TestStore({ storeDir: unpacked() });
    const { meta } = test.store;
    expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [], faulted: [] });
    for (const [name, content] of GOLDEN_CONTENT) test.expectContent(meta.nodes.byPath(name)!, content);
    expect(meta.machines.byName('vm')).toMatchObject({ ...GOLDEN_MACHINE, state: 'ready', registration: 'registered', nodeId: meta.nodes.byPath('vm')!.id });
    expect([meta.exports.all(), meta.vdisks.all(), meta.attachments.all(), meta.deployments.all()]).toEqual([[], [], [], []]);
    const { id: nodeId } = meta.nodes.byPath('vm/a.img')!;
    meta.exports.insert({ uuid: 'e', nodeId, kind: 'nbd', clients: ['127.0.0.1'], readOnly: true, options: { port: '10809' } });
    expect(meta.exports.ofNode(nodeId)).toMatchObject([{ kind: 'nbd', clients: ['127.0.0.1'], readOnly: true, options: { port: '10809' } }]);
  });
});
