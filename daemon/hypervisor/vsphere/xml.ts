/**
 * The little XML that SOAP needs: elements written with everything escaped, answers read into a small tree.
 *
 * The parser is @rgrove/parse-xml, as for domain XML; nothing else here knows of it. It stops at the first thing that is not well-formed. A document type
 * declaration is refused before it sees one, for entities are the way to make a small answer large.
 */
import { parseXml, XmlElement as Parsed, XmlText } from '@rgrove/parse-xml';

import { OffshootError } from '../../../blockstore/errors.js';

/** A reference to a managed object: what vSphere calls a moref. */
export interface ManagedObject {
  readonly type: string;
  readonly id: string;
}

/** An element of an answer. Names are without their prefix: a method's answer has one namespace. */
export interface XmlElement {
  readonly name: string;
  /** The value of xsi:type without its prefix. */
  readonly xsiType: string | null;
  /** The attribute `type`, which a reference to a managed object has. */
  readonly objectType: string | null;
  /** The text directly in it. */
  readonly text: string;
  readonly children: readonly XmlElement[];
}

const XSI = 'http://www.w3.org/2001/XMLSchema-instance';
const SOAP = 'http://schemas.xmlsoap.org/soap/envelope/';
const DEPTH_MAX = 100;
/** What XML 1.0 cannot hold, not even escaped. */
// eslint-disable-next-line no-control-regex -- control characters are what is looked for
const NOT_XML = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/u;

const ESCAPES: Readonly<Record<string, string>> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', '\r': '&#13;' };

export function escapeXml(text: string): string {
  if (NOT_XML.test(text)) throw new OffshootError('invalid-argument', 'a text for vSphere has a character that XML cannot hold');
  return text.replace(/[&<>"\r]/gu, (character) => ESCAPES[character] ?? character);
}

export function textElement(name: string, value: string | number | boolean): string {
  return `<${name}>${escapeXml(String(value))}</${name}>`;
}

export function objectElement(name: string, object: ManagedObject): string {
  return `<${name} type="${escapeXml(object.type)}">${escapeXml(object.id)}</${name}>`;
}

/** An element whose content is written already. */
export function element(name: string, ...content: readonly string[]): string {
  return `<${name}>${content.join('')}</${name}>`;
}

/** The same, of a type that the schema derives from the declared one. */
export function typedElement(name: string, xsiType: string, ...content: readonly string[]): string {
  return `<${name} xsi:type="${xsiType}">${content.join('')}</${name}>`;
}

/** A whole message: one call of a method of an object. */
export function envelope(object: ManagedObject, method: string, content: readonly string[]): string {
  return `<?xml version="1.0" encoding="UTF-8"?>\n<soapenv:Envelope xmlns:soapenv="${SOAP}" xmlns:xsi="${XSI}"><soapenv:Body>`
    + `<${method} xmlns="urn:vim25">${objectElement('_this', object)}${content.join('')}</${method}></soapenv:Body></soapenv:Envelope>`;
}

/** What the body of a SOAP message holds: the answer of a method, or a Fault. Throws `io-error` for what is no SOAP message. */
export function parseEnvelope(text: string): XmlElement {
  const root = readXml(text);
  const body = root.name === 'Envelope' ? childOf(root, 'Body')?.children[0] : undefined;
  if (body === undefined) throw new OffshootError('io-error', `the answer is no SOAP message: it is <${root.name}>`);
  return body;
}

function readXml(text: string): XmlElement {
  if (/<!DOCTYPE/iu.test(text)) throw new OffshootError('io-error', 'the answer has a document type declaration, which no SOAP message may have');
  let root: Parsed | null;
  try {
    ({ root } = parseXml(text));
  } catch (error) {
    // Also a RangeError, for elements that are nested deeper than the stack.
    throw new OffshootError('io-error', `the answer is no XML: ${error instanceof Error ? firstLine(error.message) : 'unknown reason'}`, {}, error);
  }
  if (root === null) throw new OffshootError('io-error', 'the answer is no XML: it has no element');
  return convert(root, 0);
}

function convert(node: Parsed, depth: number): XmlElement {
  if (depth > DEPTH_MAX) throw new OffshootError('io-error', `the answer's elements are nested deeper than ${DEPTH_MAX}`);
  const children: XmlElement[] = [];
  let text = '';
  for (const child of node.children) {
    if (child instanceof Parsed) children.push(convert(child, depth + 1));
    else if (child instanceof XmlText) text += child.text;
  }
  return {
    name: withoutPrefix(node.name),
    // The only attribute `type` with a prefix that SOAP knows is the schema instance's.
    xsiType: withoutPrefix(Object.entries(node.attributes).find(([name]) => name.endsWith(':type'))?.[1] ?? '') || null,
    objectType: node.attributes['type'] ?? null,
    text,
    children,
  };
}

function withoutPrefix(name: string): string {
  return name.slice(name.indexOf(':') + 1);
}

export function childOf(parent: XmlElement | undefined, name: string): XmlElement | undefined {
  return parent?.children.find((child) => child.name === name);
}

export function childrenOf(parent: XmlElement | undefined, name: string): readonly XmlElement[] {
  return parent?.children.filter((child) => child.name === name) ?? [];
}

/** The text at a path of names, null when there is no such element. */
export function textAt(parent: XmlElement | undefined, ...path: readonly string[]): string | null {
  let current = parent;
  for (const name of path) current = childOf(current, name);
  return current === undefined ? null : current.text;
}

/** An element as a reference; null when there is none. */
export function asObject(found: XmlElement | undefined): ManagedObject | null {
  if (found === undefined || found.objectType === null || found.text === '') return null;
  return { type: found.objectType, id: found.text };
}

function firstLine(text: string): string {
  return text.split('\n')[0]?.slice(0, 200) ?? '';
}
