/**
 * The text of a .vmx file as lines: `key = "value"`, comments, blank lines. Lines that nothing changed keep every byte: blanks around
 * the equals sign, comments behind the value, the end of the line. Keys are compared without case, values are unescaped by `|XX`.
 *
 * VMware writes a control character, a quote and a bar in a value as a bar and two hexadecimal digits (`|0A`, `|22`, `|7C`). A value
 * without quotes is read too: VMware reads it, and people write it. A line that is neither is refused with its number, as VMware does.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import { assertTextSize, invalid, shown } from './values.js';

interface OtherLine {
  readonly kind: 'other';
  readonly raw: string;
}

interface EntryLine {
  readonly kind: 'entry';
  /** Up to where the value (with its quotes) begins. */
  readonly before: string;
  readonly key: string;
  readonly value: string;
  /** As it stood in the file; null after a change. */
  readonly rawValue: string | null;
  /** What comes behind the value: blanks, a comment, a carriage return. */
  readonly after: string;
}

type Line = OtherLine | EntryLine;

const KEY = /^[A-Za-z0-9_.:-]+$/;
const ENTRY = /^(\s*([^\s="#]+)\s*=\s*)(.*)$/su;
const QUOTED = /^"([^"]*)"(\s*(?:#.*)?)$/su;
const ENCODINGS_OF_UTF8 = new Set(['utf-8', 'utf8']);

export class VmxText {
  #lines: Line[];
  readonly #lineEnd: string;
  readonly #mark: string;
  /** Positions in `#lines` by key in lower case, in their order; made anew after a removal. */
  #positions: Map<string, number[]>;

  constructor(text: string) {
    assertTextSize(text, 'the .vmx file');
    const nul = text.indexOf('\0');
    if (nul >= 0) throw invalid('the .vmx file holds a NUL character: this is no text');
    this.#mark = text.startsWith('\uFEFF') ? '\uFEFF' : '';
    this.#lineEnd = text.includes('\r\n') ? '\r\n' : '\n';
    this.#lines = text.slice(this.#mark.length).split('\n').map((raw, index) => parseLine(raw, index + 1));
    this.#positions = this.#index();
    this.#checkEncoding(text);
  }

  /** Keys as the file spells them, in its order, each once. */
  keys(): string[] {
    return [...this.#positions.values()].map((positions) => this.#entry(positions[0]!).key);
  }

  has(key: string): boolean {
    return this.#positions.has(key.toLowerCase());
  }

  /** Where a key stands twice, the last one. */
  get(key: string): string | null {
    const positions = this.#positions.get(key.toLowerCase());
    return positions === undefined ? null : this.#entry(positions.at(-1)!).value;
  }

  /** Where a key stands twice, both lines get the value: whichever a hypervisor believes, it is this one. A new key comes at the end. */
  set(key: string, value: string): void {
    if (!KEY.test(key)) throw invalid(`a key of a .vmx file holds letters, digits, dots, colons, hyphens and underlines: ${shown(key)}`, { key });
    if (/\p{Cs}/u.test(value)) throw invalid(`${key} cannot hold half a character: ${shown(value)}`, { key });
    this.#assertWritable(key, value);
    const positions = this.#positions.get(key.toLowerCase());
    if (positions !== undefined) {
      for (const position of positions) {
        const line = this.#entry(position);
        if (line.value !== value) this.#lines[position] = { ...line, value, rawValue: null };
      }
      return;
    }
    const carriage = this.#lineEnd === '\r\n' ? '\r' : '';
    const last = this.#lines.at(-1);
    const endsOpen = last?.kind === 'other' && last.raw === '';
    const line: EntryLine = { kind: 'entry', before: `${key} = `, key, value, rawValue: null, after: carriage };
    const position = endsOpen ? this.#lines.length - 1 : this.#lines.length;
    if (endsOpen) {
      this.#lines.splice(position, 0, line);
    } else {
      // The last line had no end: it gets one, and the new line is the one without.
      if (last?.kind === 'entry' && carriage !== '' && !last.after.endsWith('\r')) this.#lines[position - 1] = { ...last, after: `${last.after}\r` };
      else if (last?.kind === 'other' && carriage !== '' && !last.raw.endsWith('\r')) this.#lines[position - 1] = { kind: 'other', raw: `${last.raw}\r` };
      this.#lines.push({ ...line, after: '' });
    }
    this.#positions.set(key.toLowerCase(), [position]);
  }

  /** Takes every line of the keys out. */
  remove(keys: readonly string[]): void {
    const gone = new Set(keys.flatMap((key) => this.#positions.get(key.toLowerCase()) ?? []));
    if (gone.size === 0) return;
    this.#lines = this.#lines.filter((_, position) => !gone.has(position));
    this.#positions = this.#index();
  }

  toText(): string {
    return this.#mark + this.#lines.map((line) => line.kind === 'other'
      ? line.raw
      : `${line.before}${line.rawValue ?? `"${escapeValue(line.value)}"`}${line.after}`).join('\n');
  }

  #entry(position: number): EntryLine {
    const line = this.#lines[position];
    if (line?.kind !== 'entry') throw new Error(`line ${position} is no entry`);
    return line;
  }

  #index(): Map<string, number[]> {
    const positions = new Map<string, number[]>();
    this.#lines.forEach((line, position) => {
      if (line.kind !== 'entry') return;
      const key = line.key.toLowerCase();
      const before = positions.get(key);
      if (before === undefined) positions.set(key, [position]);
      else before.push(position);
    });
    return positions;
  }

  /** The text was read as UTF-8: where the file says that it is something else, only ASCII means the same. */
  #checkEncoding(text: string): void {
    if (this.#isUtf8() || isAscii(text.slice(this.#mark.length))) return;
    throw new OffshootError('not-supported', `the .vmx file says that it is encoded as ${shown(this.get('.encoding') ?? '')}: convert it to UTF-8, and change its .encoding line`);
  }

  #assertWritable(key: string, value: string): void {
    if (this.#isUtf8() || isAscii(value)) return;
    throw invalid(`${key} can hold ASCII only, as the .vmx file is encoded as ${shown(this.get('.encoding') ?? '')}: ${shown(value)}`, { key });
  }

  #isUtf8(): boolean {
    return ENCODINGS_OF_UTF8.has((this.get('.encoding') ?? 'UTF-8').toLowerCase());
  }
}

function parseLine(raw: string, number: number): Line {
  const trimmed = raw.trim();
  if (trimmed === '' || trimmed.startsWith('#')) return { kind: 'other', raw };
  const parts = ENTRY.exec(raw);
  if (parts === null || !KEY.test(parts[2]!)) throw invalid(`line ${number} of the .vmx file is no 'key = "value"': ${shown(trimmed)}`, { line: number });
  const rest = parts[3]!;
  const value = rest.startsWith('"') ? QUOTED.exec(rest)?.[1] : withoutComment(rest);
  if (value === undefined) throw invalid(`line ${number} of the .vmx file: the value has no end, or something behind it: ${shown(trimmed)}`, { line: number });
  const rawValue = rest.startsWith('"') ? `"${value}"` : value;
  return { kind: 'entry', before: parts[1]!, key: parts[2]!, value: unescapeValue(value), rawValue, after: rest.slice(rawValue.length) };
}

/** Not by a regular expression: those that say this look at a run of blanks again from each of them. */
function withoutComment(rest: string): string | undefined {
  const hash = rest.indexOf('#');
  const value = (hash < 0 ? rest : rest.slice(0, hash)).trimEnd();
  return value.includes('"') ? undefined : value;
}

function isAscii(text: string): boolean {
  return !/[^\p{ASCII}]/u.test(text);
}

/** Runs of `|XX` are bytes of UTF-8; a bar without two digits stands for itself. */
function unescapeValue(raw: string): string {
  return raw.replaceAll(/(?:\|[0-9A-Fa-f]{2})+/g, (run) => Buffer.from(run.replaceAll('|', ''), 'hex').toString('utf8'));
}

function escapeValue(value: string): string {
  // eslint-disable-next-line no-control-regex -- control characters are what must be escaped
  return value.replaceAll(/[\u0000-\u001F\u007F"|]/g, (character) => `|${character.charCodeAt(0).toString(16).toUpperCase().padStart(2, '0')}`);
}
