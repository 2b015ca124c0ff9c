/**
 * What the control API asks for when something is sent, received, exported or compared. See `service.ts`.
 */
import type { ExtentPage, InstantInfo, ReceiveInfo, ReceiveResult, TreeInfo } from './transfer-schemas.js';

export interface TransferService {
  /** What a reference stands for, node by node. */
  tree(reference: string): TreeInfo;
  /** What differs between two states of a disk, or all data of one, from an offset on; as much as can be said quickly. */
  extents(reference: string, base: string | null, offsetBytes: number): ExtentPage;
  /** Makes a clone for a reader who opens it at once; it loses its name after a minute at the latest. */
  instant(reference: string): Promise<InstantInfo>;
  /** Takes its name away: who has it open keeps it. */
  releaseInstant(path: string): Promise<{ readonly dropped: true }>;
  receives(): Promise<readonly ReceiveInfo[]>;
  receive(receiveId: number): Promise<ReceiveInfo>;
  receiveBegin(target: string, header: string): Promise<ReceiveInfo>;
  /** Whole records, the first of which has number `first`. */
  receiveRecords(receiveId: number, first: number, bytes: Buffer): Promise<ReceiveInfo>;
  /** What came is made durable and kept. */
  receivePause(receiveId: number): Promise<ReceiveInfo>;
  /** Asked again after it was done, it says the same again. */
  receiveFinish(receiveId: number): Promise<ReceiveResult>;
  receiveAbort(receiveId: number): Promise<{ readonly dropped: true }>;
}
