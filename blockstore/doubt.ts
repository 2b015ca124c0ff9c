/**
 * Commits in doubt: the database failed while it committed, and only the next process will see whether the change is there.
 *
 * SQLite has undone it in this process, but its log may hold all of it, so the next one may find it done. Whatever gives a disk
 * another shape must not let guests go on as if it had not happened: what they write now would land in a layer that the next
 * process knows as sealed, or behind an end that it knows as cut.
 */
import { OffshootError } from './errors.js';

/** False for errors before the commit, and for those that say that the database has failed earlier: then nothing was begun. */
export function isInDoubt(thrown: unknown): thrown is OffshootError {
  return thrown instanceof OffshootError && (thrown.kind === 'io-error' || thrown.kind === 'store-damaged')
    && 'sqliteCode' in thrown.context && !(thrown.cause instanceof OffshootError);
}
