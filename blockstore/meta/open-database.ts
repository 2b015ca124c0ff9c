/**
 * Opens or makes the store's database file, or refuses it with a sentence that says what to do. Main thread only.
 *
 * Order, and why it is this one: nothing may be changed in a file that is not ours, newer than we are, or damaged; so
 * the questions that only read come first, then the settings, then the migrations. Killed anywhere in here, the next
 * open finds either nothing worth keeping (an empty file, or one with SQLite's header and no tables, and no data
 * files in the store) and starts again, or a whole version of the schema and goes on from it.
 */
import { closeSync, existsSync, fsyncSync, openSync, readdirSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import Database from 'better-sqlite3';
import { OffshootError } from '../errors.js';
import { APPLICATION_ID, migrate, refuseNewer, schemaVersionOf } from './migrations.js';
import { translateSqlError } from './sql-connection.js';

/** Older ones can lose a WAL that is reset while a checkpoint of another connection runs. */
const SQLITE_VERSION_MIN = [3, 51, 3] as const;

/** How long to wait for another program's lock (a backup, somebody looking), before the error `busy`. */
const LOCK_WAIT_MS = 5000;

/** Settings that promises rest on: set, then read back, for SQLite ignores what it does not know. */
const SETTINGS: readonly (readonly [name: string, value: string, readBack: number | string])[] = [
  ['journal_mode', 'WAL', 'wal'],
  ['synchronous', 'FULL', 2],
  ['foreign_keys', 'ON', 1],
  ['secure_delete', 'ON', 1],
  // Checkpoints come from a timer, so that none of them makes a flush wait.
  ['wal_autocheckpoint', '0', 0],
  // A log that grew (somebody read for long) is cut back to this when it is begun anew.
  ['journal_size_limit', '67108864', 67_108_864],
  // A read error behind a memory map would be a signal and not an error.
  ['mmap_size', '0', 0],
  ['trusted_schema', 'OFF', 0],
  ['cell_size_check', 'ON', 1],
  ['temp_store', 'MEMORY', 2],
];

/** The database, ready for use: ours, whole, at the newest version, with its settings in force. */
export function openDatabase(path: string): Database.Database {
  refuseWhatIsNotAFile(path);
  const isNewFile = sizeOrNull(path) === null;
  let guard: Database.Database | undefined;
  let database: Database.Database | undefined;
  try {
    if ((sizeOrNull(path) ?? 0) === 0) refuseLostDatabase(path);
    else guard = openGuard(path);
    database = new Database(path, { timeout: LOCK_WAIT_MS });
    assertSqliteVersion(sqliteVersionOf(database));
    if (isEmptyDatabase(database)) refuseLostDatabase(path);
    else {
      refuseForeign(database, path);
      refuseNewer(schemaVersionOf(database));
      refuseDamaged(database, path);
    }
    applySettings(database);
    migrate(database);
    refuseOtherSchema(database, path);
    refuseRootless(database, path);
    if (isNewFile) flushDirectoryOf(path);
    return database;
  } catch (thrown) {
    database?.close();
    throw refusal(thrown, path);
  } finally {
    guard?.close();
  }
}

/**
 * Closing the last connection moves the log into the file and deletes it, unless that connection cannot write: held
 * open around everything else, and closed last, this one keeps a refused database and its log as they were found. A
 * rollback journal, which an Offshoot database has only while it is made, needs a writer first: then there is none.
 */
function openGuard(path: string): Database.Database | undefined {
  const guard = new Database(path, { readonly: true, timeout: LOCK_WAIT_MS });
  try {
    schemaVersionOf(guard);
    return guard;
  } catch (thrown) {
    guard.close();
    if (thrown instanceof Database.SqliteError && thrown.code === 'SQLITE_READONLY_ROLLBACK') return undefined;
    throw thrown;
  }
}

export function sqliteVersionOf(database: Database.Database): string {
  return database.prepare<[], string>('SELECT sqlite_version()').pluck().get() ?? '';
}

export function assertSqliteVersion(version: string): void {
  const parts = version.split('.').map(Number);
  for (const [index, least] of SQLITE_VERSION_MIN.entries()) {
    const part = parts[index] ?? 0;
    if (part > least) return;
    if (part < least) {
      const wanted = SQLITE_VERSION_MIN.join('.');
      throw new OffshootError(
        'not-supported',
        `this build of better-sqlite3 holds SQLite ${version}, and ${wanted} or newer is needed (older ones can lose committed changes): install the packages again with npm ci`,
        { sqliteVersion: version },
      );
    }
  }
}

function sizeOrNull(path: string): number | null {
  return statSync(path, { throwIfNoEntry: false })?.size ?? null;
}

function refuseWhatIsNotAFile(path: string): void {
  const directory = dirname(path);
  if (!existsSync(directory)) {
    throw new OffshootError('not-found', `the store directory ${directory} does not exist: create it, or name another one`, { path });
  }
  const stats = statSync(path, { throwIfNoEntry: false });
  if (stats !== undefined && !stats.isFile()) {
    throw new OffshootError('store-damaged', `${path} is not a regular file: move it away, or restore the database from a backup`, { path });
  }
}

/**
 * A database without content may be a new store, or one whose database was lost. Where data files lie beside it, it
 * was lost, and starting anew would give their ids out a second time. Asked before SQLite sees an empty file, because
 * it deletes the WAL of one.
 */
function refuseLostDatabase(path: string): void {
  if ((sizeOrNull(path) ?? 0) === 0 && (sizeOrNull(`${path}-wal`) ?? 0) > 0) {
    throw damaged(path, 'is missing or empty, although its write-ahead log holds changes');
  }
  if (hasDataFiles(join(dirname(path), 'layers'))) {
    throw damaged(path, 'is missing or empty, although the store holds the data files of layers');
  }
}

function hasDataFiles(layersDirectory: string): boolean {
  if (!existsSync(layersDirectory)) return false;
  return readdirSync(layersDirectory, { recursive: true, encoding: 'utf8' }).some((name) => name.endsWith('.layer'));
}

function isEmptyDatabase(database: Database.Database): boolean {
  const objects = database.prepare<[], number>('SELECT count(*) FROM sqlite_schema').pluck().get();
  return objects === 0 && schemaVersionOf(database) === 0 && applicationIdOf(database) === 0;
}

function applicationIdOf(database: Database.Database): number {
  return database.pragma('application_id', { simple: true }) as number;
}

function refuseForeign(database: Database.Database, path: string): void {
  const applicationId = applicationIdOf(database);
  if (applicationId === APPLICATION_ID) return;
  throw new OffshootError(
    'store-damaged',
    `${path} is the database of some other program (application id ${applicationId}): name another store directory, or restore the store's own offshoot.db from a backup`,
    { path, applicationId },
  );
}

function refuseDamaged(database: Database.Database, path: string): void {
  const verdict = String(database.pragma('quick_check(1)', { simple: true }));
  if (verdict !== 'ok') throw damaged(path, `fails SQLite's check (${verdict})`);
  const dangling = database.pragma('foreign_key_check') as readonly { readonly table: string }[];
  const first = dangling[0];
  if (first !== undefined) throw damaged(path, `has ${dangling.length} row(s) that refer to nothing, the first in table ${first.table}`);
}

function applySettings(database: Database.Database): void {
  for (const [name, value, readBack] of SETTINGS) {
    database.pragma(`${name} = ${value}`);
    const actual: unknown = database.pragma(name, { simple: true });
    // Builds without memory maps answer nothing to mmap_size, and have none.
    if (actual !== readBack && !(name === 'mmap_size' && actual === undefined)) {
      throw new OffshootError(
        'not-supported',
        `SQLite did not take the setting ${name} = ${value} (it is ${String(actual)}): keep the store on a local file system (ext4, XFS, btrfs), not on a network or overlay one`,
        { setting: name },
      );
    }
  }
}

/** Every table and index must be there, exactly as the migrations make it. What an operator added stays. */
function refuseOtherSchema(database: Database.Database, path: string): void {
  const model = new Database(':memory:');
  try {
    migrate(model);
    const actual = schemaObjects(database);
    for (const [name, sql] of schemaObjects(model)) {
      if (actual.get(name) !== sql) throw damaged(path, `does not have "${name}" as its version describes it`);
    }
  } finally {
    model.close();
  }
}

function schemaObjects(database: Database.Database): ReadonlyMap<string, string | null> {
  const rows = database
    .prepare<[], { name: string; sql: string | null }>("SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'")
    .all();
  return new Map(rows.map(({ name, sql }) => [name, sql]));
}

/** The root directory is the one row that everything else hangs from. */
function refuseRootless(database: Database.Database, path: string): void {
  const roots = database.prepare<[], number>('SELECT count(*) FROM nodes WHERE id = 1').pluck().get();
  if (roots !== 1) throw damaged(path, 'has no root directory');
}

/** SQLite flushes the directory when it makes the WAL; this covers a database that never needed one. */
function flushDirectoryOf(path: string): void {
  const directory = openSync(dirname(path), 'r');
  try {
    fsyncSync(directory);
  } finally {
    closeSync(directory);
  }
}

function damaged(path: string, what: string, cause?: unknown): OffshootError {
  return new OffshootError(
    'store-damaged',
    `the database ${path} ${what}: nothing was changed; restore offshoot.db from a backup, or move the store away and start an empty one`,
    { path },
    cause,
  );
}

function refusal(thrown: unknown, path: string): unknown {
  if (thrown instanceof OffshootError) return thrown;
  const translated = translateSqlError(thrown);
  if (translated instanceof OffshootError && translated.kind === 'store-damaged') {
    return damaged(path, `is damaged (${(thrown as Error).message})`, thrown);
  }
  if (translated !== thrown) return translated;
  if (!(thrown instanceof Database.SqliteError)) return thrown;
  if (thrown.code.startsWith('SQLITE_CANTOPEN') || thrown.code.startsWith('SQLITE_PERM') || thrown.code.startsWith('SQLITE_AUTH')) {
    return new OffshootError('permission-denied', `the database ${path} could not be opened: check its permissions and those of its directory`, { path }, thrown);
  }
  // A migration met tables of another shape than the version says.
  return damaged(path, `does not have the tables of its version (${thrown.message})`, thrown);
}
