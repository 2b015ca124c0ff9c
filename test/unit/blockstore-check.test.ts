/**
 * The check against stores that were damaged on purpose: each row is a kind of damage, and what must be said of it.
 *
 * Damage is done to real files and, behind the store's back, to the real database.
 */
import fs from 'node:fs';
import path from 'node:path';

import Database from 'better-sqlite3';
import { describe, expect, it } from 'vitest';

import { checkStore, type CheckReport } from '../../blockstore/check.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { mustRun } from '../support/model/command.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';

const MIB = 1024 * 1024;
const IMAGE_BYTES = 2 * MIB;

interface Bed {
  readonly test: TestStore;
  readonly image: NodeRow;
  /** Stands on the image's sealed layer, and owns blocks 3 and 5. */
  readonly clone: NodeRow;
  /** Never opened: it has no file. */
  readonly unopened: NodeRow;
}

/** A store in which a bit of everything was done. */
async function makeBed(): Promise<Bed> {
  const test = new TestStore();
  const image = test.image('image', patterned(1, IMAGE_BYTES));
  const clone = test.clone(image, 'clone');
  const unopened = test.clone(image, 'unopened');
  test.acquire(clone);
  test.write(clone, 3 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 7));
  test.write(clone, 5 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 7));
  await test.store.flush(clone.id);
  test.store.disks.release(clone.id);
  test.store.disks.retireIdle(clone.id);
  return { test, image, clone, unopened };
}

/** Changes the database as no part of the program would. */
function sql(test: TestStore, ...statements: readonly string[]): void {
  const database = new Database(path.join(test.storeDir, 'offshoot.db'));
  try {
    database.unsafeMode(true);
    database.pragma('foreign_keys = OFF');
    database.pragma('ignore_check_constraints = ON');
    for (const statement of statements) database.exec(statement);
  } finally {
    database.close();
  }
}

function sealedOf({ test, clone }: Bed): number {
  const id = test.layer(clone).backingId;
  if (id === null) throw new Error('the clone stands on nothing');
  return id;
}

function fileOf({ test }: Bed, layerId: number): string { return test.store.files.storePath(layerId); }

interface Damage {
  readonly what: string;
  readonly kind: CheckReport['findings'][number]['kind'];
  readonly verdict: CheckReport['verdict'];
  readonly disks?: readonly string[];
  readonly damage: (bed: Bed) => void;
}

const PAGE = Buffer.alloc(PAGE_BLOCKS / 8);
PAGE[0] = 1;

const damages: readonly Damage[] = [
  {
    what: 'the file of a sealed layer is missing', kind: 'layer-file-missing', verdict: 'corruption', disks: ['clone', 'image', 'unopened'],
    damage: (bed) => { fs.rmSync(fileOf(bed, sealedOf(bed))); },
  },
  {
    what: 'the file of an active layer that owns blocks is missing', kind: 'layer-file-missing', verdict: 'corruption', disks: ['clone'],
    damage: (bed) => { fs.rmSync(fileOf(bed, bed.test.layer(bed.clone).id)); },
  },
  {
    what: 'the file of a sealed, complete layer was cut', kind: 'layer-file-short', verdict: 'corruption', disks: ['clone', 'image', 'unopened'],
    damage: (bed) => { fs.truncateSync(fileOf(bed, sealedOf(bed)), IMAGE_BYTES - 1); },
  },
  {
    what: 'the file of an incomplete layer ends before what it owns', kind: 'layer-file-short', verdict: 'corruption', disks: ['clone'],
    damage: (bed) => { fs.truncateSync(fileOf(bed, bed.test.layer(bed.clone).id), 5 * BLOCK_BYTES + 1); },
  },
  {
    what: 'a directory lies where a data file must be', kind: 'layer-file-wrong', verdict: 'corruption', disks: ['clone', 'image', 'unopened'],
    damage: (bed) => { fs.rmSync(fileOf(bed, sealedOf(bed))); fs.mkdirSync(fileOf(bed, sealedOf(bed))); },
  },
  {
    what: 'a file lies where the directory of data files must be', kind: 'layer-file-wrong', verdict: 'corruption', disks: ['clone', 'image', 'unopened'],
    damage: (bed) => {
      const directory = path.dirname(fileOf(bed, sealedOf(bed)));
      fs.rmSync(directory, { recursive: true });
      fs.writeFileSync(directory, 'in the way');
    },
  },
  {
    what: 'the source of a disk in place was changed', kind: 'external-changed', verdict: 'corruption', disks: ['placed'],
    damage: ({ test }) => { fs.writeFileSync(test.inPlace('placed', patterned(2, 65536)).file, 'other'); },
  },
  {
    what: 'the source of a disk in place is gone', kind: 'external-unreachable', verdict: 'corruption', disks: ['placed'],
    damage: ({ test }) => { fs.rmSync(test.inPlace('placed', patterned(2, 65536)).file); },
  },
  {
    what: 'a count of owned blocks is wrong', kind: 'ownership', verdict: 'corruption', disks: ['clone'],
    damage: ({ test, clone }) => { sql(test, `UPDATE ownership SET owned_blocks = 3 WHERE layer_id = ${test.layer(clone).id}`); },
  },
  {
    what: 'pages are there twice', kind: 'ownership', verdict: 'corruption', disks: ['clone'],
    damage: ({ test, clone }) => {
      const id = test.layer(clone).id;
      sql(test, `UPDATE nodes SET size_bytes = 0 WHERE id = ${clone.id}`, `DELETE FROM ownership WHERE layer_id = ${id}`,
        `INSERT INTO ownership VALUES (${id}, 0, 4, ${4 * PAGE_BLOCKS}, NULL), (${id}, 2, 1, 1, x'${PAGE.toString('hex')}')`);
    },
  },
  {
    what: 'two runs of pages touch', kind: 'ownership', verdict: 'corruption', disks: ['clone'],
    damage: ({ test, clone }) => {
      const id = test.layer(clone).id;
      sql(test, `UPDATE nodes SET size_bytes = 0 WHERE id = ${clone.id}`, `DELETE FROM ownership WHERE layer_id = ${id}`,
        `INSERT INTO ownership VALUES (${id}, 0, 2, ${2 * PAGE_BLOCKS}, NULL), (${id}, 2, 1, ${PAGE_BLOCKS}, NULL)`);
    },
  },
  {
    what: 'pages lie behind the end of the largest disk', kind: 'ownership', verdict: 'corruption', disks: ['clone'],
    damage: ({ test, clone }) => { sql(test, `INSERT INTO ownership VALUES (${test.layer(clone).id}, 8388608, 1, ${PAGE_BLOCKS}, NULL)`); },
  },
  {
    what: 'a complete layer has rows of blocks', kind: 'ownership', verdict: 'corruption', disks: ['clone', 'image', 'unopened'],
    damage: (bed) => { sql(bed.test, `INSERT INTO ownership VALUES (${sealedOf(bed)}, 0, 1, ${PAGE_BLOCKS}, NULL)`); },
  },
  {
    what: 'a backing chain runs in a circle', kind: 'backing-chain', verdict: 'corruption',
    damage: (bed) => {
      const { test, clone } = bed;
      sql(test, `UPDATE layers SET backing_id = ${test.layer(clone).id}, complete = 0 WHERE id = ${sealedOf(bed)}`, `UPDATE layers SET sealed = 1 WHERE id = ${test.layer(clone).id}`);
    },
  },
  {
    what: 'a layer stands on one that is not sealed', kind: 'backing-chain', verdict: 'corruption', disks: ['clone'],
    damage: ({ test, image, clone }) => { sql(test, `UPDATE layers SET backing_id = ${test.layer(image).id} WHERE id = ${test.layer(clone).id}`); },
  },
  {
    what: 'a backing does not exist', kind: 'database', verdict: 'corruption',
    damage: ({ test, clone }) => { sql(test, `UPDATE layers SET backing_id = 999 WHERE id = ${test.layer(clone).id}`); },
  },
  {
    what: 'an active layer is sealed', kind: 'active-layer', verdict: 'corruption', disks: ['clone'],
    damage: ({ test, clone }) => { sql(test, `UPDATE layers SET sealed = 1 WHERE id = ${test.layer(clone).id}`); },
  },
  {
    what: 'a disk has no layer', kind: 'database', verdict: 'corruption',
    damage: ({ test, clone }) => { sql(test, `UPDATE nodes SET layer_id = NULL WHERE id = ${clone.id}`); },
  },
  {
    what: 'a disk has a size that cannot be', kind: 'row-unreadable', verdict: 'corruption',
    damage: ({ test, clone }) => { sql(test, `UPDATE nodes SET size_bytes = ${2 ** 50} WHERE id = ${clone.id}`); },
  },
  {
    what: 'an index does not agree with its table', kind: 'database', verdict: 'corruption',
    damage: ({ test }) => {
      sql(test, 'PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, \'nodes(layer_id)\', \'nodes(size_bytes)\') WHERE name = \'nodes_by_layer\'; PRAGMA schema_version = 100');
    },
  },
  {
    what: 'a name lies in a disk', kind: 'names', verdict: 'corruption',
    damage: ({ test, image, clone }) => { sql(test, `UPDATE nodes SET parent_id = ${image.id} WHERE id = ${clone.id}`); },
  },
  {
    what: 'directories run in a circle', kind: 'names', verdict: 'corruption',
    damage: ({ test }) => {
      const [one, other] = ['one', 'other'].map((name) => directory(test, name));
      sql(test, `UPDATE nodes SET parent_id = ${other ?? 0} WHERE id = ${one ?? 0}`, `UPDATE nodes SET parent_id = ${one ?? 0} WHERE id = ${other ?? 0}`);
    },
  },
  {
    what: 'a data file without a layer', kind: 'stray-layer-file', verdict: 'leaks',
    damage: (bed) => { fs.writeFileSync(fileOf(bed, 4711), 'left'); },
  },
  {
    what: 'what is left of an import', kind: 'stray-import', verdict: 'leaks',
    damage: ({ test }) => { fs.writeFileSync(path.join(test.storeDir, 'import', '17.raw'), 'left'); },
  },
  {
    what: 'a layer that nothing reads through', kind: 'unreferenced-layer', verdict: 'leaks',
    damage: ({ test }) => { test.store.files.create(test.store.meta.layers.insert({ kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: 4096, sealed: false, complete: true, createdUs: 1 }).id, 4096); },
  },
  {
    what: 'a node without a name that nobody has open', kind: 'orphan-node', verdict: 'leaks',
    damage: ({ test, unopened }) => { test.store.meta.nodes.orphan(unopened.id); },
  },
  {
    what: 'a fill of a disk that is gone', kind: 'dangling-job', verdict: 'leaks',
    damage: ({ test }) => {
      test.store.meta.jobs.insert({ kind: 'fill', nodeId: 999, state: 'running', parameters: {}, progressDone: 0, progressTotal: 0, message: null, createdUs: 1, updatedUs: 1 });
    },
  },
];

function directory(test: TestStore, name: string): number {
  return test.store.meta.nodes.insert({
    parentId: ROOT_ID, name, kind: 'directory', mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 1, mtimeUs: 1, ctimeUs: 1, layerId: null, linkTarget: null,
    copyOnRead: false, fault: null,
  }).id;
}

describe('a check of a sound store', () => {
  it('finds nothing, whatever was done in it', async () => {
    const { test, image, clone } = await makeBed();
    test.inPlace('placed', patterned(2, 65536));
    test.clone(clone, 'of-clone');
    test.store.resize(image.id, BLOCK_BYTES);
    test.store.resize(image.id, 4 * MIB);
    directory(test, 'directory');
    test.store.meta.nodes.orphan(test.acquire(test.clone(clone, 'open')).nodeId);
    test.store.meta.jobs.insert({ kind: 'fill', nodeId: 999, state: 'completed', parameters: {}, progressDone: 0, progressTotal: 0, message: null, createdUs: 1, updatedUs: 1 });
    expect(checkStore(test.store)).toEqual({ verdict: 'clean', findings: [], faulted: [] });
  });

  it('says which disks are faulted, and calls that neither a leak nor corruption', async () => {
    const { test, clone } = await makeBed();
    test.store.meta.nodes.update(clone.id, { fault: 'a test' });
    expect(checkStore(test.store)).toEqual({ verdict: 'clean', findings: [], faulted: [{ nodeId: clone.id, path: 'clone', reason: 'a test' }] });
  });

  it('takes the temporary file of an import that runs for what it is', async () => {
    const { test } = await makeBed();
    const job = test.store.meta.jobs.insert({ kind: 'import', nodeId: null, state: 'running', parameters: {}, progressDone: 0, progressTotal: 0, message: null, createdUs: 1, updatedUs: 1 });
    const file = path.join(test.storeDir, 'import', `${job.id}.raw`);
    fs.writeFileSync(file, 'half');
    expect(checkStore(test.store, { repair: true }).verdict).toBe('clean');
    expect(fs.existsSync(file)).toBe(true);
  });
});

describe('a check of a store in which', () => {
  it.each(damages)('$what: $verdict ($kind)', async ({ damage, kind, verdict, disks }) => {
    const bed = await makeBed();
    expect(checkStore(bed.test.store).findings).toEqual([]);
    damage(bed);
    const report = checkStore(bed.test.store);
    expect(report.verdict).toBe(verdict);
    const found = report.findings.filter((finding) => finding.kind === kind);
    expect(found).not.toEqual([]);
    expect(found.every((finding) => finding.severity === (verdict === 'leaks' ? 'leak' : 'corruption'))).toBe(true);
    if (disks !== undefined) expect([...(found[0]?.disks ?? [])].sort()).toEqual(disks);
  });
});

describe('a repair', () => {
  it.each(damages.filter((row) => row.verdict === 'leaks'))('takes away $what', async ({ damage }) => {
    const bed = await makeBed();
    damage(bed);
    const report = checkStore(bed.test.store, { repair: true });
    expect(report.findings).not.toEqual([]);
    expect(report.findings.filter((finding) => finding.severity !== 'leak' || finding.repaired !== true)).toEqual([]);
    expect(report.verdict).toBe('clean');
    expect(checkStore(bed.test.store)).toEqual({ verdict: 'clean', findings: [], faulted: [] });
  });

  it('leaves alone what Offshoot did not make, and says so', async () => {
    const { test } = await makeBed();
    const file = path.join(test.storeDir, 'layers', '00', 'notes.txt');
    fs.writeFileSync(file, 'mine');
    expect(checkStore(test.store, { repair: true })).toMatchObject({ verdict: 'leaks', findings: [{ kind: 'stray-file', file }] });
    expect(fs.readFileSync(file, 'utf8')).toBe('mine');
  });

  it('leaves copies of data files alone that lie where Offshoot puts none: they may be on their way back from a backup', async () => {
    const bed = await makeBed();
    const layers = path.join(bed.test.storeDir, 'layers');
    const copies = [path.join(layers, 'ee', `${sealedOf(bed)}.layer`), path.join(layers, '12.layer'), path.join(layers, '0c', '0012.layer')];
    for (const copy of copies) fs.copyFileSync(fileOf(bed, sealedOf(bed)), copy);
    const directory = fileOf(bed, 4711);
    fs.mkdirSync(directory);
    const report = checkStore(bed.test.store, { repair: true });
    expect(report.verdict).toBe('leaks');
    expect(report.findings.map(({ kind, file }) => [kind, file]).sort()).toEqual([...copies, directory].map((file) => ['stray-file', file]).sort());
    for (const file of [...copies, directory]) expect(fs.existsSync(file)).toBe(true);
  });

  it('goes on when something cannot be taken away, and says that it is still there', async () => {
    const bed = await makeBed();
    const [first, second] = [fileOf(bed, 4711), fileOf(bed, 4712)];
    for (const file of [first, second]) fs.writeFileSync(file, 'left');
    // A mount point cannot be removed.
    await mustRun('mount', ['--bind', first, first]);
    try {
      const { verdict, findings } = checkStore(bed.test.store, { repair: true });
      expect(verdict).toBe('leaks');
      expect(findings).toMatchObject([{ kind: 'stray-layer-file', file: first, repaired: false }, { kind: 'stray-layer-file', file: second, repaired: true }]);
    } finally {
      await mustRun('umount', [first]);
    }
    expect(checkStore(bed.test.store, { repair: true }).verdict).toBe('clean');
  });

  it('closes a nameless disk that nobody uses before it takes it away, so that what it had not committed goes with it', async () => {
    const { test, clone } = await makeBed();
    test.acquire(clone);
    test.write(clone, 20 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 7));
    test.store.disks.release(clone.id);
    test.store.meta.nodes.orphan(clone.id);
    expect(checkStore(test.store, { repair: true }).verdict).toBe('clean');
    expect(test.store.disks.get(clone.id)).toBeUndefined();
    await test.store.committer.commitAll();
    expect(checkStore(test.store)).toEqual({ verdict: 'clean', findings: [], faulted: [] });
  });

  it('changes nothing that is corrupt', async () => {
    const bed = await makeBed();
    fs.truncateSync(fileOf(bed, sealedOf(bed)), 1);
    expect(checkStore(bed.test.store, { repair: true }).verdict).toBe('corruption');
    expect(fs.statSync(fileOf(bed, sealedOf(bed))).size).toBe(1);
    expect(checkStore(bed.test.store).findings).toMatchObject([{ kind: 'layer-file-short' }]);
  });
});
