/**
 * Transparent access: whoever reads a link in `.block` has the disk attached, and uses the device for as long as it likes. Main thread.
 *
 *   1. attached, unless it is                                                    (see attachments.ts)
 *   2. lent: a child holds the device open for a while, and it is marked to go with its last close
 *   3. the path is given; whoever opens it in that while has it until the last one closes it
 *
 * One that was attached by `offshoot attach` stays until `offshoot detach`. Frozen disks and container files are read-only.
 *
 * The device has owner and mode of the disk. When it is gone its number may be given to a disk of somebody else: so it is looked at twice a second, as
 * the kernel's own files have it, and its owner set back.
 */
import { existsSync } from 'node:fs';
import path from 'node:path';

import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import type { Store } from '../../blockstore/store.js';
import type { Caller } from '../filesystem/types.js';
import { may } from '../machines/permissions.js';
import type { Attachments } from './attachments.js';
import type { BlockDevices } from './block-devices.js';

export interface BlockAccessParts {
  readonly store: Store;
  readonly devices: BlockDevices;
  readonly attachments: Attachments;
  readonly mountDir: string;
  readonly ready: () => Promise<void>;
  readonly logger: { warn(context: object, message: string): void };
  readonly onFatal: (error: Error) => void;
}

const LEND_SECONDS = 10;
const LOOK_MS = 500;
/** A device that went, and its number that came to another, between two looks. */
const ATTEMPTS = 5;
const READ = 4;

export class BlockAccess {
  readonly #parts: BlockAccessParts;
  readonly #underWay = new Map<number, Promise<string>>();
  readonly #ending = new AbortController();
  #timer: NodeJS.Timeout | null = null;
  #settling = false;

  constructor(parts: BlockAccessParts) {
    this.#parts = parts;
  }

  /** The device of a disk. Those who ask at once share one answer. */
  async device(nodeId: number, caller: Caller | undefined): Promise<string> {
    const node = this.#parts.store.meta.nodes.byId(nodeId);
    if (node === undefined) throw new OffshootError('not-found', `node ${nodeId} does not exist any more: look its name up again`, { nodeId });
    if (caller !== undefined && !may({ uid: caller.uid, gid: caller.gid, groups: [] }, node, READ)) {
      throw new OffshootError('permission-denied', `user ${caller.uid} may not read the disk ${node.name}`, { nodeId });
    }
    await this.#parts.ready();
    const underWay = this.#underWay.get(nodeId);
    if (underWay !== undefined) return await underWay;
    const begun = this.#lend(nodeId).finally(() => { this.#underWay.delete(nodeId); });
    this.#underWay.set(nodeId, begun);
    return await begun;
  }

  /** Looks after what is attached, until nothing is. */
  watch(): void {
    this.#timer ??= setInterval(() => { this.#look(); }, LOOK_MS).unref();
  }

  close(): void {
    this.#ending.abort();
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
  }

  async #lend(nodeId: number): Promise<string> {
    const { store, devices, attachments, mountDir } = this.#parts;
    const { meta } = store;
    const { signal } = this.#ending;
    for (let attempt = 0; attempt < ATTEMPTS; attempt += 1) {
      const row = meta.attachments.byNode(nodeId);
      if (row !== undefined && row.purpose !== 'block') {
        throw new OffshootError('in-use', `${meta.nodes.pathOf(nodeId)} is ${row.purpose === 'deploy' ? 'a deployed machine' : 'being staged'}: it has a block device of its own`, { nodeId });
      }
      const known = await attachments.deviceOf(nodeId, signal);
      if (known !== null && !known.isLeaving) return known.device;
      if (known === null) await attachments.giveBack(nodeId, signal);
      const device = known?.device ?? (await this.#attach(nodeId)).device;
      try {
        await devices.lend(device, { signal, seconds: LEND_SECONDS });
      } catch (thrown) {
        if (!isOperatingError(thrown) || signal.aborted) throw thrown;
        continue;
      }
      this.watch();
      if ((await devices.find(device, mountDir, { signal }))?.nodeId === nodeId) return device;
    }
    throw new OffshootError('busy', `${meta.nodes.pathOf(nodeId)} came and went: try again`, { nodeId });
  }

  async #attach(nodeId: number): Promise<{ readonly device: string }> {
    const { store: { meta }, attachments } = this.#parts;
    const node = meta.nodes.byId(nodeId);
    const readOnly = node?.frozen === true || meta.vdisks.byNode(nodeId) !== undefined;
    const found = await attachments.attach({ nodeId, purpose: 'block', jobId: null, readOnly }, this.#ending.signal);
    attachments.openToOwner(nodeId, found.device);
    return found;
  }

  #look(): void {
    const rows = this.#parts.store.meta.attachments.all().filter(({ purpose }) => purpose === 'block');
    if (rows.length === 0 && this.#timer !== null) {
      clearInterval(this.#timer);
      this.#timer = null;
    }
    if (this.#settling || rows.every(({ device }) => device === null || existsSync(`/sys/class/block/${path.basename(device)}/loop`))) return;
    this.#settling = true;
    this.#parts.attachments.settle(this.#ending.signal).catch((thrown: unknown) => {
      if (this.#ending.signal.aborted) return;
      if (!isOperatingError(thrown)) this.#parts.onFatal(thrown instanceof Error ? thrown : new Error(String(thrown)));
      else this.#parts.logger.warn({ reason: thrown.message }, 'block devices that went could not be looked at');
    }).finally(() => { this.#settling = false; });
  }
}
