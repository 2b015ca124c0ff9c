/**
 * What the name-and-attribute half of the file system asks of the half that holds the data.
 *
 * Main thread only, synchronous. Names never touch a data file; whatever they need to know or start there goes
 * through this interface.
 */
export interface LiveAttributes {
  readonly sizeBytes: number;
  readonly mtimeUs: number;
  readonly ctimeUs: number;
  readonly atimeUs: number;
}

/** What chains take from a layer on downwards, as it was found out for one answer: not to be kept, because chains change. */
export type KnownAllocation = Map<number, number>;

export interface NodeData {
  /** Makes an empty, complete layer for a new file, data file on disk and durable; returns its id. Called inside the transaction that inserts the node. */
  createEmptyLayer(): number;
  /** Live values of a node that is open (its sizes and times may be ahead of the database), undefined when it is not. */
  liveAttributes(nodeId: number): LiveAttributes | undefined;
  allocatedBytes(layerId: number | null, known?: KnownAllocation): number;
  isOpen(nodeId: number): boolean;
  /** The node lost its last name and is not open: its row and what only it referred to may go. Called after the commit. */
  discard(nodeId: number): void;
  /**
   * The names' owner changed attributes of an open node, whose live state must follow: the three times in the row are
   * right as they stand (live ones were taken into account), its size is not to be taken. Called after the commit.
   */
  attributesChanged(nodeId: number): void;
}
