/**
 * Shapes of what the control API says about disks that leave their source: promote and rebase.
 *
 * Beside `schemas.ts`, which has the rest; API.md says the same in prose.
 */
import { Type, type Static } from '@sinclair/typebox';

import { count, exact, named, path } from './schemas.js';

export const PromoteResult = named(Type.Object({
  path: Type.String({ description: 'the clone: the source of the others now' }),
  origin: Type.String({ description: 'what it was cloned from: a clone of it now' }),
  layers: count('sealed layers that they share, and that count as written by the clone now'),
}, { $id: 'PromoteResult' }));

export const RebaseBody = Type.Object({
  path: path('CONTAINER/PATH of the clone, which nobody may have open'),
  image: path('the newer version of its image: CONTAINER/PATH, or a snapshot of it, CONTAINER/PATH@NAME'),
  force: Type.Optional(Type.Boolean({ default: false, description: "where there are conflicts, the clone's own blocks win" })),
}, exact);

export const RebaseResult = named(Type.Object({
  path: Type.String(),
  image: Type.String(),
  forced: Type.Boolean({ description: 'conflicts were not looked for' }),
}, { $id: 'RebaseResult', description: 'It stands on the new image. Conflicts are an error of kind `conflict`, which lists them.' }));

export type PromoteResult = Static<typeof PromoteResult>;
export type RebaseRequest = Required<Static<typeof RebaseBody>>;
export type RebaseResult = Static<typeof RebaseResult>;
