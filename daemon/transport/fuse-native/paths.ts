/**
 * From the paths that libfuse 2 hands out to node ids.
 *
 * libfuse's high-level interface knows paths only, so each name is looked up from the root. An open file that is
 * unlinked, or replaced by a rename, never reaches us as such: libfuse renames it to `.fuse_hidden` and 16 hex digits in
 * the same directory, and unlinks that at the last close. The file system has real unlinked nodes, which vanish by
 * themselves if the daemon dies, so such a rename is taken for the unlink it stands for, and the hidden name is kept
 * here only, from then on. The names are unique within a mount (libfuse counts them), hence the base name is the key:
 * the directory may be renamed meanwhile. It may not be removed: libfuse could name the file no more. Main thread only.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import { ROOT_NODE_ID } from '../../filesystem/types.js';
import type { FileSystem, NodeId } from '../../filesystem/types.js';

export interface Place {
  readonly parent: NodeId;
  readonly name: string;
}

interface Hidden {
  readonly node: NodeId;
  readonly directory: NodeId;
}

const HIDDEN_NAME = /^\.fuse_hidden[0-9a-f]{16}$/;
/** What a name that is not UTF-8 holds once the addon has made a string of it. */
const REPLACEMENT_CHARACTER = '\uFFFD';

export class Paths {
  readonly #fileSystem: FileSystem;
  readonly #hidden = new Map<string, Hidden>();

  constructor(fileSystem: FileSystem) {
    this.#fileSystem = fileSystem;
  }

  /** Throws `not-found` and what else FileSystem.lookup throws. */
  nodeAt(path: string): NodeId {
    const hidden = this.#hidden.get(baseName(path));
    return hidden?.node ?? this.#walk(path);
  }

  /** Directory and name of a path; the name need not exist. */
  placeOf(path: string): Place {
    const cut = path.lastIndexOf('/');
    const name = path.slice(cut + 1);
    if (name.includes(REPLACEMENT_CHARACTER)) {
      throw new OffshootError('invalid-name', 'Names must be UTF-8.', { path });
    }
    return { parent: this.#walk(path.slice(0, cut)), name };
  }

  /** True if this rename is libfuse's way to say that an open file was unlinked. */
  isHiding(path: string, newPath: string): boolean {
    const name = baseName(newPath);
    return HIDDEN_NAME.test(name) && newPath.length - name.length === path.lastIndexOf('/') + 1 && newPath.startsWith(path.slice(0, path.lastIndexOf('/') + 1));
  }

  hide(hiddenPath: string, node: NodeId, directory: NodeId): void {
    this.#hidden.set(baseName(hiddenPath), { node, directory });
  }

  hidesAny(): boolean {
    return this.#hidden.size > 0;
  }

  /** True if a file that was unlinked from the directory is still open. */
  hidesIn(directory: NodeId): boolean {
    for (const hidden of this.#hidden.values()) if (hidden.directory === directory) return true;
    return false;
  }

  /** True if the path was hidden; it is forgotten. */
  forgetHidden(path: string): boolean {
    return this.#hidden.delete(baseName(path));
  }

  #walk(path: string): NodeId {
    let node: NodeId = ROOT_NODE_ID;
    for (const name of path.split('/')) {
      if (name !== '') node = this.#fileSystem.lookup(node, name).nodeId;
    }
    return node;
  }
}

function baseName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}
