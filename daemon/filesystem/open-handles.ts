/** What the file system asks of whoever keeps the table of open handles; it outlives the server (see the transport's). */
import type { NodeId, OpenMode } from './types.js';

export interface OpenHandle {
  readonly handle: number;
  readonly nodeId: NodeId;
  readonly flags: number;
  readonly mode: OpenMode;
}

export interface OpenHandles {
  /** A new handle, recorded before this returns, with the key of the request that asks for it; 0: none. */
  add(nodeId: NodeId, flags: number, mode: OpenMode, requestKey?: number): number;
  /** The handle of this node that the request with this key was given before, when its answer was lost. */
  givenTo(requestKey: number, nodeId: NodeId): OpenHandle | undefined;
  /** What the handle was; undefined when it is not open. */
  remove(handle: number): OpenHandle | undefined;
  openCountOf(nodeId: NodeId): number;
  entries(): readonly OpenHandle[];
}
