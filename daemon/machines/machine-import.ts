/**
 * Import of a machine from a directory of the host: its disks by the imports that there are, everything else copied, its configuration
 * rewritten to where the files lie now. One operation, done or undone as a whole. Main thread.
 *
 *   1. the directory is read: one configuration, what it names, what else lies there     (dies: nothing was made)
 *   2. the machine's directory and row are made, as `making`                             (dies: undone by the next server, as everything below)
 *   3. each disk is imported; images of other formats are converted to raw ones
 *   4. the other files, descriptors of disks, and the configuration are written and synced
 *   5. one transaction: the machine is `ready`, the job is completed
 *
 * Whoever wrote the configuration decides about paths of this host in it, so what lies outside of the directory is refused unless the
 * administrator names it: a disk that was named is imported, anything else is left where it is. Symbolic links are not followed.
 */
import fs from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';

import { OffshootError, isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import type { JobRow, NodeRow } from '../../blockstore/meta/rows.js';
import { shown } from '../filesystem/names.js';
import type { Imports } from '../jobs/imports.js';
import type { FileReference, MachineDocument, MachineFormat } from './format.js';
import { canHaveMac, newIdentity, normalMac, normalUuid } from './identities.js';
import { replaceContents } from './machine-files.js';
import { MACHINE_IMPORT_JOB, type MachineOperations, type OperationParts } from './machine-operations.js';
import { CONFIGURATION_BYTES_MAX } from './machines.js';
import { descriptorOf, vmdkDiskOf, type VmdkDisk } from './vmdk-disks.js';

export interface MachineImportParts extends OperationParts {
  readonly imports: Imports;
}

export interface ImportMachineRequest {
  /** Absolute, of the host. */
  readonly directory: string;
  readonly target: string;
  /** Files outside of the directory that the configuration may name. */
  readonly allow: readonly string[];
}

interface FoundDisk {
  /** On the host. */
  readonly file: string;
  /** In the machine's directory. */
  readonly name: string;
  readonly format: string | null;
  /** Of VMware: with a descriptor, which is what the configuration names. */
  readonly vmdk: VmdkDisk | null;
}

interface Found {
  readonly directory: string;
  readonly format: MachineFormat;
  readonly configuration: string;
  readonly document: MachineDocument;
  /** By the reference's slot. */
  readonly disks: ReadonlyMap<string, FoundDisk>;
  /** Files that come along as they are. */
  readonly others: readonly string[];
}

const STEPS = 5;
const DESCRIPTOR_MODE = 0o644;
const FILES_MAX = 1000;
/** Whatever lies beside a machine's disks is small; what is not was meant to be one. */
const OTHER_BYTES_MAX = 64 * 1024 * 1024;
const LOOK_MS = 100;
const CONVERTED = ['qcow2', 'vmdk', 'vhdx', 'vdi'] as const;

export class MachineImports {
  readonly #parts: MachineImportParts;
  readonly #operations: MachineOperations;

  constructor(parts: MachineImportParts, operations: MachineOperations) {
    this.#parts = parts;
    this.#operations = operations;
  }

  start(request: ImportMachineRequest): JobRow {
    if (!path.isAbsolute(request.directory)) throw new OffshootError('invalid-argument', `${shown(request.directory)} is no absolute path`, { path: request.directory });
    this.#parts.fileSystem.namespace.resolveNew(request.target);
    return this.#operations.begin(MACHINE_IMPORT_JOB, `step 1 of ${STEPS}: reading ${request.directory}`, {
      target: request.target, source: request.directory, targets: [request.target], roots: [], errorKind: null,
    }, async (jobId, signal) => { await this.#steps(jobId, request, signal); });
  }

  async #steps(jobId: number, request: ImportMachineRequest, signal: AbortSignal): Promise<void> {
    const { store, forgetAttributes } = this.#parts;
    const { meta } = store;
    const found = await this.#read(request); // Step 1.
    signal.throwIfAborted();
    const directory = this.#make(jobId, request, found); // Step 2.
    await forgetAttributes(directory.parentId ?? 0);
    let done = 0;
    for (const disk of found.disks.values()) { // Step 3.
      done += 1;
      const what = `step 3 of ${STEPS}: importing disk ${done} of ${found.disks.size}, ${disk.name}`;
      this.#operations.say(jobId, what);
      await this.#importDisk(disk, `${request.target}/${disk.name}`, signal, (progress) => { this.#operations.say(jobId, `${what}, ${progress}`); });
    }
    this.#operations.say(jobId, `step 4 of ${STEPS}: writing the configuration and ${found.others.length} other files`);
    await this.#writeOthers(request, found, directory); // Step 4.
    signal.throwIfAborted();
    meta.transaction(() => { // Step 5.
      meta.machines.ready(jobId);
      meta.jobs.update(jobId, { state: 'completed', updatedUs: Date.now() * 1000, message: `${found.disks.size} ${found.disks.size === 1 ? 'disk' : 'disks'} and ${found.others.length + 1} ${found.others.length === 0 ? 'file' : 'files'} of ${found.directory}` });
    });
  }

  async #read(request: ImportMachineRequest): Promise<Found> {
    // By its name first: nothing of the server looks at what lies under its own mount.
    assertElsewhere(this.#parts.mountDir, path.normalize(request.directory));
    const directory = await fs.realpath(request.directory).catch((thrown: unknown) => {
      const error = toOffshootError(thrown);
      throw error.kind === 'not-found' ? new OffshootError('not-found', `${request.directory} does not exist on this host: give the directory with the machine's configuration and disks`, { path: request.directory }, thrown) : error;
    });
    assertElsewhere(this.#parts.mountDir, directory);
    const allowed = new Set(await Promise.all(request.allow.map(async (file) => await fs.realpath(file).catch(() => path.resolve(file)))));
    const names: string[] = [];
    const directories: string[] = [];
    const entries = await fs.readdir(directory, { withFileTypes: true }).catch((thrown: unknown) => {
      const error = toOffshootError(thrown);
      throw error.kind === 'not-a-directory' ? new OffshootError('not-a-directory', `${directory} is no directory: give the one that the machine's configuration and disks lie in`, { path: directory }, thrown) : error;
    });
    for (const entry of entries) {
      if (names.length === FILES_MAX) throw new OffshootError('too-large', `${directory} holds more than ${FILES_MAX} files: a machine's directory holds its disks, its configuration and little else`);
      if (entry.isFile()) names.push(entry.name);
      else if (entry.isDirectory()) directories.push(entry.name);
      else if (entry.isSymbolicLink()) throw new OffshootError('invalid-argument', `${path.join(directory, entry.name)} is a symbolic link, which is not followed: put the file itself there`, { path: entry.name });
    }
    const configurations: { readonly name: string; readonly format: MachineFormat; readonly text: string }[] = [];
    for (const name of names) {
      if (!/(?:\.xml|\.vmx|^machine\.json)$/iu.test(name)) continue;
      const text = (await readSmall(path.join(directory, name), CONFIGURATION_BYTES_MAX)).content.toString('utf8');
      const format = this.#parts.adapters.formatOf(name, text);
      if (format !== null) configurations.push({ name, format, text });
    }
    const [one, other] = configurations;
    if (one === undefined || other !== undefined) {
      throw new OffshootError('invalid-argument', one === undefined ? `${directory} holds no configuration that Offshoot knows: NAME.xml of libvirt, NAME.vmx, or machine.json`
        : `${directory} holds two configurations, ${shown(one.name)} and ${shown(other?.name ?? '')}: a machine has one`, { path: directory });
    }
    const left = directories.find((name) => !one.format.isRegenerated(name));
    if (left !== undefined) throw new OffshootError('invalid-argument', `${directory} holds the directory ${shown(left)}: the files of a machine lie side by side, move them, or take the directory away`, { path: left });
    const document = one.format.parse(one.text);
    const disks = new Map<string, FoundDisk>();
    const taken = new Set<string>();
    const outside: FileReference[] = [];
    for (const reference of document.facts().files) {
      const file = await allowedFile(directory, allowed, reference);
      if (file === null) outside.push(reference);
      if (file === null || reference.role !== 'disk') continue;
      const vmdk = one.format.diskFiles === 'vmdk' && reference.diskFormat === 'vmdk'
        ? await vmdkDiskOf(file, reference.slot, async (flat) => await requireAllowed(directory, allowed, { ...reference, file: flat })) : null;
      const disk = vmdk === null ? { file, name: nameOfDisk(file, reference.diskFormat), format: reference.diskFormat, vmdk } : { file: vmdk.file, name: vmdk.name, format: vmdk.format, vmdk };
      for (const name of vmdk === null ? [disk.name] : [disk.name, vmdk.descriptorName]) {
        if (taken.has(name)) throw new OffshootError('already-exists', `two disks of the machine would be called ${shown(name)}: rename one of them first`, { name });
        taken.add(name);
      }
      disks.set(reference.slot, disk);
    }
    if (outside.length > 0) throw notAllowed(directory, outside);
    const isDisk = new Set([...disks.values()].flatMap(({ file, vmdk }) => [file, vmdk?.descriptorFile ?? file]));
    const others = names.filter((name) => name !== one.name && !isDisk.has(path.join(directory, name)) && !one.format.isRegenerated(name));
    const clash = others.find((name) => taken.has(name));
    if (clash !== undefined) throw new OffshootError('already-exists', `${shown(clash)} is the name of a file and would be that of a disk: rename one of them first`, { name: clash });
    return { directory, format: one.format, configuration: one.name, document, disks, others };
  }

  #make(jobId: number, request: ImportMachineRequest, { format, configuration, document }: Found): NodeRow {
    const { fileSystem, store } = this.#parts;
    const { meta } = store;
    return meta.transaction(() => {
      const { parent, name } = fileSystem.namespace.resolveNew(request.target);
      const made = fileSystem.namespace.mkdir(parent.id, name, 0o755, { uid: parent.uid, gid: parent.gid, pid: 0 });
      const directory = meta.nodes.byId(made.nodeId);
      if (directory === undefined) throw new Error('what was made is there');
      const facts = document.facts();
      const isFree = (mac: string): boolean => meta.machines.byMac(mac) === undefined && canHaveMac(format.id, mac);
      const fresh = newIdentity({
        format: format.id, macCount: facts.macs.length, seed: null, path: request.target,
        isTaken: (kind, value) => (kind === 'uuid' ? meta.machines.byUuid(value) : meta.machines.byMac(value)) !== undefined,
      });
      const uuid = normalUuid(facts.uuid ?? '');
      const macs: string[] = [];
      facts.macs.forEach((each, i) => {
        const mac = each === null ? null : normalMac(each);
        // What it was called elsewhere, where that is free here.
        macs.push(mac !== null && isFree(mac) && !macs.includes(mac) ? mac : (fresh.macs[i] ?? ''));
      });
      meta.machines.insert({
        nodeId: directory.id, format: format.id, configuration, name, uuid: uuid !== null && meta.machines.byUuid(uuid) === undefined ? uuid : fresh.uuid, macs, state: 'making', jobId,
      });
      const { parameters } = meta.jobs.byId(jobId) ?? { parameters: {} };
      meta.jobs.update(jobId, { parameters: { ...(parameters as object), roots: [directory.id] }, updatedUs: Date.now() * 1000 });
      return directory;
    });
  }

  async #importDisk(disk: { readonly file: string; readonly format: string | null }, target: string, signal: AbortSignal, say: (progress: string) => void): Promise<void> {
    const { imports, store } = this.#parts;
    const format = CONVERTED.find((each) => each === disk.format) ?? null;
    if (format === null && disk.format !== null && disk.format !== 'raw') throw new OffshootError('foreign-format', `${disk.file} is given as ${disk.format}, which cannot be converted: convert it with \`qemu-img convert -O raw\` first`, { path: disk.file });
    let jobId: number | null = null;
    let shownTenths = -1;
    for (;;) {
      try {
        jobId ??= imports.start({ file: disk.file, target, inPlace: false, format }).id;
        const job = store.meta.jobs.byId(jobId);
        if (job?.state === 'completed') return;
        if (job?.state !== 'running') {
          const { errorKind } = (job?.parameters ?? {}) as { readonly errorKind?: OffshootError['kind'] | null };
          throw new OffshootError(errorKind ?? 'io-error', job?.message ?? 'the import of a disk is gone', { path: disk.file });
        }
        const tenths = job.progressTotal === 0 ? 0 : Math.floor((10 * job.progressDone) / job.progressTotal);
        if (tenths > shownTenths && tenths > 0) say(`${10 * tenths} %`);
        shownTenths = Math.max(shownTenths, tenths);
      } catch (thrown) {
        // Others are importing, too: in turn.
        if (!(isOperatingError(thrown) && thrown.kind === 'busy' && jobId === null)) throw thrown;
      }
      try {
        await delay(LOOK_MS, undefined, { signal });
      } catch (thrown) {
        if (jobId !== null) await imports.cancel(jobId);
        throw thrown;
      }
    }
  }

  async #writeOthers(request: ImportMachineRequest, { directory: from, format, configuration, document, disks, others }: Found, directory: NodeRow): Promise<void> {
    const { store, fileSystem, mountDir, forgetAttributes } = this.#parts;
    const { meta } = store;
    const row = meta.machines.byNode(directory.id);
    if (row === undefined) throw new OffshootError('not-found', `${request.target} was removed while it was imported`, { path: request.target });
    const place = format.ownFiles === 'relative' ? '' : path.posix.join(mountDir, request.target);
    document.customise({
      name: row.name, uuid: row.uuid, macs: row.macs,
      fileOf: (reference) => {
        const disk = disks.get(reference.slot);
        if (disk !== undefined) return path.posix.join(place, disk.vmdk?.descriptorName ?? disk.name);
        const real = path.resolve(from, reference.file);
        // Variables that the hypervisor makes anew are not there.
        if (reference.role === 'nvram' && format.isRegenerated(path.basename(real))) return null;
        return isWithin(from, real) ? path.posix.join(place, path.relative(from, real)) : null;
      },
    });
    const text = Buffer.from(document.toText(), 'utf8');
    const owner = { uid: directory.uid, gid: directory.gid, pid: 0 };
    // Whom a file was kept from, it is kept from here too: keys, and passwords of consoles.
    const contents: { readonly name: string; readonly content: Buffer; readonly mode: number }[] = [{ name: configuration, content: text, mode: (await readSmall(path.join(from, configuration), CONFIGURATION_BYTES_MAX)).mode }];
    for (const { name, vmdk } of disks.values()) {
      const node = vmdk === null ? undefined : meta.nodes.child(directory.id, name);
      if (vmdk !== null) contents.push({ name: vmdk.descriptorName, content: Buffer.from(descriptorOf(vmdk, node?.sizeBytes ?? 0), 'utf8'), mode: DESCRIPTOR_MODE });
    }
    for (const name of others) contents.push({ name, ...await readSmall(path.join(from, name), OTHER_BYTES_MAX) });
    const made = meta.transaction(() => contents.map(({ name, content, mode }) => ({ nodeId: fileSystem.namespace.create(directory.id, name, mode, owner).nodeId, content })));
    await replaceContents(store, made);
    for (const { nodeId } of made) fileSystem.contentReplaced(nodeId);
    await forgetAttributes(directory.id);
  }
}

/** Where a file really lies that the configuration may name; null when it may not. One that is not there is for its import to complain of; an nvram may not be there yet. */
async function allowedFile(directory: string, allowed: ReadonlySet<string>, { file }: FileReference): Promise<string | null> {
  const given = path.resolve(directory, file);
  const real = await fs.realpath(given).catch(() => given);
  return isWithin(directory, real) || allowed.has(real) || allowed.has(given) ? real : null;
}

async function requireAllowed(directory: string, allowed: ReadonlySet<string>, reference: FileReference): Promise<string> {
  const file = await allowedFile(directory, allowed, reference);
  if (file === null) throw notAllowed(directory, [reference]);
  return file;
}

/** All of them at once, so that one command more is enough. */
function notAllowed(directory: string, references: readonly FileReference[]): OffshootError {
  const files = [...new Set(references.map(({ file }) => file))];
  const named = references.map(({ file, slot }) => `${shown(file)} (${slot})`).join(', ');
  return new OffshootError('permission-denied',
    `the configuration names ${named}, ${files.length === 1 ? 'which lies' : 'which lie'} outside of ${directory}: if that is right, name ${files.length === 1 ? 'it' : 'them'} with ${files.map((file) => `--allow ${file}`).join(' ')}`,
    { path: files[0] ?? '', slot: references[0]?.slot ?? '' });
}

/** A raw disk under the name of another format would be taken for one. */
function nameOfDisk(file: string, format: string | null): string {
  const name = path.basename(file);
  return format === null || format === 'raw' ? name : `${name.replace(/\.(?:qcow2|vmdk|vhdx|vdi)$/iu, '')}.img`;
}

function assertElsewhere(mountDir: string, directory: string): void {
  if (isWithin(mountDir, directory)) throw new OffshootError('invalid-argument', `${directory} lies under the mount: it is in the store already (offshoot clone, offshoot vm clone)`, { path: directory });
}

function isWithin(directory: string, file: string): boolean {
  return file === directory || file.startsWith(directory.endsWith('/') ? directory : `${directory}/`);
}

/** The file itself, and no more of it than it may have. */
async function readSmall(file: string, bytesMax: number): Promise<{ readonly content: Buffer; readonly mode: number }> {
  try {
    const handle = await fs.open(file, fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW | fs.constants.O_NONBLOCK);
    try {
      const stat = await handle.stat();
      if (!stat.isFile()) throw new OffshootError('invalid-argument', `${file} is no ordinary file`, { path: file });
      if (stat.size > bytesMax) throw new OffshootError('too-large', `${file} has ${stat.size} bytes, and the configuration does not name it as a disk: take it away, or import it as a disk of its own`, { path: file });
      const bytes = Buffer.alloc(stat.size);
      const { bytesRead } = await handle.read(bytes, 0, bytes.length, 0);
      return { content: bytes.subarray(0, bytesRead), mode: stat.mode & 0o777 };
    } finally {
      await handle.close();
    }
  } catch (thrown) {
    throw toOffshootError(thrown);
  }
}
