/**
 * Headers of foreign images that speak of other files: made by hand as an attacker would, and by qemu-img as a user would. What is
 * harmless passes, what names another file in any way is refused, and no header, however broken, is more than refused.
 */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { OffshootError } from '../../blockstore/errors.js';
import { assertStandsAlone } from '../../daemon/jobs/image-header.js';
import { mustRun } from '../support/model/command.js';
import { lacks } from '../support/tools.js';

const directory = mkdtempSync(join(tmpdir(), 'offshoot-header-'));
afterAll(() => { rmSync(directory, { recursive: true, force: true }); });
const at = (name: string): string => join(directory, name);

async function verdict(file: string, format: string): Promise<string> {
  const handle = await open(file, 'r');
  try {
    await assertStandsAlone(handle, format, 'IMAGE');
    return 'ok';
  } catch (error) {
    if (!(error instanceof OffshootError)) throw error;
    expect(error.kind).toBe('foreign-format');
    return error.message;
  } finally {
    await handle.close();
  }
}

async function verdictOf(content: Buffer, format: string): Promise<string> {
  writeFileSync(at('crafted'), content);
  return await verdict(at('crafted'), format);
}

/** A qcow2 header of version 3, and what is to be changed in it. */
function qcow2(change: (header: Buffer) => void = () => undefined): Buffer {
  const header = Buffer.alloc(65_536);
  header.write('QFI\xfb', 0, 'latin1');
  header.writeUInt32BE(3, 4);
  header.writeUInt32BE(16, 20);
  header.writeBigUInt64BE(1n << 30n, 24);
  header.writeUInt32BE(104, 100);
  change(header);
  return header;
}

function extension(type: number, lengthBytes: number, text = ''): (header: Buffer) => void {
  return (header) => {
    header.writeUInt32BE(type, 104);
    header.writeUInt32BE(lengthBytes, 108);
    header.write(text, 112);
  };
}

const PLAIN = `# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicSparse"
RW 2048 SPARSE "self.vmdk"
`;

function vmdk(descriptor: string, change: (header: Buffer) => void = () => undefined): Buffer {
  const file = Buffer.alloc(64 * 1024);
  file.write('KDMV');
  file.writeUInt32LE(1, 4);
  file.writeBigUInt64LE(2048n, 12);
  file.writeBigUInt64LE(1n, 28);
  file.writeBigUInt64LE(20n, 36);
  file.write(descriptor, 512);
  change(file);
  return file;
}

describe('a qcow2 header', () => {
  it('passes when it stands alone, also with the extensions that everybody writes', async () => {
    expect(await verdictOf(qcow2(), 'qcow2')).toBe('ok');
    expect(await verdictOf(qcow2(extension(0x6803f857, 48)), 'qcow2')).toBe('ok');
    expect(await verdictOf(qcow2((header) => { header.writeBigUInt64BE(1n | 8n | 16n, 72); }), 'qcow2')).toBe('ok');
  });

  it.each([
    ['a backing file', (header: Buffer) => { header.writeBigUInt64BE(200n, 8); header.writeUInt32BE(11, 16); header.write('/etc/shadow', 200); }, /overlay/],
    ['a backing file of no length', (header: Buffer) => { header.writeBigUInt64BE(200n, 8); }, /overlay/],
    ['the format of a backing file', extension(0xe2792aca, 3, 'raw'), /overlay/],
    ['a json: backing file', (header: Buffer) => { header.writeBigUInt64BE(200n, 8); header.writeUInt32BE(60, 16); header.write('json:{"driver":"file","filename":"/etc/shadow"}', 200); }, /overlay/],
    ['an external data file, as a feature', (header: Buffer) => { header.writeBigUInt64BE(4n, 72); }, /another file/],
    ['an external data file, by name alone', extension(0x44415441, 11, '/etc/shadow'), /another file/],
    ['an external data file behind other extensions', (header: Buffer) => { extension(0x6803f857, 48)(header); header.writeUInt32BE(0x44415441, 104 + 56); }, /another file/],
    ['a feature that nobody knows', (header: Buffer) => { header.writeBigUInt64BE(1n << 40n, 72); }, /not known here/],
    ['encryption', (header: Buffer) => { header.writeUInt32BE(2, 32); }, /encrypted/],
    ['corruption', (header: Buffer) => { header.writeBigUInt64BE(2n, 72); }, /corrupt/],
    ['another version', (header: Buffer) => { header.writeUInt32BE(4, 4); }, /version 4/],
    ['an extension that ends behind its cluster', extension(0x6803f857, 0xffff_fff0), /damaged/],
    ['a header longer than its cluster', (header: Buffer) => { header.writeUInt32BE(0x7fff_ffff, 100); }, /damaged/],
    ['clusters of no size', (header: Buffer) => { header.writeUInt32BE(0, 20); }, /damaged/],
  ] as const)('is refused with %s', async (_what, change, words) => {
    expect(await verdictOf(qcow2(change), 'qcow2')).toMatch(words);
  });

  it('is refused when it is cut short', async () => {
    expect(await verdictOf(qcow2().subarray(0, 60), 'qcow2')).toMatch(/damaged/);
    expect(await verdictOf(qcow2().subarray(0, 100), 'qcow2')).toMatch(/damaged/);
  });
});

describe('a VMDK header', () => {
  it('passes when everything is in one file', async () => {
    expect(await verdictOf(vmdk(PLAIN), 'vmdk')).toBe('ok');
    expect(await verdictOf(vmdk(PLAIN.replace('monolithicSparse', 'streamOptimized')), 'vmdk')).toBe('ok');
  });

  it.each([
    ['a bare descriptor', Buffer.from(PLAIN), /several files/],
    ['a header without a size, whose descriptor counts alone', vmdk(PLAIN, (file) => { file.writeBigUInt64LE(0n, 12); }), /several files/],
    ['a flat extent', vmdk(PLAIN.replace('RW 2048 SPARSE "self.vmdk"', 'RW 2048 FLAT "/etc/shadow" 0')), /several files/],
    ['a flat extent beside its own', vmdk(`${PLAIN}RW 2048 FLAT "/etc/shadow" 0\n`), /several files/],
    ['a second sparse extent', vmdk(`${PLAIN}RW 2048 SPARSE "/etc/shadow"\n`), /several files/],
    ['another type', vmdk(PLAIN.replace('monolithicSparse', 'monolithicFlat')), /monolithicFlat/],
    ['no type', vmdk(PLAIN.replace('createType', 'creatType')), /several files/],
    ['a parent', vmdk(PLAIN.replace('ffffffff', '12345678')), /overlay/],
    ['the name of a parent', vmdk(`${PLAIN}parentFileNameHint="/etc/shadow"\n`), /overlay/],
    ['no descriptor', vmdk(PLAIN, (file) => { file.writeBigUInt64LE(0n, 28); }), /several files/],
    ['a descriptor that is too long', vmdk(PLAIN, (file) => { file.writeBigUInt64LE(1n << 40n, 36); }), /damaged/],
    ['a descriptor far behind the end', vmdk(PLAIN, (file) => { file.writeBigUInt64LE(1n << 40n, 28); }), /several files/],
    ['a descriptor at the end of numbers', vmdk(PLAIN, (file) => { file.writeBigUInt64LE((1n << 64n) - 1n, 28); }), /damaged/],
    ['an ESX extent', Buffer.from('COWD'.padEnd(2048, '\0')), /several files/],
  ])('is refused with %s', async (_what, content, words) => {
    expect(await verdictOf(content, 'vmdk')).toMatch(words);
  });
});

describe('any header', () => {
  it.each([['qcow2', qcow2(extension(0x6803f857, 48))], ['vmdk', vmdk(PLAIN)]] as const)('is passed or refused, never more: %s', { timeout: 60_000 }, async (format, sound) => {
    await fc.assert(fc.asyncProperty(
      fc.array(fc.tuple(fc.nat(1023), fc.nat(255)), { minLength: 1, maxLength: 24 }), fc.nat(2048),
      async (changes, cutBytes) => {
        const content = Buffer.from(sound);
        for (const [offset, value] of changes) content[offset] = value;
        const said = await verdictOf(cutBytes < 1024 ? content : content.subarray(0, cutBytes), format);
        expect(said).toMatch(/^(ok|IMAGE (is|keeps|has) )/u);
      },
    ), { numRuns: 500 });
  });
});

describe.skipIf(lacks('qemu-img'))('an image that qemu-img made', () => {
  it.each([
    ['qcow2', []], ['qcow2', ['-o', 'compat=0.10']], ['qcow2', ['-o', 'compression_type=zstd']], ['qcow2', ['-o', 'extended_l2=on']],
    ['vmdk', []], ['vmdk', ['-o', 'subformat=streamOptimized']],
  ])('passes: %s %j', async (format, options) => {
    writeFileSync(at('raw'), 'content');
    truncateSync(at('raw'), 1 << 20);
    await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', format, ...options, at('raw'), at('made')]);
    expect(await verdict(at('made'), format)).toBe('ok');
  });

  it.each([
    ['qcow2', ['-b', '/etc/hostname', '-F', 'raw'], /overlay/],
    ['qcow2', ['-o', 'compat=0.10', '-b', '/etc/hostname', '-F', 'raw'], /overlay/],
    ['qcow2', ['-o', `data_file=${at('data')}`], /another file/],
    ['qcow2', ['-o', `data_file=${at('data')},data_file_raw=on`], /another file/],
    ['vmdk', ['-o', 'subformat=monolithicFlat'], /several files/],
    ['vmdk', ['-o', 'subformat=twoGbMaxExtentSparse'], /several files/],
  ])('is refused: %s %j', async (format, options, words) => {
    await mustRun('qemu-img', ['create', '-q', '-f', format, ...options, at(`made-${format}`), '1M']);
    expect(await verdict(at(`made-${format}`), format)).toMatch(words);
  });
});
