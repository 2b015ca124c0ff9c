/**
 * Stores of every version there ever was, and a version that there is not yet, for the migrations to be cut at.
 *
 * Version 1 is the oldest with rows in it, and every later one can be made by its migrations; what is put in is what a store of
 * that version held: a complete disk, and a clone of it that owns some blocks.
 */
import fs from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';

import { syncDirectory } from '../../../blockstore/layer-files.js';
import { MIGRATIONS, migrate, type Migration } from '../../../blockstore/meta/migrations.js';
import { contentOf, type Marker } from './window.js';

const BLOCK_BYTES = 4096;
const BLOCKS = 32;
const OWNED_FROM = 5;
const OWNED_BLOCKS = 9;
const BASE_SEED = 21;
const CLONE_SEED = 22;
/** So many that the step takes many pages of the log. */
export const NOTES_PER_LAYER = 90;

/** A version that adds a table and changes all rows of another: what migrations do. */
export const ONE_STEP_MORE: readonly Migration[] = [...MIGRATIONS, {
  version: MIGRATIONS.length + 1,
  apply: (database) => {
    database.exec(`CREATE TABLE power_notes (id INTEGER PRIMARY KEY, layer_id INTEGER NOT NULL, note TEXT NOT NULL) STRICT;
      WITH RECURSIVE times(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM times WHERE n < ${NOTES_PER_LAYER})
        INSERT INTO power_notes (layer_id, note) SELECT id, hex(zeroblob(500)) || n FROM layers, times;
      ALTER TABLE nodes ADD COLUMN power_mark INTEGER;
      UPDATE nodes SET power_mark = id * 2;`);
  },
}];

export function openRaw(storeDir: string): Database.Database {
  const database = new Database(path.join(storeDir, 'offshoot.db'));
  for (const setting of ['journal_mode = WAL', 'synchronous = FULL', 'foreign_keys = ON', 'secure_delete = ON', 'wal_autocheckpoint = 0']) database.pragma(setting);
  return database;
}

/** Makes a store of version `version`, at least 1, and ends without a word, as a process that is killed. */
export function makeOlderStore(storeDir: string, version: number, markerFile: string): void {
  const markers = fs.openSync(markerFile, 'w');
  const say = (marker: Marker): void => { fs.writeSync(markers, JSON.stringify(marker)); };
  const database = openRaw(storeDir);
  syncDirectory(storeDir);
  migrate(database, MIGRATIONS.slice(0, version));
  const sizeBytes = BLOCKS * BLOCK_BYTES;
  const own = contentOf(sizeBytes, CLONE_SEED, 0).subarray(OWNED_FROM * BLOCK_BYTES, (OWNED_FROM + OWNED_BLOCKS) * BLOCK_BYTES);
  writeLayer(storeDir, 1, contentOf(sizeBytes, BASE_SEED, 3), 0, sizeBytes);
  writeLayer(storeDir, 2, own, OWNED_FROM * BLOCK_BYTES, sizeBytes);
  say({ op: 'create', phase: 'begin', disk: 'base', sizeBytes, seed: BASE_SEED, holes: 3 });
  say({ op: 'create', phase: 'begin', disk: 'clone', sizeBytes, seed: BASE_SEED, holes: 3 });
  say({ op: 'write', phase: 'begin', disk: 'clone', at: OWNED_FROM * BLOCK_BYTES, length: own.length, seed: CLONE_SEED });
  const bitmap = Buffer.alloc(256);
  for (let block = OWNED_FROM; block < OWNED_FROM + OWNED_BLOCKS; block += 1) bitmap[Math.floor(block / 8)]! |= 2 ** (block % 8);
  database.transaction(() => {
    const layer = database.prepare('INSERT INTO layers (id, kind, backing_id, size_bytes, sealed, complete, created_us) VALUES (?, \'store\', ?, ?, ?, ?, 0)');
    layer.run(1, null, sizeBytes, 1, 1);
    layer.run(2, 1, sizeBytes, 0, 0);
    layer.run(3, 1, sizeBytes, 0, 0);
    const node = database.prepare(`INSERT INTO nodes (parent_id, name, kind, mode, uid, gid, size_bytes, atime_us, mtime_us, ctime_us, created_us, generation, layer_id, copy_on_read)
      VALUES (1, ?, 'disk', 384, 0, 0, ?, 0, 0, 0, 0, ?, ?, 0)`);
    node.run('base', sizeBytes, 7, 3);
    node.run('clone', sizeBytes, 8, 2);
    database.prepare('INSERT INTO ownership (layer_id, first_page, page_count, owned_blocks, bitmap) VALUES (2, 0, 1, ?, ?)').run(OWNED_BLOCKS, bitmap);
  }).immediate();
  say({ op: 'create', phase: 'end', disk: 'base', sizeBytes, seed: BASE_SEED, holes: 3 });
  say({ op: 'create', phase: 'end', disk: 'clone', sizeBytes, seed: BASE_SEED, holes: 3 });
  say({ op: 'write', phase: 'end', disk: 'clone', at: OWNED_FROM * BLOCK_BYTES, length: own.length, seed: CLONE_SEED });
  say({ op: 'flush', phase: 'begin', id: 1, disks: ['clone'] });
  say({ op: 'flush', phase: 'end', id: 1, disks: ['clone'] });
}

export function migrateOneStepMore(storeDir: string): void {
  migrate(openRaw(storeDir), ONE_STEP_MORE);
}

function writeLayer(storeDir: string, layerId: number, content: Buffer, offsetBytes: number, sizeBytes: number): void {
  const layers = path.join(storeDir, 'layers');
  const directory = path.join(layers, layerId.toString(16).padStart(2, '0'));
  fs.mkdirSync(directory, { recursive: true });
  const fd = fs.openSync(path.join(directory, `${layerId}.layer`), 'w', 0o600);
  fs.ftruncateSync(fd, sizeBytes);
  fs.writeSync(fd, content, 0, content.length, offsetBytes);
  fs.fsyncSync(fd);
  fs.closeSync(fd);
  for (const parent of [directory, layers, storeDir]) syncDirectory(parent);
}
