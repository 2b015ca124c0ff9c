/**
 * The look at foreign images, against damaged headers of qcow2, VMDK, VHDX and VDI.
 *
 * What must hold of every file: it is described and converted, or refused with an error of its kind, in bounded time; a
 * size that is said is a size; and no byte of another file is ever in the result, whatever the header names.
 */
import { copyFileSync, openSync, readFileSync, readSync, rmSync, statSync, writeFileSync, writeSync, closeSync, truncateSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import * as fc from 'fast-check';

import { OffshootError } from '../../../blockstore/errors.js';
import { conversionUid } from '../../../daemon/control/conversion-user.js';
import { convertImage, describeImage, detectFormat, type ImageFormat } from '../../../daemon/jobs/image-format.js';
import { assertStandsAlone } from '../../../daemon/jobs/image-header.js';
import { mustRun } from '../model/command.js';
import { fuzzCases, makeFuzzDirectory, type FuzzOptions, type FuzzTarget } from './fuzz-target.js';

const FORMATS = ['qcow2', 'vmdk', 'vhdx', 'vdi'] as const;
const IMAGE_BYTES = 1024 * 1024;
const CONVERTED_BYTES_MAX = 64 * 1024 * 1024;
const SECRET = 'what lies in another file is nobody\'s business';
/** Where headers and tables lie: most changes are made there. */
const HEADER_BYTES = 1024;
const CHANGED_BYTES_MAX = 512 * 1024;
const REFUSALS: readonly string[] = ['foreign-format', 'no-space', 'too-large', 'invalid-argument', 'timed-out', 'cancelled'];

interface Change {
  readonly at: number;
  readonly bytes: Uint8Array;
}

const edge = fc.constantFrom(0n, 1n, 0x200n, 0x10000n, 0x7fff_ffffn, 0xffff_ffffn, 1n << 40n, (1n << 53n) + 1n, (1n << 63n) - 1n, (1n << 64n) - 1n);
const number64 = fc.tuple(edge, fc.boolean()).map(([value, little]) => {
  const bytes = Buffer.alloc(8);
  if (little) bytes.writeBigUInt64LE(value);
  else bytes.writeBigUInt64BE(value);
  return new Uint8Array(bytes);
});

/** A text that names the secret file, as a qcow2 backing file, a VMDK extent or a parent locator would. */
function namesOf(secret: string): fc.Arbitrary<Uint8Array> {
  const texts = [secret, `file:${secret}`, `json:{"driver":"raw","file":{"driver":"file","filename":"${secret}"}}`, `RW 2048 FLAT "${secret}" 0\n`, `parentFileNameHint="${secret}"\n`];
  return fc.constantFrom(...texts).map((text) => new Uint8Array(Buffer.from(text)));
}

function changesWith(secret: string): fc.Arbitrary<Change[]> {
  const place = fc.oneof({ weight: 4, arbitrary: fc.nat(120) }, { weight: 3, arbitrary: fc.nat(HEADER_BYTES) }, { weight: 1, arbitrary: fc.nat(CHANGED_BYTES_MAX) });
  const bytes = fc.oneof({ weight: 3, arbitrary: fc.uint8Array({ minLength: 1, maxLength: 8 }) }, { weight: 3, arbitrary: number64 }, { weight: 1, arbitrary: namesOf(secret) });
  return fc.array(fc.record({ at: place, bytes }), { minLength: 1, maxLength: 4 });
}

export const imageTarget: FuzzTarget = {
  name: 'image',
  summary: 'damaged headers of foreign images',
  async run(options: FuzzOptions) {
    const top = makeFuzzDirectory();
    const counts = { images: 0, refused: 0, converted: 0 };
    try {
      const secret = join(top, 'secret');
      writeFileSync(secret, SECRET.repeat(3000));
      const raw = join(top, 'raw');
      writeFileSync(raw, Buffer.alloc(64 * 1024, 'visible'));
      truncateSync(raw, IMAGE_BYTES);
      for (const format of FORMATS) await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', format, raw, join(top, format)]);
      const cases = fc.record({
        format: fc.constantFrom(...FORMATS), changes: changesWith(secret), cutTo: fc.option(fc.nat(CHANGED_BYTES_MAX), { freq: 8 }),
      });
      await fuzzCases(options, cases, async ({ format, changes, cutTo }) => {
        const file = join(top, 'damaged');
        copyFileSync(join(top, format), file);
        const fd = openSync(file, 'r+');
        for (const { at, bytes } of changes) writeSync(fd, bytes, 0, bytes.length, at);
        closeSync(fd);
        if (cutTo !== null) truncateSync(file, Math.min(cutTo, statSync(file).size));
        counts.images += 1;
        if (await look(file, format, join(top, 'converted'))) counts.converted += 1;
        else counts.refused += 1;
      });
    } finally {
      rmSync(top, { recursive: true, force: true });
    }
    return counts;
  },
};

/** True when the image was converted, false when it was refused as it should be; throws for everything else. */
async function look(file: string, format: ImageFormat, result: string): Promise<boolean> {
  const image = await open(file, 'r');
  rmSync(result, { force: true });
  const target = await open(result, 'wx', 0o600);
  try {
    await detectFormat(image);
    await assertStandsAlone(image, format, file);
    await image.chown(conversionUid(), conversionUid());
    const { virtualBytes } = await describeImage(image, format, file);
    if (!Number.isSafeInteger(virtualBytes) || virtualBytes < 0) throw new Error(`an image of ${virtualBytes} bytes was described`);
    if (virtualBytes > CONVERTED_BYTES_MAX) return false;
    await target.chown(conversionUid(), conversionUid());
    await convertImage({ image, format, target, virtualBytes, signal: new AbortController().signal, onProgress: () => undefined });
  } catch (thrown) {
    if (thrown instanceof OffshootError && REFUSALS.includes(thrown.kind)) return false;
    throw thrown;
  } finally {
    await image.close();
    await target.close();
  }
  if (holds(result, SECRET)) throw new Error('the result holds what lies in another file');
  return true;
}

function holds(file: string, text: string): boolean {
  if (statSync(file).size <= 4 * IMAGE_BYTES) return readFileSync(file).includes(text);
  const fd = openSync(file, 'r');
  const head = Buffer.alloc(4 * IMAGE_BYTES);
  readSync(fd, head, 0, head.length, 0);
  closeSync(fd);
  return head.includes(text);
}
