import { spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import Database from 'better-sqlite3';
import { describe, expect, it } from 'vitest';
import type { ErrorKind } from '../../blockstore/errors.js';
import { MetaStore } from '../../blockstore/meta/meta-store.js';
import { APPLICATION_ID, SCHEMA_VERSION } from '../../blockstore/meta/migrations.js';
import { assertSqliteVersion, openDatabase } from '../../blockstore/meta/open-database.js';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { addNode, databasePath, expectError, openStore } from '../support/meta-store-fixture.js';

/** The bytes of the database and of its log; none is as good as empty. */
function bytesOf(path: string): string[] {
  return [path, `${path}-wal`].map((file) => (existsSync(file) && statSync(file).isFile() ? readFileSync(file, 'latin1') : ''));
}

function expectRefusal(path: string, kind: ErrorKind, message: RegExp): void {
  const before = bytesOf(path);
  expect(expectError(kind, () => MetaStore.open(path)).message).toMatch(message);
  expect(bytesOf(path)).toEqual(before);
}

/** A closed database with a few hundred nodes in it. */
function populatedDatabase(): string {
  const path = databasePath();
  const store = openStore(path);
  store.transaction(() => {
    for (let index = 0; index < 500; index += 1) addNode(store, `container-${index}`);
  });
  store.close();
  return path;
}

describe('opening a metadata store', () => {
  it('makes a store with a root directory, and finds it again', () => {
    const path = databasePath();
    const store = openStore(path);
    expect(store.nodes.byId(ROOT_ID)).toMatchObject({ id: ROOT_ID, parentId: null, kind: 'directory', mode: 0o755, uid: 0, gid: 0 });
    const made = addNode(store, 'vms');
    store.close();
    expect(openStore(path).nodes.child(ROOT_ID, 'vms')).toEqual(made);
  });

  it('sets what durability rests on, and its marks', () => {
    const database = openDatabase(databasePath());
    const setting = (name: string): unknown => database.pragma(name, { simple: true });
    expect(setting('journal_mode')).toBe('wal');
    expect(setting('synchronous')).toBe(2);
    expect(setting('foreign_keys')).toBe(1);
    expect(setting('secure_delete')).toBe(1);
    expect(setting('wal_autocheckpoint')).toBe(0);
    expect(setting('application_id')).toBe(APPLICATION_ID);
    expect(setting('user_version')).toBe(SCHEMA_VERSION);
    database.close();
  });

  it('starts again from what a process killed while making the store leaves', () => {
    const empty = databasePath();
    writeFileSync(empty, '');
    openStore(empty);
    const headerOnly = databasePath();
    const database = new Database(headerOnly);
    database.pragma('journal_mode = WAL');
    database.close();
    expect(statSync(headerOnly).size).toBeGreaterThan(0);
    expect(openStore(headerOnly).nodes.byId(ROOT_ID)).toBeDefined();
  });

  it('starts again from a database that was half made before its log was on', () => {
    const path = databasePath();
    const database = new Database(path);
    database.pragma('cache_size = 1');
    database.exec('BEGIN; CREATE TABLE layers (x)');
    for (let row = 0; row < 50; row += 1) database.prepare('INSERT INTO layers VALUES (?)').run('x'.repeat(2000));
    const copy = databasePath();
    copyFileSync(path, copy);
    copyFileSync(`${path}-journal`, `${copy}-journal`);
    database.close();
    expect(statSync(copy).size).toBeGreaterThan(0);
    expect(openStore(copy).nodes.byId(ROOT_ID)).toBeDefined();
  });

  it('opens what a killed process leaves: database and log as they were, without closing', () => {
    const path = databasePath();
    const store = openStore(path);
    addNode(store, 'before');
    store.checkpoint();
    addNode(store, 'after');
    const copy = databasePath();
    copyFileSync(path, copy);
    copyFileSync(`${path}-wal`, `${copy}-wal`);
    expect(openStore(copy).nodes.child(ROOT_ID, 'before')).toBeDefined();
    expect(openStore(copy).nodes.child(ROOT_ID, 'after')).toBeDefined();
  });

  it('finds whole transactions only when the log is cut anywhere', () => {
    const path = databasePath();
    const store = openStore(path);
    const names = ['a', 'b', 'c', 'd', 'e', 'f'];
    for (const name of names) {
      store.transaction(() => {
        addNode(store, `${name}1`);
        addNode(store, `${name}2`);
      });
    }
    const walBytes = statSync(`${path}-wal`).size;
    for (let lengthBytes = walBytes; lengthBytes > 0; lengthBytes -= 1777) {
      const copy = databasePath();
      copyFileSync(path, copy);
      copyFileSync(`${path}-wal`, `${copy}-wal`);
      truncateSync(`${copy}-wal`, lengthBytes);
      const reopened = openStore(copy);
      const found = reopened.nodes.children(ROOT_ID, 0, 100).map((node) => node.name);
      expect(found.length % 2).toBe(0);
      expect(found).toEqual(names.flatMap((name) => [`${name}1`, `${name}2`]).slice(0, found.length));
      reopened.close();
    }
  });

  it('empties the log in an idle checkpoint', () => {
    const path = databasePath();
    const store = openStore(path);
    addNode(store, 'vms');
    expect(statSync(`${path}-wal`).size).toBeGreaterThan(0);
    store.checkpoint({ idle: true });
    expect(statSync(`${path}-wal`).size).toBe(0);
    expect(store.nodes.child(ROOT_ID, 'vms')).toBeDefined();
  });

  it('has room for the index of a long log before anything is committed, and SQLite keeps it', () => {
    const path = databasePath();
    const store = openStore(path);
    const taken = (): readonly number[] => { const { size, blocks } = statSync(`${path}-shm`); return [size, blocks * 512]; };
    const [size, allocated] = taken();
    expect(size).toBe(1024 * 1024);
    expect(allocated).toBeGreaterThanOrEqual(1024 * 1024);
    // More than 4096 frames: the first length that SQLite gives it is not enough for the log.
    for (let at = 0; at < 1500; at += 1) addNode(store, `n${at}`);
    expect(statSync(`${path}-wal`).size).toBeGreaterThan(5000 * 4096);
    expect(taken()).toEqual([size, allocated]);
    store.checkpoint({ idle: true });
    // Its locks are still held: or the next process to look would take itself for the first, and cut the index.
    const look = "const D = require('better-sqlite3'); const d = new D(process.argv[1], { readonly: true }); console.log(d.prepare('SELECT count(*) FROM nodes').pluck().get()); process.kill(process.pid, 'SIGKILL');";
    expect(spawnSync(process.execPath, ['-e', look, path], { encoding: 'utf8', cwd: import.meta.dirname })).toMatchObject({ stdout: '1501\n', signal: 'SIGKILL' });
    expect(taken()).toEqual([size, allocated]);
    addNode(store, 'last');
    store.close();
    expect(existsSync(`${path}-shm`)).toBe(false);
  });

  it('survives being closed twice', () => {
    const store = openStore();
    store.close();
    store.close();
  });
});

describe('refusing a database', () => {
  it('refuses garbage', () => {
    const path = databasePath();
    writeFileSync(path, Buffer.alloc(8192, 'garbage '));
    expectRefusal(path, 'store-damaged', /restore offshoot\.db from a backup/);
  });

  it('refuses a few bytes', () => {
    const path = databasePath();
    writeFileSync(path, 'SQLite');
    expectRefusal(path, 'store-damaged', /restore offshoot\.db from a backup/);
  });

  it.each([100, 1000, 4096, 8192, 20_000])('refuses a database cut to %i bytes', (lengthBytes) => {
    const path = populatedDatabase();
    expect(statSync(path).size).toBeGreaterThan(lengthBytes);
    truncateSync(path, lengthBytes);
    expectRefusal(path, 'store-damaged', /restore offshoot\.db from a backup/);
  });

  it('refuses a page overwritten with garbage', () => {
    const path = populatedDatabase();
    const bytes = readFileSync(path);
    const page = bytes.indexOf('container-250');
    bytes.fill(0xa5, page - (page % 4096), page - (page % 4096) + 4096);
    writeFileSync(path, bytes);
    expectRefusal(path, 'store-damaged', /restore offshoot\.db from a backup/);
  });

  it('refuses the database of another program, and does not touch it', () => {
    const path = databasePath();
    const other = new Database(path);
    other.exec('CREATE TABLE theirs (x)');
    other.close();
    expectRefusal(path, 'store-damaged', /some other program.*name another store directory/);
    expect(readdirSync(dirname(path))).toEqual(['offshoot.db']);
  });

  it('refuses another application id', () => {
    const path = populatedDatabase();
    const database = new Database(path);
    database.pragma('application_id = 1234');
    database.close();
    expectRefusal(path, 'store-damaged', /application id 1234/);
  });

  it('refuses a newer version', () => {
    const path = populatedDatabase();
    const database = new Database(path);
    database.pragma(`user_version = ${SCHEMA_VERSION + 1}`);
    database.close();
    expectRefusal(path, 'store-version', new RegExp(`newer Offshoot \\(format ${SCHEMA_VERSION + 1}; this one knows formats up to ${SCHEMA_VERSION}\\)`, 'u'));
  });

  it.each([
    ['newer', SCHEMA_VERSION + 1, 'store-version', /newer Offshoot/],
    ['damaged', SCHEMA_VERSION, 'store-damaged', /restore offshoot\.db from a backup/],
  ] as const)('leaves the log of a %s store alone', (what, version, kind, message) => {
    const path = populatedDatabase();
    const writer = new Database(path);
    writer.pragma('wal_autocheckpoint = 0');
    writer.exec(`PRAGMA user_version = ${version}; UPDATE nodes SET fault = 'changed' WHERE id = 2`);
    const copy = databasePath();
    copyFileSync(path, copy);
    copyFileSync(`${path}-wal`, `${copy}-wal`);
    writer.close();
    if (what === 'damaged') writeFileSync(copy, readFileSync(copy).fill('x', 4096));
    expect(statSync(`${copy}-wal`).size).toBeGreaterThan(4096);
    expectRefusal(copy, kind, message);
  });

  it.each([
    ['a table that is gone', 'DROP TABLE jobs', /"jobs"/],
    ['an index that is gone', 'DROP INDEX layers_by_backing', /layers_by_backing/],
    ['a table of another shape', 'ALTER TABLE layers ADD COLUMN colour TEXT', /"layers"/],
    ['a row that refers to nothing', "INSERT INTO ownership VALUES (99, 0, 1, 2048, NULL)", /refer to nothing.*ownership/],
    ['a root that is gone', 'DELETE FROM nodes', /no root directory/],
    ['a row that breaks a rule of its table', 'PRAGMA ignore_check_constraints = ON; UPDATE nodes SET mode = 70000 WHERE id = 2', /CHECK constraint/],
  ])('refuses %s', (_what, sql, message) => {
    const path = populatedDatabase();
    const database = new Database(path);
    database.pragma('foreign_keys = OFF');
    database.exec(sql);
    database.close();
    expectRefusal(path, 'store-damaged', message);
  });

  it('leaves what an operator added', () => {
    const path = populatedDatabase();
    const database = new Database(path);
    database.exec('CREATE INDEX mine ON nodes(uid); ANALYZE');
    database.close();
    expect(openStore(path).nodes.childCount(ROOT_ID)).toBe(500);
  });

  it('refuses to start anew where data files of layers lie', () => {
    const path = databasePath();
    mkdirSync(join(dirname(path), 'layers', '07'), { recursive: true });
    writeFileSync(join(dirname(path), 'layers', '07', '7.layer'), 'x');
    expectRefusal(path, 'store-damaged', /missing or empty.*data files/);
    expect(existsSync(path)).toBe(false);
    writeFileSync(path, '');
    expectRefusal(path, 'store-damaged', /missing or empty.*data files/);
  });

  it('refuses an empty database beside a log that holds changes, and keeps the log', () => {
    const path = databasePath();
    const store = openStore(path);
    addNode(store, 'vms');
    const copy = databasePath();
    copyFileSync(`${path}-wal`, `${copy}-wal`);
    writeFileSync(copy, '');
    expectRefusal(copy, 'store-damaged', /write-ahead log holds changes/);
    expect(statSync(`${copy}-wal`).size).toBe(statSync(`${path}-wal`).size);
  });

  it('refuses a directory in place of the database, and a store that does not exist', () => {
    const path = databasePath();
    mkdirSync(path);
    expectRefusal(path, 'store-damaged', /not a regular file/);
    expectRefusal(join(path, 'nowhere', 'offshoot.db'), 'not-found', /does not exist: create it/);
  });

  it('refuses an SQLite that can lose commits', () => {
    expect(() => { assertSqliteVersion('3.51.3'); }).not.toThrow();
    expect(() => { assertSqliteVersion('3.52.0'); }).not.toThrow();
    expect(() => { assertSqliteVersion('4.0.0'); }).not.toThrow();
    expectError('not-supported', () => { assertSqliteVersion('3.51.2'); });
    expectError('not-supported', () => { assertSqliteVersion('3.9.99'); });
    expect(openStore().sqliteVersion).toMatch(/^3\.\d+\.\d+/);
  });
});
