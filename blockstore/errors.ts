/**
 * What can go wrong, as data: a kind (small, stable, matchable), a sentence for people, a context and a cause.
 *
 * Three total tables turn a kind into what the outside needs: an errno for the kernel, an HTTP status for the control
 * API, an exit code for the shell. A new kind does not compile until all three know it. Worker-safe: imports nothing.
 */

export type ErrorKind =
  | 'invalid-argument'
  | 'invalid-name'
  | 'not-found'
  | 'already-exists'
  | 'not-a-directory'
  | 'is-a-directory'
  | 'not-empty'
  | 'permission-denied'
  | 'not-permitted'
  | 'busy'
  | 'in-use'
  | 'no-space'
  | 'quota'
  | 'too-large'
  | 'name-too-long'
  | 'not-supported'
  | 'bad-handle'
  | 'faulted'
  | 'io-error'
  | 'source-changed'
  | 'source-unreachable'
  | 'foreign-format'
  | 'store-locked'
  | 'store-damaged'
  | 'store-version'
  | 'daemon-not-running'
  | 'mount-unusable'
  | 'tool-missing'
  | 'cancelled'
  | 'timed-out'
  | 'conflict'
  | 'internal';

/** Where on a disk. */
export interface ErrorExtent {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

export type ErrorContext = Readonly<Record<string, string | number | boolean | null | readonly ErrorExtent[]>>;

/** An operating error. Programmer errors are plain Error (assertions) and end the process. */
export class OffshootError extends Error {
  readonly kind: ErrorKind;
  readonly context: ErrorContext;

  constructor(kind: ErrorKind, message: string, context: ErrorContext = {}, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = 'OffshootError';
    this.kind = kind;
    this.context = context;
  }
}

/** Linux errno numbers (x86-64, arm64), positive. */
export const Errno = {
  EPERM: 1, ENOENT: 2, EINTR: 4, EIO: 5, ENXIO: 6, EBADF: 9, EAGAIN: 11, ENOMEM: 12, EACCES: 13, EBUSY: 16, EEXIST: 17,
  EXDEV: 18, ENODEV: 19, ENOTDIR: 20, EISDIR: 21, EINVAL: 22, ENOTTY: 25, ETXTBSY: 26, EFBIG: 27, ENOSPC: 28, EROFS: 30,
  EMLINK: 31, ERANGE: 34, ENAMETOOLONG: 36, ENOSYS: 38, ENOTEMPTY: 39, ELOOP: 40, ENODATA: 61, EILSEQ: 84,
  EOPNOTSUPP: 95, ECONNABORTED: 103, ETIMEDOUT: 110, ESTALE: 116, EDQUOT: 122,
} as const;

/** What the kernel, and so the guest or the caller of a file operation, is told. */
export const errnoOf = {
  'invalid-argument': Errno.EINVAL,
  'invalid-name': Errno.EINVAL,
  'not-found': Errno.ENOENT,
  'already-exists': Errno.EEXIST,
  'not-a-directory': Errno.ENOTDIR,
  'is-a-directory': Errno.EISDIR,
  'not-empty': Errno.ENOTEMPTY,
  'permission-denied': Errno.EACCES,
  'not-permitted': Errno.EPERM,
  busy: Errno.EBUSY,
  'in-use': Errno.EBUSY,
  'no-space': Errno.ENOSPC,
  quota: Errno.EDQUOT,
  'too-large': Errno.EFBIG,
  'name-too-long': Errno.ENAMETOOLONG,
  'not-supported': Errno.EOPNOTSUPP,
  'bad-handle': Errno.EBADF,
  faulted: Errno.EIO,
  'io-error': Errno.EIO,
  'source-changed': Errno.EIO,
  'source-unreachable': Errno.EIO,
  'foreign-format': Errno.EINVAL,
  'store-locked': Errno.EBUSY,
  'store-damaged': Errno.EIO,
  'store-version': Errno.EIO,
  'daemon-not-running': Errno.EIO,
  'mount-unusable': Errno.EIO,
  'tool-missing': Errno.EIO,
  cancelled: Errno.EINTR,
  'timed-out': Errno.ETIMEDOUT,
  conflict: Errno.EBUSY,
  internal: Errno.EIO,
} as const satisfies Record<ErrorKind, number>;

/** What a client of the control API is told. */
export const httpStatusOf = {
  'invalid-argument': 400,
  'invalid-name': 400,
  'not-found': 404,
  'already-exists': 409,
  'not-a-directory': 409,
  'is-a-directory': 409,
  'not-empty': 409,
  'permission-denied': 403,
  'not-permitted': 403,
  busy: 409,
  'in-use': 409,
  'no-space': 507,
  quota: 507,
  'too-large': 413,
  'name-too-long': 400,
  'not-supported': 501,
  'bad-handle': 409,
  faulted: 500,
  'io-error': 500,
  'source-changed': 409,
  'source-unreachable': 502,
  'foreign-format': 422,
  'store-locked': 423,
  'store-damaged': 500,
  'store-version': 500,
  'daemon-not-running': 503,
  'mount-unusable': 409,
  'tool-missing': 501,
  cancelled: 409,
  'timed-out': 504,
  conflict: 409,
  internal: 500,
} as const satisfies Record<ErrorKind, number>;

/**
 * What the shell is told. 1 is left to crashes, 2 to wrong usage of the command line; the rest are groups that a script
 * may want to tell apart.
 */
export const exitCodeOf = {
  'invalid-argument': 2,
  'invalid-name': 2,
  'not-found': 3,
  'already-exists': 4,
  'not-a-directory': 5,
  'is-a-directory': 5,
  'not-empty': 5,
  'permission-denied': 6,
  'not-permitted': 6,
  busy: 5,
  'in-use': 5,
  'no-space': 7,
  quota: 7,
  'too-large': 2,
  'name-too-long': 2,
  'not-supported': 8,
  'bad-handle': 5,
  faulted: 9,
  'io-error': 9,
  'source-changed': 9,
  'source-unreachable': 9,
  'foreign-format': 10,
  'store-locked': 11,
  'store-damaged': 12,
  'store-version': 12,
  'daemon-not-running': 13,
  'mount-unusable': 14,
  'tool-missing': 15,
  cancelled: 130,
  'timed-out': 16,
  conflict: 17,
  internal: 70,
} as const satisfies Record<ErrorKind, number>;

/** Narrows an unknown thrown value: operating errors pass, anything else is a programmer error of kind internal. */
export function toOffshootError(thrown: unknown): OffshootError {
  if (thrown instanceof OffshootError) return thrown;
  const code = (thrown as { code?: unknown } | null)?.code;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  switch (code) {
    case 'ENOENT': return new OffshootError('not-found', message, {}, thrown);
    case 'EEXIST': return new OffshootError('already-exists', message, {}, thrown);
    case 'ENOTDIR': return new OffshootError('not-a-directory', message, {}, thrown);
    case 'EISDIR': return new OffshootError('is-a-directory', message, {}, thrown);
    case 'EACCES': return new OffshootError('permission-denied', message, {}, thrown);
    case 'EPERM': return new OffshootError('not-permitted', message, {}, thrown);
    case 'EBUSY': return new OffshootError('busy', message, {}, thrown);
    case 'ENOSPC':
    case 'EDQUOT':
    case 'SQLITE_FULL': return new OffshootError('no-space', message, {}, thrown);
    case 'ENAMETOOLONG': return new OffshootError('name-too-long', message, {}, thrown);
    case 'EFBIG': return new OffshootError('too-large', message, {}, thrown);
    case 'ELOOP':
    case 'EINVAL': return new OffshootError('invalid-argument', message, {}, thrown);
    case 'EROFS': return new OffshootError('not-permitted', message, {}, thrown);
    case 'EMFILE':
    case 'ENFILE': return new OffshootError('busy', message, {}, thrown);
    // A descriptor that is not open, or memory that is not ours, is a fault of the program.
    case 'EBADF':
    case 'EFAULT': return new OffshootError('internal', message, {}, thrown);
    default: return new OffshootError(isSystemError(thrown) ? 'io-error' : 'internal', message, {}, thrown);
  }
}

/** True for what a system call said, through node:fs and its like. */
function isSystemError(thrown: unknown): boolean {
  const { syscall, errno } = (thrown ?? {}) as { readonly syscall?: unknown; readonly errno?: unknown };
  return typeof syscall === 'string' && typeof errno === 'number';
}

/** True for errors that say how the world is; false for those that say the program is wrong. */
export function isOperatingError(thrown: unknown): thrown is OffshootError {
  return thrown instanceof OffshootError && thrown.kind !== 'internal';
}
