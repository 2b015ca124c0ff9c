/**
 * SQLite's own check of the database file, by a connection that only reads, in a process that does nothing else.
 *
 * It sees one moment of a database that another process writes to, and keeps nobody waiting; the log grows meanwhile.
 */
import Database from 'better-sqlite3';

import { Audit } from './audit.js';
import { SqlConnection } from './sql-connection.js';

/** What is wrong, each as a sentence; none: all is well. */
export function checkDatabaseFile(path: string): string[] {
  const database = new Database(path, { readonly: true, fileMustExist: true });
  try {
    return new Audit(new SqlConnection(database)).databaseProblems();
  } catch (thrown) {
    return [`it cannot be read (${(thrown as Error).message})`];
  } finally {
    database.close();
  }
}
