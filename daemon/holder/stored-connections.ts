/**
 * Connections that a service manager kept: how they are named, and which of them this process was started with.
 *
 * Apart from `service-manager.ts`, because the command line reads these and must load no FFI library for it.
 */

/** Followed by the number of the connection. */
export const FD_NAME = 'offshoot-fuse-';
/** sd_listen_fds(3): descriptors begin here. */
const LISTEN_FDS_START = 3;

type Environment = Readonly<Record<string, string | undefined>>;

export interface StoredConnection {
  readonly fd: number;
  readonly connection: number;
}

/** What an earlier daemon had the service manager keep, if this very process was started with it. */
export function storedConnections(pid: number, environment: Environment = process.env): readonly StoredConnection[] {
  if (environment['LISTEN_PID'] !== String(pid)) return [];
  const names = (environment['LISTEN_FDNAMES'] ?? '').split(':');
  return Array.from({ length: Number(environment['LISTEN_FDS'] ?? 0) || 0 }, (_, index) => {
    const [, connection] = new RegExp(`^${FD_NAME}([0-9]+)$`, 'u').exec(names[index] ?? '') ?? [];
    return connection === undefined ? [] : [{ fd: LISTEN_FDS_START + index, connection: Number(connection) }];
  }).flat();
}
