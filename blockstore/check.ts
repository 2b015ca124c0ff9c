/**
 * Check: holds the metadata against itself and against the files of the store, and says what does not agree.
 *
 * What is found is one of two things. *Corruption*: something that a disk needs is missing, too short or contradicts itself;
 * content is lost or wrong. A *leak*: something that nothing refers to takes space; no content is in danger, and a repair
 * takes it away. Nothing else is ever repaired here. Faulted disks are neither, and are listed apart: see `check-fault.ts`.
 *
 * Runs in the main thread, in steps. Within one step nobody else changes anything, and everything that makes or removes
 * a file together with its row does so within one turn of the event loop: so a file whose transaction has not committed is
 * never seen here, and a leak is repaired in the step that found it, while nothing can have begun to refer to it. Between
 * two steps other work goes on, and no step relies on what an earlier one saw. Content is not read: see `check-data.ts`.
 */
import fs from 'node:fs';
import path from 'node:path';

import { checkLayers } from './check-layers.js';
import type { CheckContext, CheckOptions, CheckParts, CheckProgress, CheckReport, FaultedDisk, Finding } from './check-report.js';
import { toOffshootError } from './errors.js';
import type { MetaStore } from './meta/meta-store.js';
import { reclaimLayers } from './reclaim.js';

export type { CheckOptions, CheckParts, CheckProgress, CheckReport, FaultedDisk, Finding } from './check-report.js';

const LAYER_DIRECTORIES = 256;
const LAYER_FILE = /^(\d+)\.layer$/u;
const DISKS_NAMED_MAX = 1000;

/** All steps at once: for a store that nobody uses, or that is small. */
export function checkStore(parts: CheckParts, options: CheckOptions = {}): CheckReport {
  const steps = checkSteps(parts, options);
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value;
  }
}

/** Gives the main thread back after each step. */
export function* checkSteps(parts: CheckParts, options: CheckOptions = {}): Generator<CheckProgress, CheckReport, undefined> {
  const findings: Finding[] = [];
  const faulted: FaultedDisk[] = [];
  const context: CheckContext = { parts, add: (finding) => findings.push(finding), disksOn: (layerId) => disksOn(parts.meta, layerId) };
  const total = LAYER_DIRECTORIES + 4;
  if (options.database !== false) {
    for (const problem of parts.meta.audit.databaseProblems()) context.add(databaseFinding(problem));
  }
  yield { done: 1, total };
  checkNodes(context, options, faulted);
  checkJobs(context, options);
  checkMachines(context);
  checkKnownDamage(context, options);
  yield { done: 2, total };
  for (const layers = checkLayers(context); layers.next().done !== true; ) yield { done: 3, total };
  for (let directory = 0; directory < LAYER_DIRECTORIES; directory += 1) {
    checkDirectory(context, options, directory);
    yield { done: 4 + directory, total };
  }
  checkTop(context);
  checkImports(context, options);
  checkUnreferenced(context, options);
  return reportOf(findings, faulted);
}

/** What is left to do about these findings, as a verdict. */
export function reportOf(findings: readonly Finding[], faulted: readonly FaultedDisk[]): CheckReport {
  const left = findings.filter((finding) => finding.repaired !== true);
  const isCorrupt = left.some((finding) => finding.severity === 'corruption');
  return { verdict: isCorrupt ? 'corruption' : left.length > 0 ? 'leaks' : 'clean', findings, faulted };
}

export function databaseFinding(problem: string): Finding {
  return { kind: 'database', severity: 'corruption', file: 'offshoot.db', message: `the database is damaged: ${problem}; restore offshoot.db from a backup` };
}

function disksOn(meta: MetaStore, layerId: number): string[] {
  return meta.layers.dependantNodes(layerId).slice(0, DISKS_NAMED_MAX).map((node) => pathOrId(meta, node.id));
}

/** A damaged tree may have no path for a node. */
function pathOrId(meta: MetaStore, nodeId: number): string {
  try {
    return meta.nodes.pathOf(nodeId);
  } catch (thrown) {
    if (toOffshootError(thrown).kind === 'internal') throw thrown;
    return `node ${nodeId}`;
  }
}

/** Every name hangs from the root, by directories only. */
function checkNodes({ parts: { meta, disks }, add }: CheckContext, options: CheckOptions, faulted: FaultedDisk[]): void {
  for (const [nodeId, reason] of options.notedFaults ?? []) {
    if (meta.nodes.byId(nodeId)?.fault === null) faulted.push({ nodeId, path: pathOrId(meta, nodeId), reason });
  }
  const isInUse = options.isNodeInUse ?? ((nodeId: number) => disks?.isUsed(nodeId) === true);
  for (const node of meta.audit.unusualNodes()) {
    if (node.fault !== null) faulted.push({ nodeId: node.id, path: pathOrId(meta, node.id), reason: node.fault });
    if (node.parent_id === null) {
      if (node.id === 1 || isInUse(node.id)) continue;
      if (options.repair === true) {
        // It may still be open for whoever comes next, with facts that were not committed.
        disks?.retireIdle(node.id);
        meta.nodes.remove(node.id);
      }
      add({
        kind: 'orphan-node', severity: 'leak', nodeId: node.id, repaired: options.repair === true,
        message: `node ${node.id} lost its last name, and nobody has it open: its removal did not come to its end`,
      });
    } else if (node.parent_kind !== 'directory') {
      add({
        kind: 'names', severity: 'corruption', nodeId: node.id,
        message: `node ${node.id} ("${node.name}") lies in node ${node.parent_id}, which is no directory; restore offshoot.db from a backup`,
      });
    } else if (node.is_reached === 0) {
      add({
        kind: 'names', severity: 'corruption', nodeId: node.id,
        message: `node ${node.id} ("${node.name}") cannot be reached from the root: the directories above it run in a circle; restore offshoot.db from a backup`,
      });
    }
  }
}

/** A machine is a directory; one that is being made has an operation that makes it, or undoes it. */
function checkMachines({ parts: { meta }, add }: CheckContext): void {
  for (const machine of meta.audit.unusualMachines()) {
    const isPlaced = machine.node_kind === 'directory' && machine.frozen === 0;
    add({
      kind: isPlaced ? 'dangling-machine' : 'machine-place', severity: isPlaced ? 'leak' : 'corruption',
      message: isPlaced
        ? `the machine "${machine.name}" was never finished, and operation ${machine.job_id ?? 0}, which made it, is over: remove it (offshoot vm rm)`
        : `the machine "${machine.name}" lies where no machine can be; restore offshoot.db from a backup`,
    });
  }
}

/** A fill needs its disk; every other row is history. */
function checkJobs({ parts: { meta }, add }: CheckContext, options: CheckOptions): void {
  for (const job of meta.jobs.list({ states: ['running', 'paused'] })) {
    if (job.nodeId === null || meta.nodes.byId(job.nodeId) !== undefined) continue;
    if (options.repair === true) meta.jobs.update(job.id, { state: 'cancelled', message: 'what it worked on is gone', updatedUs: Date.now() * 1000 });
    add({
      kind: 'dangling-job', severity: 'leak', repaired: options.repair === true,
      message: `job ${job.id} (${job.kind}, ${job.state}) works on node ${job.nodeId}, which does not exist any more`,
    });
  }
}

/** What the scrub found wrong with the content of sealed layers, and did not find right again since. */
function checkKnownDamage({ parts: { meta, files }, add, disksOn: disks }: CheckContext, options: CheckOptions): void {
  for (const { layerId, offsetBytes, lengthBytes, kind, foundUs } of meta.checksums.damages()) {
    const layer = meta.layers.byId(layerId);
    if (layer === undefined || options.isReadAnew?.(layerId) === true) continue;
    const file = files.pathOf(layer);
    const what = kind === 'damaged' ? 'are not what was sealed' : 'cannot be read';
    add({
      kind: kind === 'damaged' ? 'data-damaged' : 'data-unreadable', severity: 'corruption', layerId, file, offsetBytes, lengthBytes, disks: disks(layerId),
      message: `layer ${layerId}: ${lengthBytes} bytes at ${offsetBytes} of ${file} ${what}, as a scrub found (${new Date(foundUs / 1000).toISOString()}); restore the file from a backup of the store`,
    });
  }
}

/** Files of layers that are not there. Only where Offshoot puts them: a copy that lies elsewhere is somebody's, perhaps on its way back from a backup. */
function checkDirectory({ parts: { meta, files }, add }: CheckContext, options: CheckOptions, index: number): void {
  const directory = path.join(files.directory, index.toString(16).padStart(2, '0'));
  for (const entry of readDirectory(directory)) {
    const file = path.join(directory, entry.name);
    const id = Number(LAYER_FILE.exec(entry.name)?.[1] ?? Number.NaN);
    if (!Number.isSafeInteger(id)) {
      add(strayFile(file));
      continue;
    }
    if (files.storePath(id) === file && meta.layers.byId(id)?.kind === 'store') continue;
    if (files.storePath(id) !== file || !entry.isFile()) {
      add(strayFile(file));
      continue;
    }
    const bytes = sizeOnDisk(file);
    const repaired = options.repair === true && isTakenAway(() => { files.unlink(id); });
    add({
      kind: 'stray-layer-file', severity: 'leak', layerId: id, file, lengthBytes: bytes, repaired,
      message: `${file} belongs to no layer: a removal, import or clone that died left it`,
    });
  }
}

/** `layers` itself holds directories only. */
function checkTop({ parts: { files }, add }: CheckContext): void {
  for (const entry of readDirectory(files.directory)) {
    const file = path.join(files.directory, entry.name);
    if (/^[0-9a-f]{2}$/u.test(entry.name) && entry.isDirectory()) continue;
    add(strayFile(file));
  }
}

/** Temporary files begin with the number of the import that makes them. */
function checkImports({ parts: { meta, files, disks }, add }: CheckContext, options: CheckOptions): void {
  const running = disks === undefined ? new Set<number>() : new Set(meta.jobs.list({ states: ['running', 'paused'] }).map((job) => job.id));
  const directory = path.join(files.storeDir, 'import');
  for (const entry of readDirectory(directory)) {
    if (running.has(Number.parseInt(entry.name, 10))) continue;
    const file = path.join(directory, entry.name);
    const repaired = options.repair === true && isTakenAway(() => { fs.rmSync(file, { recursive: true, force: true }); });
    add({ kind: 'stray-import', severity: 'leak', file, repaired, message: `${file} is left of an import that did not come to its end` });
  }
}

/** Layers that nothing reads through: a removal that died between the name and the data. */
function checkUnreferenced({ parts, add }: CheckContext, options: CheckOptions): void {
  const { meta } = parts;
  const unreferenced = meta.layers.unreferenced();
  if (unreferenced.length > 0 && options.repair === true) reclaimLayers(parts);
  for (const layer of unreferenced) {
    add({ kind: 'unreferenced-layer', severity: 'leak', layerId: layer.id, repaired: options.repair === true, message: `nothing reads through layer ${layer.id}` });
  }
}

/** Not made by Offshoot: whoever put it there has to say what it is. */
function strayFile(file: string): Finding {
  return { kind: 'stray-file', severity: 'leak', file, message: `${file} is no file of Offshoot's: remove it by hand if it should not be there` };
}

/** A file that cannot be removed stays a leak: that must not keep a check from its end. */
function isTakenAway(remove: () => void): boolean {
  try {
    remove();
    return true;
  } catch (thrown) {
    if (toOffshootError(thrown).kind === 'internal') throw thrown;
    return false;
  }
}

function readDirectory(directory: string): fs.Dirent[] {
  try {
    return fs.readdirSync(directory, { withFileTypes: true });
  } catch (thrown) {
    const error = toOffshootError(thrown);
    // What lay in it is found to be missing, layer by layer.
    if (error.kind === 'not-found' || error.kind === 'not-a-directory') return [];
    throw error;
  }
}

function sizeOnDisk(file: string): number {
  return (fs.lstatSync(file, { throwIfNoEntry: false })?.blocks ?? 0) * 512;
}
