/**
 * The one door to SQLite: statements, transactions, and what SQLite's errors mean here. Main thread only, synchronous.
 *
 * Promises: a transaction is all or nothing, however its body ends; a nested one is too, and becomes durable with the
 * outer one only; an error that leaves doubt about what is on disk (a failed write, a failed fsync, a damaged page)
 * is never followed by another write through the same connection, for a second fsync would succeed although the
 * first one's pages are gone. Whoever sees such an error ends the process; the next one opens the store again and
 * finds what SQLite's recovery finds.
 *
 * Left out: retries, and asynchronous work within a transaction (refused: other work would slip into it).
 */
import Database from 'better-sqlite3';
import { OffshootError } from '../errors.js';

export type SqlValue = number | string | null | Uint8Array;

/** Turns an error of SQLite that says how the world is into an operating error; anything else is passed on as it is. */
export function translateSqlError(thrown: unknown): unknown {
  if (!(thrown instanceof Database.SqliteError)) return thrown;
  const { code } = thrown;
  const context = { sqliteCode: code };
  if (code === 'SQLITE_FULL') {
    return new OffshootError(
      'no-space',
      "the store's file system is full, so its metadata could not be committed: free some space and try again",
      context,
      thrown,
    );
  }
  if (code.startsWith('SQLITE_IOERR')) {
    return new OffshootError(
      'io-error',
      `the store's database could not be read or written (${thrown.message}): look at the kernel's log for the device, then restart the daemon`,
      context,
      thrown,
    );
  }
  if (code.startsWith('SQLITE_CORRUPT') || code === 'SQLITE_NOTADB') {
    return new OffshootError(
      'store-damaged',
      `the store's database is damaged (${thrown.message}): stop the daemon and restore offshoot.db from a backup`,
      context,
      thrown,
    );
  }
  if (code.startsWith('SQLITE_BUSY')) {
    return new OffshootError(
      'busy',
      "another program holds a lock on the store's database: close whatever else has offshoot.db open and try again",
      context,
      thrown,
    );
  }
  if (code.startsWith('SQLITE_READONLY')) {
    return new OffshootError(
      'permission-denied',
      "the store's database cannot be written: check the permissions of the store, and that its file system is not mounted read-only",
      context,
      thrown,
    );
  }
  return thrown;
}

/** True when what is on disk is in doubt after this error. */
function leavesDoubt(error: unknown): error is OffshootError {
  return error instanceof OffshootError && (error.kind === 'io-error' || error.kind === 'store-damaged');
}

/** What follows a commit has to happen whatever goes wrong beside it: each runs, then the first error travels on. */
function runAll(callbacks: readonly (() => void)[]): void {
  const failures: unknown[] = [];
  for (const callback of callbacks) {
    try {
      callback();
    } catch (thrown) {
      failures.push(thrown);
    }
  }
  if (failures.length > 0) throw failures[0];
}

function isThenable(value: unknown): boolean {
  return typeof value === 'object' && value !== null && 'then' in value;
}

/** A statement, prepared once when its table is made. Rows come back as SQLite gives them. */
export class SqlStatement<Row> {
  readonly #connection: SqlConnection;
  readonly #statement: Database.Statement<SqlValue[], Row>;

  constructor(connection: SqlConnection, statement: Database.Statement<SqlValue[], Row>) {
    this.#connection = connection;
    this.#statement = statement;
  }

  get(...values: SqlValue[]): Row | undefined {
    try {
      return this.#statement.get(...values);
    } catch (thrown) {
      throw this.#connection.noteError(thrown);
    }
  }

  all(...values: SqlValue[]): Row[] {
    try {
      return this.#statement.all(...values);
    } catch (thrown) {
      throw this.#connection.noteError(thrown);
    }
  }

  run(...values: SqlValue[]): { readonly changes: number; readonly lastId: number } {
    this.#connection.assertWritable();
    try {
      const { changes, lastInsertRowid } = this.#statement.run(...values);
      return { changes, lastId: Number(lastInsertRowid) };
    } catch (thrown) {
      throw this.#connection.noteError(thrown);
    }
  }
}

export class SqlConnection {
  readonly #database: Database.Database;
  readonly #begin: Database.Statement;
  readonly #commit: Database.Statement;
  readonly #rollback: Database.Statement;
  readonly #nest: Database.Statement;
  readonly #unnest: Database.Statement;
  readonly #rollbackNested: Database.Statement;
  #depth = 0;
  #fault: OffshootError | undefined = undefined;
  #afterCommit: (() => void)[] = [];
  #before: (() => void) | undefined = undefined;
  #afterClose: () => void;

  /** Takes the database over: nobody else may use or close it from now on. `afterClose` runs once, when it is closed. */
  constructor(database: Database.Database, afterClose: () => void = () => undefined) {
    this.#database = database;
    this.#afterClose = afterClose;
    this.#begin = database.prepare('BEGIN IMMEDIATE');
    this.#commit = database.prepare('COMMIT');
    this.#rollback = database.prepare('ROLLBACK');
    this.#nest = database.prepare('SAVEPOINT nested');
    this.#unnest = database.prepare('RELEASE nested');
    this.#rollbackNested = database.prepare('ROLLBACK TO nested');
  }

  prepare<Row = unknown>(sql: string): SqlStatement<Row> {
    try {
      return new SqlStatement(this, this.#database.prepare<SqlValue[], Row>(sql));
    } catch (thrown) {
      throw this.noteError(thrown);
    }
  }

  /** BEGIN IMMEDIATE, body, COMMIT; ROLLBACK when the body throws. Inside another one: joins it, as a savepoint. */
  transaction<T>(body: () => T): T {
    if (this.#depth > 0) return this.#runNested(body);
    this.#before?.();
    const result = this.#runOutermost(body);
    runAll(this.#afterCommit.splice(0));
    return result;
  }

  /** Runs `callback` before each outermost transaction from now on. */
  beforeTransaction(callback: () => void): void {
    this.#before = callback;
  }

  /** Runs `callback` once the transaction around this call is durable, never if it is not; at once outside of any. */
  afterCommit(callback: () => void): void {
    if (this.#depth > 0) this.#afterCommit.push(callback);
    else callback();
  }

  /**
   * Moves what is in the WAL into the database file; `truncate` empties the WAL file as well, when nobody reads. A file that
   * could not be cut leaves no doubt: until both are on the device the WAL holds every commit, and the next checkpoint cuts.
   */
  checkpoint(mode: 'passive' | 'truncate'): void {
    this.assertWritable();
    try {
      this.#database.pragma(mode === 'truncate' ? 'wal_checkpoint(TRUNCATE)' : 'wal_checkpoint(PASSIVE)');
    } catch (thrown) {
      if (thrown instanceof Database.SqliteError && thrown.code === 'SQLITE_IOERR_TRUNCATE') throw translateSqlError(thrown);
      throw this.noteError(thrown);
    }
  }

  /** After an error that left doubt it stays open until the process ends: closing would checkpoint, and so write. */
  close(): void {
    if (this.#fault !== undefined) return;
    this.#database.close();
    this.#afterClose();
    this.#afterClose = () => undefined;
  }

  /** Refuses to write after an error that left doubt, and after SQLite gave a transaction up by itself. */
  assertWritable(): void {
    if (this.#fault !== undefined) {
      throw new OffshootError(
        'io-error',
        `the metadata store takes no more changes since an earlier failure; restart the daemon. The failure was: ${this.#fault.message}`,
        this.#fault.context,
        this.#fault,
      );
    }
    if (this.#depth > 0 && !this.#database.inTransaction) {
      throw new Error('SQLite rolled this transaction back; its body must not go on');
    }
  }

  /** Translates an error, and remembers it when it leaves doubt about what is on disk. */
  noteError(thrown: unknown): unknown {
    const error = translateSqlError(thrown);
    if (error !== thrown && leavesDoubt(error)) this.#fault ??= error;
    return error;
  }

  #runOutermost<T>(body: () => T): T {
    this.assertWritable();
    try {
      this.#begin.run();
    } catch (thrown) {
      throw this.noteError(thrown);
    }
    this.#depth = 1;
    try {
      const result = this.#runBody(body);
      this.#commit.run();
      return result;
    } catch (thrown) {
      const error = this.noteError(thrown);
      this.#afterCommit = [];
      this.#undo(() => this.#rollback.run());
      throw error;
    } finally {
      this.#depth = 0;
    }
  }

  #runNested<T>(body: () => T): T {
    this.assertWritable();
    const callbacksBefore = this.#afterCommit.length;
    try {
      this.#nest.run();
    } catch (thrown) {
      throw this.noteError(thrown);
    }
    this.#depth += 1;
    try {
      const result = this.#runBody(body);
      this.#unnest.run();
      return result;
    } catch (thrown) {
      const error = this.noteError(thrown);
      this.#afterCommit.length = callbacksBefore;
      this.#undo(() => {
        this.#rollbackNested.run();
        this.#unnest.run();
      });
      throw error;
    } finally {
      this.#depth -= 1;
    }
  }

  #runBody<T>(body: () => T): T {
    const result = body();
    if (isThenable(result)) throw new Error('the body of a transaction must not be asynchronous');
    this.assertWritable();
    return result;
  }

  /** SQLite rolls some transactions back by itself (no space, an I/O error): then there is nothing to undo. */
  #undo(statements: () => void): void {
    if (!this.#database.inTransaction) return;
    try {
      statements();
    } catch (thrown) {
      // The body's own error travels on; this one only makes sure that nothing is written after it.
      const error = this.noteError(thrown);
      this.#fault ??= new OffshootError('io-error', 'a transaction of the metadata store could not be rolled back', {}, error);
    }
  }
}
