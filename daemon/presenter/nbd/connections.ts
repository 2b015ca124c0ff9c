/** Who is connected to a port of this host, from /proc/net/tcp and tcp6: addresses as people write them, each once. */
import { readFileSync } from 'node:fs';

const ESTABLISHED = '01';

export function connectedTo(port: number): readonly string[] {
  const wanted = port.toString(16).toUpperCase().padStart(4, '0');
  const found = new Set<string>();
  for (const table of ['tcp', 'tcp6']) {
    for (const line of rows(`/proc/net/${table}`)) {
      const [, local, remote, state] = line.trim().split(/\s+/u);
      if (state !== ESTABLISHED || local?.split(':')[1] !== wanted || remote === undefined) continue;
      found.add(addressOf(remote.split(':')[0] ?? ''));
    }
  }
  return [...found];
}

/** The kernel prints each 32-bit word in the order of the machine's bytes: little-endian on all that we run on. */
function addressOf(hex: string): string {
  const bytes = (hex.match(/.{8}/gu) ?? []).flatMap((word) => (word.match(/../gu) ?? []).toReversed()).map((byte) => Number.parseInt(byte, 16));
  if (bytes.length === 4) return bytes.join('.');
  const isMapped = bytes.slice(0, 10).every((byte) => byte === 0) && bytes[10] === 255 && bytes[11] === 255;
  if (isMapped) return bytes.slice(12).join('.');
  const words = Array.from({ length: 8 }, (_, i) => ((bytes[2 * i] ?? 0) * 256 + (bytes[2 * i + 1] ?? 0)).toString(16));
  return words.join(':').replace(/(?:^|:)(?:0(?::|$)){2,}/u, '::');
}

function rows(file: string): readonly string[] {
  try {
    return readFileSync(file, 'utf8').split('\n').slice(1);
  } catch {
    // A kernel without IPv6.
    return [];
  }
}
