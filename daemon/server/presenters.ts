/** The presenters of a running server, by what `daemon start` was told; and the part of the composition that keeps exports. Main thread. */
import path from 'node:path';

import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { References } from '../filesystem/references.js';
import type { ServerOptions } from '../holder/options.js';
import { createBlockPresenter } from '../presenter/block/block.js';
import { Exports } from '../presenter/exports.js';
import { createIscsiPresenter } from '../presenter/iscsi/iscsi.js';
import { createNbdPresenter } from '../presenter/nbd/nbd.js';
import { createNfsPresenter } from '../presenter/nfs/nfs.js';
import { EXPORT_ADDRESS_DEFAULT, directoryOf, type PresenterLogger, type PresenterPlace } from '../presenter/place.js';
import type { ExportKind, Presenter } from '../presenter/presenter.js';
import { createSmbPresenter } from '../presenter/smb/smb.js';

export interface ExportsPlaneParts {
  readonly meta: MetaStore;
  readonly references: References;
  readonly options: Pick<ServerOptions, 'storeDir' | 'mountDir' | 'runtimeDir' | 'exportAddress' | 'nfs'>;
  readonly logger: PresenterLogger;
  readonly onFatal: (error: unknown) => void;
}

/** In the store: clients have their opens and locks back after a restart of the host, too. */
const NFS_RECOVERY = 'nfs';

export function createExports({ meta, references, options, logger, onFatal }: ExportsPlaneParts): Exports {
  const placeOf = (kind: ExportKind): PresenterPlace => ({
    directory: directoryOf(options.runtimeDir, kind), mountDir: options.mountDir, address: options.exportAddress ?? EXPORT_ADDRESS_DEFAULT, logger,
  });
  const presenters: readonly Presenter[] = [
    createNbdPresenter(placeOf('nbd')), createBlockPresenter(placeOf('block')), createIscsiPresenter(placeOf('iscsi')), createSmbPresenter(placeOf('smb')),
    createNfsPresenter({ ...placeOf('nfs'), nfs: options.nfs === true, recoveryDir: path.join(options.storeDir, NFS_RECOVERY) }),
  ];
  return new Exports({ meta, references, presenters, mountDir: options.mountDir, logger, onFatal });
}
