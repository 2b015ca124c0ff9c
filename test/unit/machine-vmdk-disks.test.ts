/** Descriptors of VMware's disks: what of them comes into the store, and which of them a clone may have. */
import fs from 'node:fs';
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { vmdkDescriptor, parseVmdkDescriptor } from '../../daemon/machines/formats/vmdk.js';
import { vmxFormat } from '../../daemon/machines/formats/vmx.js';
import { assertClonable, fileOfClone, pathInTree } from '../../daemon/machines/machines.js';
import { descriptorOf, vmdkDiskOf, type VmdkDisk } from '../../daemon/machines/vmdk-disks.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();

afterEach(() => cleanup.run());

const BYTES = 64 * 1024;
const FLAT = vmdkDescriptor(BYTES, 'a-flat.vmdk', '1a2b3c4d');
const DELTA = FLAT.replace('parentCID=ffffffff', 'parentCID=1a2b3c4c\nparentFileNameHint="a.vmdk"').replace('VMFS "a-flat.vmdk"', 'VMFSSPARSE "a-000001-delta.vmdk"').replace('"vmfs"', '"vmfsSparse"');
const SESPARSE = FLAT.replace('VMFS "a-flat.vmdk"', 'SESPARSE "a-000001-sesparse.vmdk"').replace('"vmfs"', '"seSparse"');
const DEVICE = FLAT.replace('VMFS "a-flat.vmdk"', 'VMFSRDM "a-rdm.vmdk"').replace('"vmfs"', '"vmfsRawDeviceMap"');
const PIECES = FLAT.replace('RW 128 VMFS "a-flat.vmdk"', 'RW 64 FLAT "a-f001.vmdk" 0\nRW 64 FLAT "a-f002.vmdk" 0').replace('"vmfs"', '"twoGbMaxExtentFlat"');

function directoryWith(files: Readonly<Record<string, string | Buffer>>): string {
  const directory = makeTmpfsDir('vmdk', cleanup);
  for (const [name, content] of Object.entries(files)) fs.writeFileSync(path.join(directory, name), content);
  return directory;
}

async function problemOf(promise: Promise<unknown>): Promise<readonly [ErrorKind, string]> {
  try {
    await promise;
  } catch (thrown) {
    if (thrown instanceof OffshootError) return [thrown.kind, thrown.message];
    throw thrown;
  }
  throw new Error('nothing was refused');
}

const asItIs = (file: string): Promise<string> => Promise.resolve(file);
const imported = (directory: string, slot = 'scsi0:0'): Promise<VmdkDisk> => vmdkDiskOf(path.join(directory, 'a.vmdk'), slot, asItIs);

describe('a disk of VMware that is imported', () => {
  it('with a flat file of ESXi keeps its descriptor to the byte', async () => {
    const text = `${FLAT}ddb.uuid = "60 00 C2 91"\r\n`;
    const directory = directoryWith({ 'a.vmdk': text, 'a-flat.vmdk': Buffer.alloc(BYTES) });
    const disk = await imported(directory);
    expect(disk).toMatchObject({ file: path.join(directory, 'a-flat.vmdk'), name: 'a-flat.vmdk', format: 'raw', descriptorName: 'a.vmdk', descriptorFile: path.join(directory, 'a.vmdk') });
    expect(descriptorOf(disk, BYTES)).toBe(text);
  });

  it.each([['scsi0:0', 'lsilogic'], ['ide1:0', 'ide']])('with a flat file of Workstation gets a descriptor for ESXi (%s)', async (slot, adapter) => {
    const directory = directoryWith({ 'a.vmdk': vmdkDescriptor(BYTES, 'a-flat.vmdk', '1a2b3c4d', { createType: 'monolithicFlat' }), 'a-flat.vmdk': Buffer.alloc(BYTES) });
    const text = descriptorOf(await imported(directory, slot), BYTES);
    expect(parseVmdkDescriptor(text)).toMatchObject({ createType: 'vmfs', contentId: '1a2b3c4d', rawFile: 'a-flat.vmdk' });
    expect(text).toContain(`ddb.adapterType = "${adapter}"`);
  });

  it('that is sparse is converted, and gets a descriptor with the size that it then has', async () => {
    const disk = await imported(directoryWith({ 'a.vmdk': Buffer.concat([Buffer.from('KDMV'), Buffer.alloc(1024)]) }));
    expect(disk).toMatchObject({ name: 'a-flat.vmdk', format: 'vmdk', descriptorName: 'a.vmdk', descriptorFile: null });
    expect(parseVmdkDescriptor(descriptorOf(disk, BYTES))).toMatchObject({ createType: 'vmfs', rawFile: 'a-flat.vmdk', extents: [{ sizeBytes: BYTES }] });
  });

  it('whose descriptor leads out of its directory is asked for, and lies beside its descriptor in the store', async () => {
    const other = directoryWith({ 'b-flat.vmdk': Buffer.alloc(BYTES) });
    const outside = path.join(other, 'b-flat.vmdk');
    const directory = directoryWith({ 'a.vmdk': FLAT.replace('a-flat.vmdk', outside) });
    expect(await problemOf(vmdkDiskOf(path.join(directory, 'a.vmdk'), 'scsi0:0', (file) => Promise.reject(new OffshootError('permission-denied', file))))).toEqual(['permission-denied', outside]);
    const disk = await imported(directory);
    expect(disk).toMatchObject({ file: outside, name: 'b-flat.vmdk' });
    expect(parseVmdkDescriptor(descriptorOf(disk, BYTES)).rawFile).toBe('b-flat.vmdk');
  });

  it.each<readonly [string, string | Buffer, ErrorKind, string]>([
    ['the delta of a snapshot', DELTA, 'foreign-format', 'delete the snapshots'],
    ['the delta of a snapshot by SEsparse', SESPARSE, 'foreign-format', 'delete the snapshots'],
    ['the data of a snapshot', Buffer.concat([Buffer.from('COWD'), Buffer.alloc(1024)]), 'foreign-format', 'delete the snapshots'],
    ['a device of a host', DEVICE, 'foreign-format', 'device of a host'],
    ['a disk in pieces', PIECES, 'foreign-format', '2 pieces'],
    ['no disk of VMware', Buffer.alloc(4096), 'foreign-format', 'no descriptor'],
    ['a disk whose flat file is not there', FLAT.replace('a-flat', 'gone-flat'), 'not-found', 'gone-flat.vmdk'],
    ['a disk whose flat file is shorter than it says', vmdkDescriptor(BYTES + 512, 'a-flat.vmdk', '1a2b3c4d'), 'invalid-argument', 'cut off'],
  ])('and is %s is refused', async (_what, content, kind, message) => {
    const directory = directoryWith({ 'a.vmdk': content, 'a-flat.vmdk': Buffer.alloc(BYTES) });
    expect(await problemOf(imported(directory))).toEqual([kind, expect.stringContaining(message)]);
  });

  it('through a symbolic link is refused', async () => {
    const directory = directoryWith({ 'b.vmdk': FLAT, 'a-flat.vmdk': Buffer.alloc(BYTES) });
    fs.symlinkSync('b.vmdk', path.join(directory, 'a.vmdk'));
    expect((await problemOf(imported(directory)))[0]).toBe('invalid-argument');
  });
});

describe('a machine of VMware that is cloned', () => {
  const PLACES = { mountDir: '/mnt/x', roots: ['golden'] };
  const document = (file: string): ReturnType<typeof vmxFormat.parse> => vmxFormat.parse(`displayName = "a"\nscsi0:0.present = "TRUE"\nscsi0:0.fileName = "${file}"\n`);

  /** Of a container, with the machine in `m`. */
  async function assertMay(file: string, files: Readonly<Record<string, string | number>>): Promise<void> {
    const nodes = new Map(Object.entries(files).map(([at, content]) => [at, { kind: typeof content === 'number' ? 'disk' : 'file', sizeBytes: typeof content === 'number' ? content : content.length, name: at } as NodeRow]));
    await assertClonable(document(file), vmxFormat, 'golden/m', {
      pathOf: (each) => pathInTree(PLACES, 'm', each), nodeAt: (at) => nodes.get(at), read: (node) => Promise.resolve(String(files[node.name])),
    });
  }

  it.each(['a.vmdk', '/mnt/x/golden/m/a.vmdk'])('may name a descriptor as %s that leads to a raw disk beside it', async (file) => {
    await assertMay(file, { 'm/a.vmdk': FLAT, 'm/a-flat.vmdk': BYTES });
  });

  it('may have its disks in another directory of the container that is cloned, descriptor and all', async () => {
    await assertMay('../disks/a.vmdk', { 'disks/a.vmdk': FLAT, 'disks/a-flat.vmdk': BYTES });
  });

  it.each<readonly [string, string, Readonly<Record<string, string | number>>, ErrorKind, string]>([
    ['has no flat file', 'a.vmdk', { 'm/a.vmdk': FLAT }, 'not-found', 'a-flat.vmdk'],
    ['has no descriptor', 'a.vmdk', { 'm/a-flat.vmdk': BYTES }, 'not-found', 'a.vmdk'],
    ['has its flat file in another directory only', 'a.vmdk', { 'm/a.vmdk': FLAT, 'a-flat.vmdk': BYTES }, 'not-found', 'a-flat.vmdk'],
    ['has a descriptor with an absolute name', 'a.vmdk', { 'm/a.vmdk': FLAT.replace('a-flat.vmdk', '/mnt/x/golden/m/a-flat.vmdk'), 'm/a-flat.vmdk': BYTES }, 'invalid-argument', 'out of its own directory'],
    ['has a descriptor with a name that leads up', 'a.vmdk', { 'm/a.vmdk': FLAT.replace('a-flat.vmdk', '../n/a-flat.vmdk'), 'n/a-flat.vmdk': BYTES }, 'invalid-argument', 'out of its own directory'],
    ['is on a snapshot of its own', 'a.vmdk', { 'm/a.vmdk': DELTA, 'm/a-000001-delta.vmdk': BYTES }, 'foreign-format', 'delete the snapshots'],
    ['has a device of a host', 'a.vmdk', { 'm/a.vmdk': DEVICE, 'm/a-rdm.vmdk': BYTES }, 'foreign-format', 'device of a host'],
    ['has a disk where a descriptor should be', 'a.vmdk', { 'm/a.vmdk': BYTES }, 'foreign-format', 'no descriptor of a disk but a disk'],
    ['has a disk that is smaller than its descriptor says', 'a.vmdk', { 'm/a.vmdk': FLAT, 'm/a-flat.vmdk': BYTES - 512 }, 'invalid-argument', 'resize'],
    ['names its disk outside of what is cloned', '../../b/a.vmdk', {}, 'invalid-argument', 'outside'],
  ])('and %s is refused', async (_what, file, files, kind, message) => {
    expect(await problemOf(assertMay(file, files))).toEqual([kind, expect.stringContaining(message)]);
  });

  it('names its files relative to itself, in a snapshot too; what was relative stays, what lies elsewhere too', () => {
    const reference = (file: string): Parameters<ReturnType<typeof fileOfClone>>[0] => ({ slot: 'scsi0:0', file, role: 'disk', diskFormat: 'vmdk' });
    const places = { mountDir: '/mnt/x', roots: ['golden/.snapshots/v1', 'golden'] };
    const fileOf = fileOfClone(places, 'm', 'lab7', vmxFormat);
    expect(['/mnt/x/golden/m/a.vmdk', '/mnt/x/golden/.snapshots/v1/m/a.vmdk', '/mnt/x/golden/disks/a.vmdk', 'a.vmdk', '/vmfs/volumes/iso/a.iso'].map((file) => fileOf(reference(file))))
      .toEqual(['a.vmdk', 'a.vmdk', '../disks/a.vmdk', null, null]);
    expect(fileOfClone({ mountDir: '/mnt/x', roots: ['golden/m'] }, '', 'lab/a', vmxFormat)(reference('/mnt/x/golden/m/a.vmdk'))).toBe('a.vmdk');
    expect(fileOfClone(places, 'm', 'lab7', { ownFiles: 'absolute' })(reference('/mnt/x/golden/m/a.vmdk'))).toBe('/mnt/x/lab7/m/a.vmdk');
  });
});
