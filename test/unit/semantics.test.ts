/**
 * The promises name their tests: each file that daemon/SEMANTICS.md and daemon/THREATS.md name is there, and has a test of that title.
 */
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const ROOT = join(dirname(fileURLToPath(import.meta.url)), '..', '..');
const TITLE_CHARACTERS_MIN = 12;

interface Reference {
  readonly file: string;
  readonly titles: readonly string[];
}

/** `file`: "title", "title", as it stands in the lists below each promise; what follows in brackets is a remark. */
function referencesOf(text: string): Reference[] {
  const found: Reference[] = [];
  for (const item of text.match(/^- `(?:unit|protocol|power|faults|mount|torture|vm)\/.*(?:\n {2}.*)*/gmu) ?? []) {
    const parts = item.replaceAll(/\n {2}/gu, ' ').split(/`((?:unit|protocol|power|faults|mount|torture|vm)\/[^`]+)`/u);
    for (let i = 1; i < parts.length; i += 2) {
      const remark = parts[i + 1] ?? '';
      found.push({ file: parts[i] ?? '', titles: [...remark.matchAll(/"([^"]+)"/gu)].map(([, title = '']) => title) });
    }
  }
  return found;
}

/** A title as the source has it: what a table or a template puts in stands behind `…` or `${`. */
function stands(title: string, source: string): boolean {
  const plain = source.replaceAll(String.raw`\'`, '\'');
  const words = title.split('…')[0]?.trim().replace(/:$/u, '') ?? '';
  if (plain.includes(words)) return true;
  // Put together from the title of a table's test and a row.
  const [before = '', ...after] = words.split(': ');
  return before.length >= TITLE_CHARACTERS_MIN && plain.includes(before) && after.every((part) => plain.includes(part));
}

describe('daemon/SEMANTICS.md', () => {
  const text = readFileSync(join(ROOT, 'daemon', 'SEMANTICS.md'), 'utf8');
  const references = referencesOf(text);

  it('names tests', () => {
    expect(references.length).toBeGreaterThan(100);
  });

  it.each([...new Set(references.map(({ file }) => file))])('names test/%s, and titles that are there', (file) => {
    const source = join(ROOT, 'test', file);
    expect(existsSync(source), `there is no test/${file}`).toBe(true);
    const content = readFileSync(source, 'utf8');
    const missing = references.filter((each) => each.file === file).flatMap(({ titles }) => titles).filter((title) => !stands(title, content));
    expect(missing).toEqual([]);
  });
});
