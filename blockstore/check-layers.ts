/**
 * The part of a check that looks at layers: their files, what they own, and the chains that they make.
 *
 * Steps of the main thread, like all of `check.ts`, whose words and rules hold here. A file that holds more than its layer owns
 * is no finding: what lies there was never acknowledged, or a resize is to cut it off at the next open. A hole where the layer
 * owns is none either: it was discarded. A file that ends before what the layer owns has lost data.
 */
import fs from 'node:fs';

import type { CheckContext } from './check-report.js';
import { checkShared } from './check-shared.js';
import { OffshootError, isOperatingError, toOffshootError } from './errors.js';
import { assertUnchanged } from './sources/external-source.js';
import type { AuditLayer, AuditPages } from './meta/audit.js';
import { countBlocks } from './meta/ownership-pages.js';
import { BLOCK_BYTES, DISK_BYTES_MAX, PAGE_BITMAP_BYTES, PAGE_BLOCKS, PAGE_BYTES } from './units.js';

/** Layers looked at in one step. */
const STEP_LAYERS = 64;

/** Every layer in the order of its id, then the chains. */
export function* checkLayers(context: CheckContext): Generator<undefined, void, undefined> {
  const { audit } = context.parts.meta;
  let lastId = 0;
  for (;;) {
    // Asked anew after each step: a layer that was removed meanwhile is not looked at.
    const layers = audit.layersAfter(lastId, STEP_LAYERS);
    for (const layer of layers) {
      checkLayer(context, layer);
      lastId = layer.id;
    }
    yield;
    for (const layer of layers) yield* checkOwnership(context, layer.id);
    if (layers.length === 0) break;
  }
  checkChains(context);
  yield;
  yield* checkShared(context);
}

function checkLayer(context: CheckContext, layer: AuditLayer): void {
  const { add, disksOn } = context;
  if (!isSizeBytes(layer.size_bytes) || (layer.node_size_bytes !== null && !isSizeBytes(layer.node_size_bytes))) {
    add({
      kind: 'row-unreadable', severity: 'corruption', layerId: layer.id,
      message: `layer ${layer.id} or its disk has a size that no disk can have; restore offshoot.db from a backup`,
    });
    return;
  }
  if (layer.node_id !== null && layer.sealed === 1) {
    add({
      kind: 'active-layer', severity: 'corruption', layerId: layer.id, nodeId: layer.node_id, disks: disksOn(layer.id),
      message: `layer ${layer.id} is sealed, although node ${layer.node_id} has it as its active layer; restore offshoot.db from a backup`,
    });
  }
  if (layer.complete === 0 && layer.backing_sealed === 0) {
    add({
      kind: 'backing-chain', severity: 'corruption', layerId: layer.id, disks: disksOn(layer.id),
      message: `layer ${layer.id} stands on layer ${layer.backing_id ?? 0}, which is not sealed and can still change; restore offshoot.db from a backup`,
    });
  }
  if (layer.kind === 'external') checkExternal(context, layer);
  else checkFile(context, layer);
}

/** The layer's own file is there, and as long as it must be. What an incomplete layer owns is looked at page by page. */
function checkFile({ parts: { meta, files }, add, disksOn }: CheckContext, layer: AuditLayer): void {
  const file = files.storePath(layer.id);
  const stat = lookAt(file);
  if (stat instanceof OffshootError) {
    add({
      kind: 'layer-file-wrong', severity: 'corruption', layerId: layer.id, file, disks: disksOn(layer.id),
      message: `the data file of layer ${layer.id} cannot be looked at: ${stat.message}; look at the kernel's log for the device, and at the directories above it`,
    });
  } else if (stat === undefined) {
    // A clone's file is made when it is first opened.
    if (layer.complete === 0 && layer.sealed === 0 && meta.ownership.isEmpty(layer.id)) return;
    add({
      kind: 'layer-file-missing', severity: 'corruption', layerId: layer.id, file, disks: disksOn(layer.id),
      message: `the data file of layer ${layer.id} is missing: ${file}; restore it from a backup of the store`,
    });
  } else if (!stat.isFile()) {
    add({
      kind: 'layer-file-wrong', severity: 'corruption', layerId: layer.id, file, disks: disksOn(layer.id),
      message: `${file} is not a regular file, and cannot be the data file of layer ${layer.id}; restore it from a backup of the store`,
    });
  } else if (layer.complete === 1 && stat.size < sizeOf(layer)) {
    add({
      kind: 'layer-file-short', severity: 'corruption', layerId: layer.id, file, offsetBytes: stat.size, lengthBytes: sizeOf(layer) - stat.size, disks: disksOn(layer.id),
      message: `the data file of layer ${layer.id} has ${stat.size} bytes, and ${sizeOf(layer)} are owned: its end is missing; restore it from a backup of the store`,
    });
  }
}

function checkExternal({ parts: { meta }, add, disksOn }: CheckContext, layer: AuditLayer): void {
  try {
    const row = meta.layers.byId(layer.id);
    if (row !== undefined) assertUnchanged(row);
  } catch (thrown) {
    if (!isOperatingError(thrown)) throw thrown;
    add({
      kind: thrown.kind === 'source-changed' ? 'external-changed' : thrown.kind === 'source-unreachable' ? 'external-unreachable' : 'row-unreadable',
      severity: 'corruption', layerId: layer.id, ...(layer.external_path === null ? {} : { file: layer.external_path }), disks: disksOn(layer.id), message: thrown.message,
    });
  }
}

/** What one layer owns, in steps: rows in order, none over another, each what it says, all of it within the file. */
function* checkOwnership(context: CheckContext, layerId: number): Generator<undefined, void, undefined> {
  const { parts: { meta, files }, add, disksOn } = context;
  let lastPage = -1;
  let endPage = 0;
  let lastRunEnd = -1;
  for (;;) {
    const [layer] = meta.audit.layersAfter(layerId - 1, 1);
    if (layer?.id !== layerId) return;
    const rows = meta.audit.pagesAfter(layerId, lastPage);
    const [first] = rows;
    if (first === undefined) return;
    const damage = (what: string): void => {
      add({
        kind: 'ownership', severity: 'corruption', layerId, disks: disksOn(layerId),
        message: `what the database says of the blocks of layer ${layerId} contradicts itself: ${what}; restore offshoot.db from a backup`,
      });
    };
    if (layer.complete === 1 || layer.kind === 'external') {
      damage('it owns every block, and has rows for some');
      return;
    }
    let ownedEnd = 0;
    for (const row of rows) {
      const problem = problemOf(row);
      if (problem !== null) damage(problem);
      if (row.first_page < endPage) damage(`pages from ${row.first_page} on are there twice`);
      if (row.bitmap === null && row.first_page === lastRunEnd) damage(`two runs of pages meet at page ${row.first_page}`);
      lastPage = row.first_page;
      endPage = Math.max(endPage, row.first_page + row.page_count);
      if (row.bitmap === null) lastRunEnd = row.first_page + row.page_count;
      // What was owned behind the end of a disk that was cut is not read any more.
      if (row.first_page * PAGE_BYTES < sizeOf(layer)) ownedEnd = Math.max(ownedEnd, Math.min(sizeOf(layer), endOf(row)));
    }
    const file = lookAt(files.storePath(layerId));
    const fileBytes = file instanceof OffshootError ? undefined : file?.size;
    // A missing file was reported already.
    if (fileBytes !== undefined && fileBytes < ownedEnd) {
      add({
        kind: 'layer-file-short', severity: 'corruption', layerId, file: files.storePath(layerId), offsetBytes: fileBytes, lengthBytes: ownedEnd - fileBytes,
        disks: disksOn(layerId),
        message: `the data file of layer ${layerId} has ${fileBytes} bytes, and blocks up to ${ownedEnd} are owned: its end is missing; restore it from a backup of the store`,
      });
      return;
    }
    yield;
  }
}

/** What is wrong with one row by itself. SQLite's own checks of the columns hold for what it wrote, not for what was damaged. */
function problemOf(row: AuditPages): string | null {
  if (!Number.isSafeInteger(row.first_page) || !Number.isSafeInteger(row.page_count) || row.page_count < 1) return `a row of ${row.page_count} pages from ${row.first_page} on`;
  if ((row.first_page + row.page_count) * PAGE_BYTES > DISK_BYTES_MAX) return `pages up to ${row.first_page + row.page_count} lie behind the end of the largest disk`;
  if (row.bitmap === null) return row.owned_blocks === row.page_count * PAGE_BLOCKS ? null : `${row.page_count} whole pages from ${row.first_page} on cannot hold ${row.owned_blocks} blocks`;
  if (row.bitmap.length !== PAGE_BITMAP_BYTES) return `the bitmap of page ${row.first_page} has ${row.bitmap.length} bytes`;
  const counted = countBlocks(row.bitmap);
  return counted === row.owned_blocks ? null : `page ${row.first_page} is said to hold ${row.owned_blocks} blocks, and its bitmap has ${counted}`;
}

/** Byte behind the last owned block of a row. */
function endOf(row: AuditPages): number {
  if (row.bitmap === null) return (row.first_page + row.page_count) * PAGE_BYTES;
  for (let block = PAGE_BLOCKS - 1; block >= 0; block -= 1) {
    if (((row.bitmap[Math.floor(block / 8)] ?? 0) & (1 << (block % 8))) !== 0) return row.first_page * PAGE_BYTES + (block + 1) * BLOCK_BYTES;
  }
  return 0;
}

/** Chains end: following backings never comes back to where it was. A missing backing is SQLite's to find. */
function checkChains({ parts: { meta }, add, disksOn }: CheckContext): void {
  const backings = meta.audit.backings();
  const sound = new Set<number>();
  for (const start of backings.keys()) {
    const way = new Set<number>();
    let at: number | undefined = start;
    while (at !== undefined && !sound.has(at) && !way.has(at)) {
      way.add(at);
      at = backings.get(at);
    }
    if (at !== undefined && way.has(at)) {
      add({
        kind: 'backing-chain', severity: 'corruption', layerId: at, disks: disksOn(at),
        message: `the backing chain of layer ${at} runs in a circle; restore offshoot.db from a backup`,
      });
    }
    for (const id of way) sound.add(id);
  }
}

/** The size that counts: an active layer is as long as its disk. */
function sizeOf(layer: AuditLayer): number {
  return layer.sealed === 0 && layer.node_size_bytes !== null ? layer.node_size_bytes : layer.size_bytes;
}

/** An error when the file system does not say what is there; undefined when nothing is. */
function lookAt(file: string): fs.Stats | OffshootError | undefined {
  try {
    return fs.lstatSync(file, { throwIfNoEntry: false });
  } catch (thrown) {
    const error = toOffshootError(thrown);
    if (error.kind === 'internal') throw thrown;
    return error;
  }
}

function isSizeBytes(value: number): boolean {
  return Number.isSafeInteger(value) && value >= 0 && value <= DISK_BYTES_MAX;
}
