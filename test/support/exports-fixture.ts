/**
 * What tests of presenters share: a place on tmpfs, free ports, exports as the service would give them, and programs that look at files under
 * the mount, each in a process of its own.
 */
import { randomUUID } from 'node:crypto';
import { createServer } from 'node:net';
import { dirname, join } from 'node:path';

import type { PresenterPlace } from '../../daemon/presenter/place.js';
import type { Export, ExportKind, Presenter } from '../../daemon/presenter/presenter.js';
import type { TestDaemon } from './daemon.js';
import { endServersIn } from './export-servers.js';
import { mustRun } from './model/command.js';
import { makeTmpfsDir, type Cleanup } from './temp.js';

/** For the presenter of one kind; what it starts ends with the clean-up, before the daemon's mount goes. */
export function presenterPlace(kind: ExportKind, daemon: Pick<TestDaemon, 'mountDir'>, cleanup: Cleanup, address = '127.0.0.1'): PresenterPlace {
  const said = (): void => undefined;
  const top = makeTmpfsDir('x', cleanup);
  cleanup.add(async () => {
    const left = await endServersIn(top);
    if (left.length > 0) throw new Error(`a presenter has ended, and left:\n${left.join('\n')}`);
  });
  return { directory: join(top, 'exports', kind), mountDir: daemon.mountDir, address, logger: { info: said, warn: said } };
}

/** Ended by the clean-up. */
export function started<T extends Presenter>(presenter: T, cleanup: Cleanup): T {
  cleanup.add(async () => { await presenter.end({ signal: AbortSignal.timeout(30_000) }); });
  return presenter;
}

let lastId = 0;

export function exportOf(daemon: Pick<TestDaemon, 'mountDir'>, path: string, given: Partial<Export> = {}): Export {
  lastId += 1;
  return {
    id: lastId, uuid: randomUUID(), path, mountPath: join(daemon.mountDir, path), kind: 'disk', sizeBytes: 8 * 1024 ** 2,
    clients: [], readOnly: false, options: {}, ...given,
  };
}

/** Nobody has it at this moment. */
export async function freePort(): Promise<number> {
  return await new Promise((resolve, reject) => {
    const server = createServer();
    server.once('error', reject);
    server.listen({ host: '127.0.0.1', port: 0 }, () => {
      const address = server.address();
      server.close(() => { resolve(typeof address === 'object' && address !== null ? address.port : 0); });
    });
  });
}

export async function sha256Of(file: string): Promise<string> {
  return (await mustRun('sha256sum', ['--', file], { cwd: dirname('/'), timeoutMs: 120_000 })).stdout.split(' ')[0]!;
}

/** Of the blocks that the file has, as the store counts them. */
export async function allocatedBytes(file: string): Promise<number> {
  return Number((await mustRun('stat', ['-c', '%b', '--', file])).stdout) * 512;
}
