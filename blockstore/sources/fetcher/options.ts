/** What a fetcher is told when it is started, as one JSON argument, and what it says when it only had to look. */
import type { FileIdentity } from '../../meta/rows.js';
import type { IdentityScope } from '../identity.js';

export interface FetcherOptions {
  /** Absolute path of the source. */
  readonly file: string;
  /** What the file must be; null: say what it is, and end. */
  readonly expected: { readonly identity: FileIdentity; readonly scope: IdentityScope } | null;
  readonly parentPid: number;
}

/** The answer of a fetcher that only looks. */
export type ProbeAnswer =
  | { readonly ok: true; readonly kind: 'file' | 'directory' | 'other'; readonly path: string; readonly identity: FileIdentity; readonly headBase64: string }
  | { readonly ok: false; readonly code: string; readonly message: string };

/** Why a fetcher does not offer its export: JSON in the refusal of the handshake. */
export interface FetcherRefusal {
  readonly kind: 'source-changed' | 'source-unreachable';
  readonly message: string;
  /** errno name of the call that failed. */
  readonly code: string | null;
}

/** The socket to the server process: the first descriptor behind the standard ones. */
export const FETCHER_SOCKET_FD = 3;
export const HEAD_BYTES = 512;
