/**
 * One check from its beginning to its end: the database, the metadata against the files, the content if asked, the faults
 * of what was named. The same for a store that is served and for one that is not.
 *
 * Main thread. The metadata is looked at in steps, between which everything else goes on; content is read by a hash worker.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';

import { checkSteps, databaseFinding, reportOf } from '../../blockstore/check.js';
import type { CheckParts, CheckReport, Finding } from '../../blockstore/check-report.js';
import type { OffshootError } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { layersBelow } from '../../blockstore/shared-origins.js';
import type { Hasher } from './hasher.js';
import { readChunk, type Found } from './layer-data.js';
import { liftFault, type LiftParts } from './lift-faults.js';

export interface CheckRequest {
  /** Node whose disks are concerned; null: all, and no fault is lifted. */
  readonly target: NodeRow | null;
  readonly data: boolean;
  readonly repair: boolean;
}

export interface LiftedFault {
  readonly path: string;
  readonly lostBytes: number;
}

export interface CheckOutcome extends CheckReport {
  readonly lifted: readonly LiftedFault[];
  /** Faults that were not lifted although that was asked for, and why. */
  readonly notLifted: readonly { readonly path: string; readonly reason: string }[];
  readonly layersChecked: number;
  /** Sealed layers whose content could only be read, for there is nothing to compare it with yet. */
  readonly layersWithoutChecksums: number;
  readonly bytesRead: number;
}

export interface CheckRunParts extends CheckParts {
  /** SQLite's own check of its file, done by somebody who can take the time. */
  databaseProblems(): Promise<readonly string[]>;
  readonly isNodeInUse?: (nodeId: number) => boolean;
  /** Faults that are not in the database yet, by node. */
  readonly notedFaults?: () => ReadonlyMap<number, string>;
  readonly makeHasher: () => Hasher;
  readonly lift: Pick<LiftParts, 'prepare' | 'clear'>;
}

export interface RunHooks {
  readonly signal: AbortSignal;
  readonly progress: (phase: CheckPhase, doneBytes: number, totalBytes: number) => void;
}

export type CheckPhase = 'database' | 'metadata' | 'data' | 'faults';

export async function runCheck(parts: CheckRunParts, request: CheckRequest, hooks: RunHooks): Promise<CheckOutcome> {
  const { meta } = parts;
  const findings: Finding[] = [];
  hooks.progress('database', 0, 0);
  findings.push(...(await parts.databaseProblems()).map(databaseFinding));
  hooks.signal.throwIfAborted();
  const nodes = request.target === null ? null : disksOf(parts, request.target);
  const metadata = await runSteps(parts, request, nodes, hooks);
  findings.push(...metadata.findings);

  let layersChecked = 0;
  let layersWithoutChecksums = 0;
  let bytesRead = 0;
  const lifted: LiftedFault[] = [];
  const notLifted: { path: string; reason: string }[] = [];
  const faulted = request.repair && nodes !== null ? metadata.faulted.filter((fault) => nodes.some((node) => node.id === fault.nodeId)) : [];
  if (request.data || faulted.length > 0) {
    const hasher = parts.makeHasher();
    const stop = (): void => { void hasher.close(); };
    hooks.signal.addEventListener('abort', stop, { once: true });
    try {
      if (request.data) ({ layersChecked, layersWithoutChecksums, bytesRead } = await checkData(parts, hasher, nodes, findings, hooks));
      for (const fault of faulted) {
        const totalBytes = meta.nodes.byId(fault.nodeId)?.sizeBytes ?? 0;
        let doneBytes = 0;
        hooks.progress('faults', 0, totalBytes);
        const result = await liftFault({ meta, files: parts.files, hasher, ...parts.lift }, fault.nodeId, (bytes) => {
          doneBytes += bytes;
          hooks.progress('faults', doneBytes, totalBytes);
        });
        findings.push(...result.findings);
        if (result.lifted) lifted.push({ path: fault.path, lostBytes: result.lostBytes });
        else notLifted.push({ path: fault.path, reason: result.reason ?? '' });
      }
    } finally {
      hooks.signal.removeEventListener('abort', stop);
      await hasher.close();
    }
  }
  const stillFaulted = metadata.faulted.filter((fault) => !lifted.some((one) => one.path === fault.path));
  return { ...reportOf(findings, stillFaulted), lifted, notLifted, layersChecked, layersWithoutChecksums, bytesRead };
}

async function runSteps(parts: CheckRunParts, request: CheckRequest, nodes: readonly NodeRow[] | null, hooks: RunHooks): Promise<CheckReport> {
  const readAnew = new Set(request.data ? layersOf(parts, nodes) : []);
  const steps = checkSteps(parts, { database: false, isReadAnew: (layerId) => readAnew.has(layerId), repair: request.repair, ...(parts.notedFaults === undefined ? {} : { notedFaults: parts.notedFaults() }), ...(parts.isNodeInUse === undefined ? {} : { isNodeInUse: parts.isNodeInUse }) });
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value;
    hooks.progress('metadata', 0, 0);
    await nextTurn();
    hooks.signal.throwIfAborted();
  }
}

/** The disks and files that a target stands for. */
function disksOf({ meta }: CheckRunParts, target: NodeRow): NodeRow[] {
  return target.kind === 'directory' ? [...meta.nodes.disksUnder(target.id)] : target.layerId === null ? [] : [target];
}

/** Sealed layers, all of them or those that some nodes stand on, each once. */
async function checkData(
  parts: CheckRunParts, hasher: Hasher, nodes: readonly NodeRow[] | null, findings: Finding[], hooks: RunHooks,
): Promise<{ layersChecked: number; layersWithoutChecksums: number; bytesRead: number }> {
  const { meta } = parts;
  const layerIds = layersOf(parts, nodes);
  const totalBytes = layerIds.reduce((sum, id) => sum + (meta.layers.byId(id)?.sizeBytes ?? 0), 0);
  let doneBytes = 0;
  let bytesRead = 0;
  let layersWithoutChecksums = 0;
  for (const layerId of layerIds) {
    const found: Found[] = [];
    const sizeBytes = meta.layers.byId(layerId)?.sizeBytes ?? 0;
    let isCompared = true;
    for (let at = 0; at < sizeBytes; ) {
      hooks.progress('data', doneBytes + at, totalBytes);
      const result = await readChunk(parts, hasher, layerId, at, { keep: false, fromDisk: true, rateBytesPerSecond: 0 });
      hooks.signal.throwIfAborted();
      if (result === null) break;
      // A missing file and a changed source were found already; whatever else keeps it from being read is new.
      if (result.error !== null) {
        addUnlessKnown(findings, layerId, unreadableLayer(parts, layerId, result.error));
        isCompared = false;
        break;
      }
      found.push(...result.found);
      bytesRead += result.readBytes;
      if (!result.compared) isCompared = false;
      at += result.lengthBytes;
    }
    doneBytes += sizeBytes;
    if (!isCompared && meta.layers.byId(layerId) !== undefined) layersWithoutChecksums += 1;
    // Removed meanwhile, it is nobody's any more.
    if (meta.layers.byId(layerId) === undefined) continue;
    for (const one of joined(found)) findings.push(dataFinding(parts, layerId, one));
  }
  hooks.progress('data', totalBytes, totalBytes);
  return { layersChecked: layerIds.length, layersWithoutChecksums, bytesRead };
}

function layersOf(parts: CheckRunParts, nodes: readonly NodeRow[] | null): number[] {
  return nodes === null ? allSealed(parts) : sealedBelow(parts, nodes);
}

function allSealed({ meta }: CheckRunParts): number[] {
  const ids: number[] = [];
  for (let id = meta.checksums.sealedAfter(0); id !== undefined; id = meta.checksums.sealedAfter(id)) ids.push(id);
  return ids;
}

function sealedBelow({ meta }: CheckRunParts, nodes: readonly NodeRow[]): number[] {
  const ids = new Set<number>();
  for (const { layerId } of nodes) {
    if (layerId === null) continue;
    for (const layer of layersBelow(meta, layerId)) if (layer.sealed) ids.add(layer.id);
  }
  return [...ids].sort((a, b) => a - b);
}

/** Chunks end where damage need not. */
function joined(found: readonly Found[]): Found[] {
  const result: { offsetBytes: number; lengthBytes: number; kind: Found['kind'] }[] = [];
  for (const one of [...found].sort((a, b) => a.offsetBytes - b.offsetBytes)) {
    const last = result.at(-1);
    if (last?.kind === one.kind && last.offsetBytes + last.lengthBytes === one.offsetBytes) last.lengthBytes += one.lengthBytes;
    else result.push({ ...one });
  }
  return result;
}

function dataFinding({ meta, files }: CheckRunParts, layerId: number, found: Found): Finding {
  const layer = meta.layers.byId(layerId);
  const file = layer === undefined ? '' : files.pathOf(layer);
  const what = found.kind === 'damaged' ? 'are not what was sealed' : 'cannot be read';
  return {
    kind: found.kind === 'damaged' ? 'data-damaged' : 'data-unreadable', severity: 'corruption', layerId, file, offsetBytes: found.offsetBytes, lengthBytes: found.lengthBytes,
    disks: meta.layers.dependantNodes(layerId).slice(0, 1000).map((node) => meta.nodes.pathOf(node.id)),
    message: `layer ${layerId}: ${found.lengthBytes} bytes at ${found.offsetBytes} of ${file} ${what}; restore the file from a backup of the store`,
  };
}

function unreadableLayer({ meta, files }: CheckRunParts, layerId: number, error: OffshootError): Finding {
  const layer = meta.layers.byId(layerId);
  return {
    kind: 'data-unreadable', severity: 'corruption', layerId, ...(layer === undefined ? {} : { file: files.pathOf(layer) }),
    disks: meta.layers.dependantNodes(layerId).slice(0, 1000).map((node) => meta.nodes.pathOf(node.id)), message: `layer ${layerId} cannot be read: ${error.message}`,
  };
}

function addUnlessKnown(findings: Finding[], layerId: number, finding: Finding): void {
  if (!findings.some((known) => known.layerId === layerId && known.severity === 'corruption')) findings.push(finding);
}
