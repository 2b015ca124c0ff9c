/**
 * The parsers of machine configurations, against real texts that were damaged: libvirt's XML, VMware's .vmx and disk descriptors, machine.json.
 *
 * What must hold of each text: it is refused with an operating error, or read, in bounded time and memory; what nothing changed in comes out
 * byte for byte; and a clone of it is, read again, a configuration with the identity that it was given, that names no file of its source.
 */
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';

import { OffshootError } from '../../../blockstore/errors.js';
import { MACHINE_FORMATS } from '../../../daemon/machines/formats.js';
import { parseVmdkDescriptor, vmdkDescriptor } from '../../../daemon/machines/formats/vmdk.js';
import { assertSoundOnAnything, mutated } from '../machine-texts.js';
import { fuzzCases, type FuzzOptions, type FuzzTarget } from './fuzz-target.js';

const SAMPLES = 'test/fixtures/machines';
const CASE_MS_MAX = 20_000;
const GROWTH_BYTES_MAX = 768 * 1024 * 1024;
/** Pieces that each parser has a rule about. */
const JUNK = [
  '<', '>', '</', '/>', '<!--', '-->', '<![CDATA[', ']]>', '<?x', '?>', '<!DOCTYPE a [<!ENTITY b "c">]>', '&', '&amp;', '&#0;', '&#x110000;', '<domain>', '</domain>', '<name>', '<uuid/>', "<mac address='x'/>",
  '"', "'", '=', '#', '\\', '|22', '|', '\n', '\r\n', '\r', '\0', '\uFEFF', 'displayName = "a"\n', 'uuid.bios = ""\n', 'scsi0:0.fileName = "/etc/shadow"\n', 'ethernet9.present = "TRUE"\n',
  '{', '}', '[', ']', ',', ':', 'null', '1e999', '"__proto__": {}', '"disks": []', '\\u0000', '\u{1F600}', 'RW 999999999999999 FLAT "a" 0\n', 'RW -1 VMFS "a"\n', 'parentCID=0\n',
] as const;
const DESCRIPTOR = vmdkDescriptor(1024 * 1024, 'root-flat.vmdk', '12345678');

type Case = { readonly kind: 'configuration'; readonly sample: string; readonly text: string } | { readonly kind: 'descriptor'; readonly text: string };

function casesOf(samples: readonly string[]): fc.Arbitrary<Case> {
  const real = fc.constantFrom(...samples).chain((sample): fc.Arbitrary<Case> => {
    const text = readFileSync(join(SAMPLES, sample), 'utf8');
    return mutated(text, JUNK).map((changed) => ({ kind: 'configuration' as const, sample, text: changed }));
  });
  const repeated = fc.record({ sample: fc.constantFrom(...samples), piece: fc.constantFrom(...JUNK), times: fc.integer({ min: 1, max: 20_000 }) })
    .map(({ sample, piece, times }): Case => ({ kind: 'configuration', sample, text: piece.repeat(times) }));
  const descriptor = mutated(DESCRIPTOR, JUNK).map((text): Case => ({ kind: 'descriptor', text }));
  return fc.oneof({ weight: 8, arbitrary: real }, { weight: 1, arbitrary: repeated }, { weight: 3, arbitrary: descriptor });
}

export const configurationTarget: FuzzTarget = {
  name: 'configuration',
  summary: 'configurations of machines, and descriptors of their disks',
  async run(options: FuzzOptions) {
    const counts = { configurations: 0, descriptors: 0 };
    const beganBytes = process.memoryUsage().rss;
    await fuzzCases(options, casesOf(readdirSync(SAMPLES).toSorted()), async (each) => {
      const beganMs = performance.now();
      if (each.kind === 'descriptor') {
        counts.descriptors += 1;
        assertDescriptor(each.text);
      } else {
        counts.configurations += 1;
        const format = MACHINE_FORMATS.find((known) => known.recognises(each.sample, readFileSync(join(SAMPLES, each.sample), 'utf8')));
        if (format === undefined) throw new Error(`${each.sample} is of no format`);
        format.recognises(each.sample, each.text);
        assertSoundOnAnything(format, each.text);
      }
      const tookMs = performance.now() - beganMs;
      if (tookMs > CASE_MS_MAX) throw new Error(`it took ${Math.round(tookMs)} ms`);
      const grownBytes = process.memoryUsage().rss - beganBytes;
      if (grownBytes > GROWTH_BYTES_MAX) throw new Error(`the process has grown by ${grownBytes} bytes`);
      await Promise.resolve();
    });
    return counts;
  },
};

/** Refused, or sizes that are sizes, and a raw file whose name can be one. */
function assertDescriptor(text: string): void {
  let found;
  try {
    found = parseVmdkDescriptor(text);
  } catch (thrown) {
    if (thrown instanceof OffshootError && thrown.kind !== 'internal') return;
    throw thrown;
  }
  for (const { sizeBytes, offsetBytes } of found.extents) {
    if (!Number.isSafeInteger(sizeBytes) || !Number.isSafeInteger(offsetBytes)) throw new Error(`an extent has ${sizeBytes} bytes at ${offsetBytes}`);
  }
  if (found.rawFile !== null && found.extents.length !== 1) throw new Error('a disk in pieces was taken for one file');
}
