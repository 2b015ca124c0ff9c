/**
 * Shapes of what is sent, received, exported and compared: see `schemas.ts` for the rules. Main thread of the server; the command line
 * imports types only.
 */
import { Type, type Static } from '@sinclair/typebox';
import { STREAM_HEADER_BYTES_MAX } from '../../blockstore/stream-format.js';
import { bytes, count, exact, named, NODE_KINDS, nullable, oneOf, path, refTo } from './schemas.js';

const uuid = Type.String({ description: 'the same in every store that the snapshot was sent to' });

export const TreeNode = named(Type.Object({
  path: Type.String({ description: 'in the container; of one disk or file its name' }),
  nodeId: Type.Integer({ description: 'the inode number under the mount' }),
  kind: oneOf(NODE_KINDS, 'what it is'),
  mode: Type.Integer(),
  uid: Type.Integer(),
  gid: Type.Integer(),
  mtimeUs: Type.Integer({ description: 'microseconds since the epoch' }),
  sizeBytes: bytes('size; of a disk its virtual size'),
  linkTarget: nullable(Type.String()),
  mountPath: Type.String({ description: 'absolute, under the mount' }),
  storePath: Type.String({ description: 'as a reference: CONTAINER/PATH' }),
}, { $id: 'TreeNode' }));

export const TreeInfo = named(Type.Object({
  reference: Type.String(),
  kind: oneOf(['container', 'disk'], 'container: all of one; disk: one disk or file'),
  snapshot: nullable(Type.Object({
    name: Type.String(),
    uuid,
    consistency: oneOf(['crash', 'application'], 'as the snapshot was taken'),
    message: nullable(Type.String()),
    createdUs: Type.Integer({ description: 'microseconds since the epoch' }),
  })),
  nodes: Type.Array(refTo(TreeNode), { description: 'parents first, names in the order of their bytes' }),
}, { $id: 'TreeInfo', description: 'What a reference stands for, node by node; without a snapshot, as it is now.' }));

export const ExtentInfo = named(Type.Object({
  offsetBytes: bytes('where it begins; a multiple of 4096'),
  lengthBytes: bytes('how long it is'),
  type: oneOf(['data', 'zero'], 'what the second of the two holds there: data, or nothing but zeros'),
}, { $id: 'ExtentInfo' }));

export const ExtentPage = named(Type.Object({
  nodeId: Type.Integer(),
  sizeBytes: bytes('size of the disk'),
  baseSizeBytes: nullable(bytes('size of what it is compared with')),
  related: Type.Boolean({ description: 'they have a layer in common; if not, every block counts as changed, and only contents can tell' }),
  extents: Type.Array(refTo(ExtentInfo), { description: 'ascending' }),
  nextOffsetBytes: nullable(bytes('where to go on; null: that was all')),
}, { $id: 'ExtentPage' }));

export const ReferenceQuery = Type.Object({ reference: path('CONTAINER, CONTAINER/PATH, CONTAINER@SNAPSHOT or CONTAINER/PATH@SNAPSHOT') }, exact);
export const ExtentsQuery = Type.Object({
  reference: path('of a disk or file'),
  base: Type.Optional(path('what it is compared with; left out: everything that is data counts')),
  offsetBytes: Type.Optional(Type.String({ pattern: '^[0-9]{1,15}$', description: 'where to begin' })),
}, exact);

export const InstantBody = Type.Object({ reference: path('of a disk or file') }, exact);
export const InstantInfo = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/NAME: remove it as soon as it is open; the daemon does so after a minute' }),
  mountPath: Type.String(),
  nodeId: Type.Integer(),
  sizeBytes: bytes('size of the disk'),
}, { $id: 'InstantInfo', description: 'A clone that holds a disk as it was at one instant, for a reader that opens it at once.' }));

export const ReceiveBody = Type.Object({
  target: path('CONTAINER or CONTAINER/PATH'),
  header: Type.String({ maxLength: STREAM_HEADER_BYTES_MAX, description: 'the header of the stream, exactly as it came' }),
}, exact);
export const ReceiveRecordsQuery = Type.Object({ first: Type.String({ pattern: '^[0-9]{1,15}$', description: 'number of the first record' }) }, exact);

export const ReceiveInfo = named(Type.Object({
  receiveId: Type.Integer({ minimum: 1 }),
  state: oneOf(['running', 'paused'], 'paused: it waits for somebody to go on'),
  target: Type.String(),
  reference: Type.String({ description: 'what is received, as it is called where it comes from' }),
  uuid,
  records: count('records that came'),
  durableRecords: count('records that survive a death of the server; what came later must be sent again then'),
  dataBytes: bytes('content that came'),
  ended: Type.Boolean({ description: 'the end of the stream came' }),
  token: Type.String({ description: 'for offshoot send --resume' }),
}, { $id: 'ReceiveInfo' }));

export const ReceiveResult = named(Type.Object({
  receiveId: Type.Integer({ minimum: 1 }),
  path: Type.String({ description: 'the container or disk' }),
  snapshot: Type.String({ description: 'its snapshot, without the @' }),
  uuid,
  dataBytes: bytes('content that came'),
}, { $id: 'ReceiveResult' }));

export const Dropped = Type.Object({ dropped: Type.Literal(true) });

export type TreeNode = Static<typeof TreeNode>;
export type TreeInfo = Static<typeof TreeInfo>;
export type ExtentInfo = Static<typeof ExtentInfo>;
export type ExtentPage = Static<typeof ExtentPage>;
export type InstantInfo = Static<typeof InstantInfo>;
export type ReceiveInfo = Static<typeof ReceiveInfo>;
export type ReceiveResult = Static<typeof ReceiveResult>;
