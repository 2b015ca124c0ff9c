/**
 * The vdisk configuration data of a container file: what is in it, who can use it, and the machine's configuration as it was. Pure.
 *
 * It stands in the store (the row of the file) and in the file system itself (`.offshoot/vdisk.json`), for whoever finds the file elsewhere.
 * Only the row is believed: what lies in a file system may have been changed by whoever had it.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { FILE_SYSTEMS, type FileSystemType } from './layout.js';

export const DESCRIPTION_VERSION = 1;
/** In the file system of the container file. */
export const OFFSHOOT_DIRECTORY = '.offshoot';
export const DESCRIPTION_FILE = 'vdisk.json';

export interface VdiskDescription {
  readonly version: typeof DESCRIPTION_VERSION;
  readonly partitionTable: {
    readonly type: 'gpt';
    readonly guid: string;
    readonly alignmentBytes: number;
    readonly partition: { readonly guid: string; readonly typeGuid: string; readonly name: string; readonly offsetBytes: number; readonly sizeBytes: number };
  };
  readonly fileSystem: { readonly type: FileSystemType; readonly uuid: string; readonly label: string };
  readonly sizes: { readonly virtualBytes: number; readonly dataBytes: number; readonly files: number };
  /** What can use it. */
  readonly host: { readonly system: 'linux'; readonly architecture: string; readonly fileSystem: FileSystemType; readonly format: string };
  readonly machine: {
    readonly name: string;
    readonly format: string;
    /** File name. */
    readonly configuration: string;
    readonly text: string;
    readonly uid: number;
    readonly gid: number;
    readonly mode: number;
    /** Whom the disks belong to. */
    readonly owner: { readonly uid: number; readonly gid: number };
    readonly macCount: number;
    /** Where it lay, absolute, and where its configuration says that it lay: what the configuration names below it is in the file system. */
    /** Where it lay, and where its configuration may say that it lay, absolute: what that names below them is in the file system. */
    readonly directories: readonly string[];
  };
}

export function descriptionText(description: VdiskDescription): string {
  return `${JSON.stringify(description, null, 2)}\n`;
}

/** Of the store's own row; a newer one is refused. */
export function parseDescription(value: unknown, name: string): VdiskDescription {
  const description = value as VdiskDescription | null;
  if (description?.version !== DESCRIPTION_VERSION) {
    throw new OffshootError('not-supported', `${name} was staged by another version of Offshoot (its description is of version ${String((value as { version?: unknown } | null)?.version)}, this one knows ${DESCRIPTION_VERSION}): deploy it with that version, or stage the machine again`);
  }
  if (!FILE_SYSTEMS.includes(description.fileSystem.type)) throw new OffshootError('not-supported', `${name} holds a file system of type ${JSON.stringify(description.fileSystem.type)}, which this version does not mount`);
  return description;
}
