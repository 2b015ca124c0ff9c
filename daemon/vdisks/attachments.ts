/**
 * What is attached as a block device, for what, and how many of them there may be. Main thread.
 *
 *   1. the row, without a device          (dies: the next server looks for a device that shows the node, and gives it back)
 *   2. the program attaches
 *   3. the device in the row              (dies: as written)
 *   and back: the device is given back, then the row goes.
 *
 * So nothing is ever attached by us that no row mentions. What somebody else attached (an administrator, an export) is not ours to take away.
 */
import { chmodSync, chownSync } from 'node:fs';
import path from 'node:path';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { AttachmentPurpose, AttachmentRow } from '../../blockstore/meta/attachment-table.js';
import type { Store } from '../../blockstore/store.js';
import { sleepUnlessAborted } from '../programs/child.js';
import type { AttachedDevice, BlockDevices, DeviceWindow } from './block-devices.js';

export interface AttachmentParts {
  readonly store: Store;
  readonly devices: BlockDevices;
  /** As the kernel calls it, without symbolic links on the way. */
  readonly mountDir: string;
  readonly limit: number;
  readonly openCount: (nodeId: number) => number;
  readonly logger: { info(context: object, message: string): void; warn(context: object, message: string): void };
}

export interface AttachWish {
  readonly nodeId: number;
  readonly purpose: AttachmentPurpose;
  readonly jobId: number | null;
  readonly readOnly: boolean;
  readonly window?: DeviceWindow;
}

const CLOSED_PATIENCE_MS = 10_000;
const CLOSED_LOOK_MS = 20;
/** A file that was closed a moment ago is still open for as long as its close is on its way. */
const OPEN_PATIENCE_MS = 2_000;

export class Attachments {
  readonly #parts: AttachmentParts;

  constructor(parts: AttachmentParts) {
    this.#parts = parts;
  }

  get limit(): number { return this.#parts.limit; }

  /** `in-use` when it is attached already, or presented as a device, or to others who may write to it; `busy` when there are as many as there may be. */
  async attach({ nodeId, purpose, jobId, readOnly, window }: AttachWish, signal: AbortSignal): Promise<AttachedDevice> {
    const { store, devices, limit } = this.#parts;
    const { meta } = store;
    if (meta.attachments.count() >= limit) await this.settle(signal);
    this.#assertNotPresented(nodeId, readOnly);
    if (purpose === 'block' && !readOnly) await this.#assertNotOpen(nodeId, signal);
    const file = this.fileOf(nodeId);
    const id = meta.transaction(() => {
      this.#assertNotPresented(nodeId, readOnly);
      if (meta.attachments.count() >= limit) {
        throw new OffshootError('busy', `${limit} virtual disks are attached, which is the limit: decommission a machine, detach a disk (offshoot attached lists them), or start the daemon with a higher --attach-limit`, { limit });
      }
      return meta.attachments.insert({ nodeId, purpose, jobId });
    });
    let found: AttachedDevice;
    try {
      found = await devices.attach(file, { nodeId, readOnly, signal, ...(window === undefined ? {} : { window }) });
    } catch (thrown) {
      // What was interrupted may have been done all the same; whoever undoes finds the row, and looks.
      if (jobId === null) await this.giveBack(nodeId, AbortSignal.timeout(CLOSED_PATIENCE_MS)).catch(() => undefined);
      throw thrown;
    }
    meta.attachments.attached(id, found.device);
    return found;
  }

  /** A device of an export shows the same node, and would be taken for ours: lent, and given back. Whoever else may write there is a second writer. */
  #assertNotPresented(nodeId: number, readOnly: boolean): void {
    const { meta } = this.#parts.store;
    const presented = meta.exports.ofNode(nodeId).find((each) => each.kind === 'block' || (!readOnly && !each.readOnly));
    if (presented === undefined) return;
    const path = meta.nodes.pathOf(nodeId);
    throw new OffshootError('in-use', `${path} is presented as ${presented.kind}: withdraw it first (offshoot withdraw ${path} --as ${presented.kind})${presented.kind === 'block' ? '' : ', or attach it with --read-only'}`, { path });
  }

  /** A file system that two write to, each with a cache of its own, is destroyed. What is opened later under the mount is the opener's to see to. */
  async #assertNotOpen(nodeId: number, signal: AbortSignal): Promise<void> {
    const { meta } = this.#parts.store;
    if (meta.attachments.byNode(nodeId) !== undefined) return;
    const path = meta.nodes.pathOf(nodeId);
    const deadline = performance.now() + OPEN_PATIENCE_MS;
    while (this.#parts.openCount(nodeId) > 0) {
      if (performance.now() >= deadline) {
        throw new OffshootError('in-use', `${path} is open, by a machine or a program that may write to it (fuser names who has it): close it first, or attach it with --read-only`, { path });
      }
      await sleepUnlessAborted(CLOSED_LOOK_MS, signal);
    }
  }

  /** It is not attached any more afterwards, and nobody has it open. Throws `in-use`. Nothing to do when there is no row. */
  async giveBack(nodeId: number, signal: AbortSignal): Promise<void> {
    const { store, devices, mountDir } = this.#parts;
    const row = store.meta.attachments.byNode(nodeId);
    if (row === undefined) return;
    for (const { device } of await this.#devicesOf(row, signal)) {
      this.#closeToOthers(row, device);
      await devices.detach(device, { signal, directory: mountDir, nodeId });
    }
    await this.untilClosed(nodeId, signal);
    store.meta.attachments.remove(row.id);
  }

  /** The kernel says that a file was closed a little after it was. */
  async untilClosed(nodeId: number, signal: AbortSignal): Promise<void> {
    const deadline = performance.now() + CLOSED_PATIENCE_MS;
    while (this.#parts.openCount(nodeId) > 0) {
      if (performance.now() >= deadline) throw new OffshootError('in-use', `${this.#parts.store.meta.nodes.pathOf(nodeId)} is open: close it first (fuser names who has it)`, { nodeId });
      await sleepUnlessAborted(CLOSED_LOOK_MS, signal);
    }
  }

  /** What a node is attached as; null when it is not, whatever its row says. */
  async deviceOf(nodeId: number, signal: AbortSignal): Promise<AttachedDevice | null> {
    const row = this.#parts.store.meta.attachments.byNode(nodeId);
    return row === undefined ? null : (await this.#devicesOf(row, signal))[0] ?? null;
  }

  /** Forgets those that went by themselves, with their last close. Asked for now and then, and when there are too many. */
  async settle(signal: AbortSignal): Promise<void> {
    const { store, devices, mountDir } = this.#parts;
    const rows = store.meta.attachments.all().filter(({ purpose, device }) => purpose === 'block' && device !== null);
    if (rows.length === 0) return;
    const shown = new Set((await devices.list(mountDir, { signal })).map(({ nodeId }) => nodeId));
    for (const row of rows) {
      if (shown.has(row.nodeId) || store.meta.attachments.byNode(row.nodeId)?.id !== row.id) continue;
      if (row.device !== null) this.#closeToOthers(row, row.device);
      store.meta.attachments.remove(row.id);
    }
  }

  async listed(signal: AbortSignal): Promise<readonly { readonly row: AttachmentRow; readonly device: AttachedDevice | null }[]> {
    const { store, devices, mountDir } = this.#parts;
    await this.settle(signal);
    const rows = store.meta.attachments.all();
    const all = rows.length === 0 ? [] : await devices.list(mountDir, { signal });
    return rows.map((row) => ({ row, device: all.find(({ nodeId }) => nodeId === row.nodeId) ?? null }));
  }

  /**
   * At the start of a server: what one left that died between two steps. Rows of operations are theirs to undo, those of deployed machines stay. Devices
   * that no row mentions were attached by others: they are named in the log, and left alone.
   */
  async recover(signal: AbortSignal): Promise<void> {
    const { store, devices, mountDir, logger } = this.#parts;
    const { meta } = store;
    const shown = await devices.list(mountDir, { signal });
    for (const row of meta.attachments.all()) {
      if (row.purpose !== 'block') continue;
      const found = shown.find(({ nodeId }) => nodeId === row.nodeId);
      if (found === undefined) {
        if (row.device !== null) this.#closeToOthers(row, row.device);
        meta.attachments.remove(row.id);
      } else if (row.device === null) {
        // Nobody was told of it.
        await this.giveBack(row.nodeId, signal).catch((thrown: unknown) => { logger.warn({ device: found.device, reason: toOffshootError(thrown).message }, 'a device that nobody asked for any more could not be given back'); });
      }
    }
    const known = new Set(meta.attachments.all().map(({ nodeId }) => nodeId));
    const exported = new Set(meta.exports.all().flatMap(({ kind, nodeId }) => (kind === 'block' ? [nodeId] : [])));
    const others = shown.filter(({ nodeId }) => nodeId === null || (!known.has(nodeId) && !exported.has(nodeId)));
    if (others.length > 0) logger.info({ devices: others.map(({ device, file }) => `${device}: ${file}`) }, 'block devices of files of the mount that Offshoot did not attach; they are left alone');
  }

  /** The device is the owner's to open, as the disk is; until it is given back. */
  openToOwner(nodeId: number, device: string): void {
    const node = this.#parts.store.meta.nodes.byId(nodeId);
    if (node === undefined) return;
    chownSync(device, node.uid, node.gid);
    chmodSync(device, node.mode & 0o666);
  }

  fileOf(nodeId: number): string {
    return path.posix.join(this.#parts.mountDir, this.#parts.store.meta.nodes.pathOf(nodeId));
  }

  /** The number is used again, for a disk of somebody else. */
  #closeToOthers({ id, purpose }: AttachmentRow, device: string): void {
    if (purpose !== 'block') return;
    // While its first disk was looked for it may have come to the next one of ours, whose owner has it now.
    if (this.#parts.store.meta.attachments.all().some((other) => other.id !== id && other.device === device)) return;
    try {
      chmodSync(device, 0o600);
      chownSync(device, 0, 0);
    } catch (thrown) {
      if ((thrown as NodeJS.ErrnoException).code !== 'ENOENT') this.#parts.logger.warn({ device, reason: String(thrown) }, 'the owner of a device could not be set back');
    }
  }

  async #devicesOf(row: AttachmentRow, signal: AbortSignal): Promise<readonly AttachedDevice[]> {
    return (await this.#parts.devices.list(this.#parts.mountDir, { signal })).filter(({ nodeId }) => nodeId === row.nodeId);
  }
}
