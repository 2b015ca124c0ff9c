/**
 * What a stream may say in its header. It comes from outside, so that nothing of it is believed before it was looked at here:
 * its shape, its limits, names that lead nowhere else, a tree in which parents come first. Pure functions.
 */
import { Type } from '@sinclair/typebox';
import { Value } from '@sinclair/typebox/value';

import { OffshootError } from '../../blockstore/errors.js';
import type { StreamHeader } from '../../blockstore/stream-format.js';
import { DISK_BYTES_MAX, SECTOR_BYTES } from '../../blockstore/units.js';
import { assertLinkTarget, assertNewName, shown } from '../filesystem/names.js';

const exact = { additionalProperties: false } as const;
const nullable = <T extends Parameters<typeof Type.Union>[0][number]>(schema: T) => Type.Union([schema, Type.Null()]);
const id = Type.Integer({ minimum: 0, maximum: 0xffff_fffe });
const timeUs = Type.Integer({ minimum: Number.MIN_SAFE_INTEGER, maximum: Number.MAX_SAFE_INTEGER });
const text = Type.String({ maxLength: 4095 });
const uuid = Type.String({ pattern: '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' });

const HeaderShape = Type.Object({
  reference: text,
  baseReference: nullable(text),
  kind: Type.Union([Type.Literal('container'), Type.Literal('disk')]),
  uuid,
  name: text,
  consistency: Type.Union([Type.Literal('crash'), Type.Literal('application')]),
  message: nullable(Type.String({ maxLength: 65_536 })),
  createdUs: timeUs,
  baseUuid: nullable(uuid),
  nodes: Type.Array(Type.Object({
    path: text,
    kind: Type.Union([Type.Literal('directory'), Type.Literal('file'), Type.Literal('disk'), Type.Literal('symlink')]),
    mode: Type.Integer({ minimum: 0, maximum: 0o7777 }),
    uid: id,
    gid: id,
    mtimeUs: timeUs,
    sizeBytes: Type.Integer({ minimum: 0, maximum: DISK_BYTES_MAX }),
    linkTarget: nullable(text),
    delta: Type.Boolean(),
  }, exact)),
  resume: nullable(Type.Object({ records: Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER }), check: Type.String({ pattern: '^[0-9a-f]{64}$' }) }, exact)),
}, exact);

/** The header in `json`; `foreign-format` with the reason when it is none that can be received. */
export function parseHeader(json: string): StreamHeader {
  let parsed: unknown;
  try {
    parsed = JSON.parse(json) as unknown;
  } catch (error) {
    throw new OffshootError('foreign-format', 'the header of the stream is no JSON', {}, error);
  }
  const problem = Value.Errors(HeaderShape, parsed).First();
  if (problem !== undefined) throw refused(`${problem.path === '' ? 'all of it' : problem.path}: ${problem.message}`);
  const header = parsed as StreamHeader;
  assertNewName(header.name, 'directory');
  // Nobody could name it: the last `@` of a reference is the one before the snapshot.
  if (header.name.includes('@')) throw refused(`${shown(header.name)} is no name of a snapshot`);
  assertTree(header);
  return header;
}

function assertTree(header: StreamHeader): void {
  const kinds = new Map<string, string>();
  for (const node of header.nodes) {
    const names = node.path.split('/');
    names.forEach((name, i) => { assertNewName(name, i === 0 && header.kind === 'container' ? 'container' : 'directory'); });
    const parent = names.slice(0, -1).join('/');
    if (parent !== '' && kinds.get(parent) !== 'directory') throw refused(`${shown(node.path)} lies in nothing that came before it`);
    if (kinds.has(node.path)) throw refused(`${shown(node.path)} is there twice`);
    kinds.set(node.path, node.kind);
    const isData = node.kind === 'file' || node.kind === 'disk';
    if ((node.kind === 'symlink') !== (node.linkTarget !== null)) throw refused(`${shown(node.path)}: only symbolic links have a target, and each has one`);
    if (node.linkTarget !== null) assertLinkTarget(node.linkTarget);
    if (node.kind === 'disk' && node.sizeBytes % SECTOR_BYTES !== 0) throw refused(`${shown(node.path)} has ${node.sizeBytes} bytes, which are no whole sectors`);
    if (node.delta && (!isData || header.baseUuid === null)) throw refused(`${shown(node.path)} has nothing that it could differ from`);
  }
  const [only] = header.nodes;
  if (header.kind === 'disk' && (header.nodes.length !== 1 || only === undefined || only.path.includes('/') || (only.kind !== 'disk' && only.kind !== 'file'))) {
    throw refused('the stream of one disk has one disk or file, and nothing else');
  }
}

function refused(reason: string): OffshootError {
  return new OffshootError('foreign-format', `the header of the stream cannot be received: ${reason}`);
}
