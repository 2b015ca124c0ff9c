/**
 * The numbers that both ends of the control API must agree on. They lie apart from the schemas so that the command
 * line can know them without loading a schema library at every start. Imports the units of the store and nothing else.
 */
import { DISK_BYTES_MAX, SECTOR_BYTES } from '../../blockstore/units.js';

/** Where the control socket lies unless --socket or OFFSHOOT_SOCKET says otherwise. */
export const DEFAULT_SOCKET_PATH = '/run/offshoot/offshoot.sock';
/** Largest path of a unix socket: sun_path of sockaddr_un has 108 bytes, one of them for the final NUL. */
export const SOCKET_PATH_BYTES_MAX = 107;
/** Targets of one clone request: all of them are made in one transaction. */
export const CLONE_TARGETS_MAX = 10_000;
/** Ranges of one range clone: all of them are cloned in one transaction. */
export const CLONE_RANGES_MAX = 1024;
/** Largest request. 10,000 targets of the longest sensible names fit; a stray upload does not. */
export const REQUEST_BYTES_MAX = 8 * 1024 * 1024;
/** Largest answer that the client accepts. */
export const RESPONSE_BYTES_MAX = 256 * 1024 * 1024;
/** NAME_MAX and PATH_MAX (less its NUL) of Linux: what is named here must be reachable under the mount. */
export const NAME_BYTES_MAX = 255;
export const PATH_BYTES_MAX = 4095;
/** Largest disk, and the unit that its size must be a multiple of. */
export const DISK_SIZE_BYTES_MAX = DISK_BYTES_MAX;
export const DISK_SIZE_UNIT_BYTES = SECTOR_BYTES;
/** Headers of one request, the request line among them: a path of 4095 bytes, every byte escaped, fits. */
export const HEADER_BYTES_MAX = 16 * 1024;
/** Connections at a time, for each of the two sockets. */
export const CONNECTIONS_MAX = 256;
/** Time for a client to send a whole request. */
export const REQUEST_TIMEOUT_MS = 30_000;
/** I/O workers of one daemon. */
export const WORKERS_MAX = 64;

/** How long a read waits for a source that does not answer, unless --source-timeout says otherwise: below the 30 s after which many guests reset a disk. */
export const SOURCE_TIMEOUT_SECONDS = 25;
export const SOURCE_TIMEOUT_SECONDS_MAX = 3600;

/** What the scrub reads in a second unless somebody says otherwise: a tenth of what a slow disk gives. */
export const SCRUB_RATE_BYTES_DEFAULT = 32 * 1024 * 1024;

export const TRANSPORTS = ['kernel', 'fuse-native'] as const;
export const IMPORT_FORMATS = ['raw', 'qcow2', 'vmdk', 'vhdx', 'vdi'] as const;
export const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal'] as const;

/** Virtual disks that are attached as block devices of the host at a time, when nobody says; and the most that can be said. */
export const ATTACH_LIMIT_DEFAULT = 16;
export const ATTACH_LIMIT_MAX = 4096;
