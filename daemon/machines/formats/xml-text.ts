/**
 * An XML text that is changed in place. The library (parse-xml) checks that the text is well-formed and says where each element lies; a
 * change replaces just the characters of one value, tag or element, so that everything else keeps every byte: comments, quotes, order of
 * attributes, white space, namespaces, line ends.
 *
 * A document type declaration is refused, and with it entities of one's own; nothing outside the text is ever opened. Positions are
 * those of the text that was parsed: changes are collected, and `apply` makes them all and parses once.
 */
import { parseXml, XmlDocumentType, XmlElement, XmlError, XmlText, XmlCdata } from '@rgrove/parse-xml';

import { assertTextSize, invalid, lineAt, shown } from './values.js';

const DEPTH_MAX = 64;

export interface Attribute {
  readonly name: string;
  readonly value: string;
  /** With the white space before the name. */
  readonly start: number;
  readonly valueStart: number;
  readonly valueEnd: number;
  readonly end: number;
}

export interface Element {
  readonly name: string;
  readonly parent: Element | null;
  readonly children: readonly Element[];
  /** The text directly in the element, references resolved. */
  readonly text: string;
  readonly start: number;
  readonly end: number;
  /** Between the tags; both are null when the element is one tag, `<a/>`. */
  readonly innerStart: number | null;
  readonly innerEnd: number | null;
}

interface Edit {
  readonly start: number;
  readonly end: number;
  readonly text: string;
}

export class XmlTextDocument {
  #text: string;
  #root: Element;
  #edits: Edit[] = [];
  readonly #attributes = new Map<Element, readonly Attribute[]>();
  readonly #what: string;

  constructor(text: string, what: string) {
    this.#text = text;
    this.#what = what;
    this.#root = parse(text, what);
  }

  get root(): Element {
    return this.#root;
  }

  toText(): string {
    return this.#text;
  }

  lineOf(element: Element): number {
    return lineAt(this.#text, element.start);
  }

  attributes(element: Element): readonly Attribute[] {
    let list = this.#attributes.get(element);
    if (list === undefined) this.#attributes.set(element, list = readAttributes(this.#text, element));
    return list;
  }

  attribute(element: Element | null, name: string): string | null {
    return element === null ? null : this.attributes(element).find((attribute) => attribute.name === name)?.value ?? null;
  }

  /** An attribute that is not there comes behind the others. */
  setAttribute(element: Element, name: string, value: string): void {
    assertCharacters(name, value);
    const there = this.attributes(element).find((attribute) => attribute.name === name);
    if (there !== undefined) {
      if (there.value === value) return;
      this.#edits.push({ start: there.valueStart, end: there.valueEnd, text: escapeAttribute(value, this.#text.charAt(there.valueStart - 1)) });
      return;
    }
    const at = this.attributes(element).at(-1)?.end ?? element.start + 1 + element.name.length;
    this.#edits.push({ start: at, end: at, text: ` ${name}='${escapeAttribute(value, "'")}'` });
  }

  removeAttribute(element: Element, name: string): void {
    const there = this.attributes(element).find((attribute) => attribute.name === name);
    if (there !== undefined) this.#edits.push({ start: there.start, end: there.end, text: '' });
  }

  /** Replaces all that is between the tags. */
  setText(element: Element, value: string): void {
    assertCharacters(element.name, value);
    if (element.innerStart !== null && element.innerEnd !== null) {
      if (element.text !== value || element.children.length > 0) this.#edits.push({ start: element.innerStart, end: element.innerEnd, text: escapeText(value) });
    } else if (value !== '') {
      const slash = this.#text.lastIndexOf('/', element.end - 1);
      this.#edits.push({ start: slash, end: element.end, text: `>${escapeText(value)}</${element.name}>` });
    }
  }

  /** With the line that the element leaves empty. */
  remove(element: Element): void {
    let { start } = element;
    while (start > 0 && ' \t'.includes(this.#text.charAt(start - 1))) start -= 1;
    const isOwnLine = start > 0 && this.#text.charAt(start - 1) === '\n';
    if (isOwnLine) start -= this.#text.charAt(start - 2) === '\r' ? 2 : 1;
    this.#edits.push({ start: isOwnLine ? start : element.start, end: element.end, text: '' });
  }

  /** `xml` becomes the first child of `parent`, indented as its other children are. */
  insertFirst(parent: Element, xml: string): void {
    this.#insert(parent, xml, parent.innerStart, parent.children[0] ?? null);
  }

  insertLast(parent: Element, xml: string): void {
    const last = parent.children.at(-1);
    this.#insert(parent, xml, last?.end ?? parent.innerStart, parent.children[0] ?? null);
  }

  /** Makes the changes that were collected. Elements known before mean nothing afterwards. */
  apply(): void {
    if (this.#edits.length === 0) return;
    // What lies in an element that goes away goes with it: of two changes at one place the one that reaches further swallows the other.
    // An insertion lies before what begins there, so that it comes first.
    const isInsertion = (edit: Edit): number => edit.start === edit.end ? 0 : 1;
    const edits = this.#edits.map((edit, order) => ({ ...edit, order }))
      .sort((a, b) => a.start - b.start || isInsertion(a) - isInsertion(b) || b.end - a.end || a.order - b.order);
    const pieces: string[] = [];
    let at = 0;
    for (const edit of edits) {
      if (edit.start < at) continue;
      pieces.push(this.#text.slice(at, edit.start), edit.text);
      at = edit.end;
    }
    pieces.push(this.#text.slice(at));
    const text = pieces.join('');
    this.#edits = [];
    this.#root = parse(text, this.#what);
    this.#text = text;
    this.#attributes.clear();
  }

  #insert(parent: Element, xml: string, at: number | null, sibling: Element | null): void {
    const indentation = sibling === null ? `${this.#indentation(parent)}  ` : this.#indentation(sibling);
    if (at === null) {
      const slash = this.#text.lastIndexOf('/', parent.end - 1);
      this.#edits.push({ start: slash, end: parent.end, text: `>${indentation}${xml}${this.#indentation(parent)}</${parent.name}>` });
    } else {
      const isEmpty = parent.children.length === 0 && parent.text.trim() === '' && this.#text.slice(parent.innerStart ?? 0, parent.innerEnd ?? 0).trim() === '';
      const end = isEmpty ? parent.innerEnd ?? at : at;
      this.#edits.push({ start: isEmpty ? parent.innerStart ?? at : at, end, text: `${indentation}${xml}${isEmpty ? this.#indentation(parent) : ''}` });
    }
  }

  /** The end of the line before the element, with the blanks behind it; nothing when the element begins within a line. */
  #indentation(element: Element): string {
    let start = element.start;
    while (start > 0 && ' \t'.includes(this.#text.charAt(start - 1))) start -= 1;
    if (start > 0 && this.#text.charAt(start - 1) !== '\n') return '';
    const lineEnd = this.#text.includes('\r\n') ? '\r\n' : '\n';
    return `${lineEnd}${this.#text.slice(start, element.start)}`;
  }
}

/** Children of that name. */
export function childrenOf(element: Element | null, name: string): Element[] {
  return element === null ? [] : element.children.filter((child) => child.name === name);
}

/** The first descendant along the names, null when one is missing. */
export function find(element: Element | null, ...names: readonly string[]): Element | null {
  let at = element;
  for (const name of names) at = at?.children.find((child) => child.name === name) ?? null;
  return at;
}

export function escapeAttribute(value: string, quote: string): string {
  return escapeText(value).replaceAll(quote, quote === '"' ? '&quot;' : '&apos;').replaceAll('\t', '&#9;').replaceAll('\n', '&#10;');
}

export function escapeText(value: string): string {
  return value.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('\r', '&#13;');
}

/** XML has no way to write other control characters, nor half a surrogate pair. */
function assertCharacters(what: string, value: string): void {
  if (/[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/u.test(value)) throw invalid(`${what} cannot hold a control character: ${shown(value)}`);
}

function parse(text: string, what: string): Element {
  assertTextSize(text, what);
  try {
    const document = parseXml(text, { includeOffsets: true, preserveCdata: true, preserveDocumentType: true });
    const doctype = document.children.find((node) => node instanceof XmlDocumentType);
    if (doctype !== undefined) throw invalid(`line ${lineAt(text, doctype.start)} of ${what}: a document type declaration has no place in it`, { line: lineAt(text, doctype.start) });
    if (document.root === null) throw invalid(`${what} has no element`);
    return convert(text, document.root, null, 0, what);
  } catch (error) {
    if (error instanceof XmlError) {
      const message = error.message.split('\n')[0]!.replace(/ \(line [0-9]+, column [0-9]+\)$/, '');
      throw invalid(`line ${error.line} of ${what} is no XML: ${message}`, { line: error.line, column: error.column });
    }
    // The library calls itself for each level.
    if (error instanceof RangeError) throw invalid(`${what} is nested too deeply: at most ${DEPTH_MAX} levels`);
    throw error;
  }
}

function convert(text: string, node: XmlElement, parent: Element | null, depth: number, what: string): Element {
  const { start } = node;
  // The library says "infinite" for what ends with the text.
  const end = Math.min(node.end, text.length);
  if (depth > DEPTH_MAX) throw invalid(`line ${lineAt(text, start)} of ${what} is nested too deeply: at most ${DEPTH_MAX} levels`, { line: lineAt(text, start) });
  const tagEnd = startTagEnd(text, start);
  const isOneTag = text.charAt(tagEnd - 2) === '/';
  const children: Element[] = [];
  const element: Element = {
    name: node.name, parent, children, start, end,
    text: node.children.map((child) => child instanceof XmlText || child instanceof XmlCdata ? child.text : '').join(''),
    innerStart: isOneTag ? null : tagEnd,
    innerEnd: isOneTag ? null : text.lastIndexOf('<', end - 1),
  };
  for (const child of node.children) if (child instanceof XmlElement) children.push(convert(text, child, element, depth + 1, what));
  return element;
}

/** Behind the `>` of the start tag; in a well-formed text only quotes can hide one. */
function startTagEnd(text: string, start: number): number {
  let quote = '';
  for (let at = start; at < text.length; at += 1) {
    const character = text.charAt(at);
    if (quote !== '') quote = character === quote ? '' : quote;
    else if (character === '"' || character === "'") quote = character;
    else if (character === '>') return at + 1;
  }
  throw new Error('a start tag without an end in a text that is well-formed');
}

function readAttributes(text: string, element: Element): Attribute[] {
  const list: Attribute[] = [];
  const pattern = /([ \t\r\n]+)([^ \t\r\n=/>]+)[ \t\r\n]*=[ \t\r\n]*("[^"]*"|'[^']*')/y;
  pattern.lastIndex = element.start + 1 + element.name.length;
  for (let at = pattern.lastIndex, match = pattern.exec(text); match !== null; at = pattern.lastIndex, match = pattern.exec(text)) {
    const [whole, , name, quoted] = match;
    const end = at + whole.length;
    list.push({ name: name!, value: unescapeAttribute(quoted!.slice(1, -1)), start: at, valueStart: end - quoted!.length + 1, valueEnd: end - 1, end });
  }
  return list;
}

const ENTITIES: Readonly<Record<string, string>> = { amp: '&', lt: '<', gt: '>', quot: '"', apos: "'" };

/** The library has checked that each reference is one. */
function unescapeAttribute(raw: string): string {
  return raw.replaceAll(/\r\n|[\t\n\r]/g, ' ').replaceAll(/&(?:#x([0-9A-Fa-f]+)|#([0-9]+)|([a-z]+));/g, (whole, hex?: string, decimal?: string, name?: string) => {
    if (hex !== undefined) return String.fromCodePoint(Number.parseInt(hex, 16));
    if (decimal !== undefined) return String.fromCodePoint(Number.parseInt(decimal, 10));
    return ENTITIES[name ?? ''] ?? whole;
  });
}
