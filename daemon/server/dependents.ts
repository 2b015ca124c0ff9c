/**
 * The refusal to remove what others stand on: who they are, and every way out as the command for it. Main thread.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { listedLines, listedNames, listedWords, shellWord } from '../../blockstore/listed-names.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { visible } from '../control/paths.js';

export interface Dependents {
  /** What was to be removed, as it was named. */
  readonly name: string;
  /** The command that was given, without `--keep-data`. */
  readonly command: string;
  /** Ids of the nodes that stand on it: one at least. */
  readonly users: readonly number[];
  /** One of them that can take its place, so that it can go; null: none can. */
  readonly successor: number | null;
}

export function dependentsError(meta: MetaStore, { name, command, users, successor }: Dependents): OffshootError {
  // A name with a newline in it must not look like a line of its own.
  const pathOf = (id: number): string => visible(meta.nodes.pathOf(id));
  const isOne = users.length === 1;
  const ways = [
    [`offshoot flatten ${listedWords(users, pathOf)}`, `copies what ${isOne ? 'it needs; it stands' : 'they need; they stand'} on nothing then`],
    ...(successor === null ? [] : [[`offshoot promote ${shellWord(pathOf(successor))}`, isOne ? 'makes it the source, and this its clone, which can go' : 'makes it the source of the others; this can go then']]),
    [`${command} --keep-data`, `removes the name; the data stays for as long as ${isOne ? 'it is' : 'they are'} there`],
  ] as const;
  const width = Math.max(...ways.map(([way = '']) => way.length));
  return new OffshootError('in-use', [
    `${name} is what ${isOne ? 'a clone stands' : `${users.length} clones stand`} on: ${listedNames(users, pathOf)}. ${isOne ? 'Remove it first' : 'Remove them first'}, or`,
    ...ways.map(([way = '', effect = '']) => `${way.padEnd(width)}  # ${effect}`),
  ].join('\n'), { path: name, dependents: users.length });
}

/** A container is not removed with its snapshots: each of them was taken to be kept. */
export function snapshotsError(container: string, references: readonly string[]): OffshootError {
  const isOne = references.length === 1;
  const commands = listedLines(references, (reference) => `offshoot snapshot rm ${shellWord(reference)}`);
  return new OffshootError('in-use', [
    `${container} has ${isOne ? 'a snapshot' : `${references.length} snapshots`}: ${listedNames(references, (each) => each)}. Remove ${isOne ? 'it' : 'them'} first:`,
    ...commands.lines,
    ...(commands.more > 0 ? [`and ${commands.more} more: offshoot snapshot ls ${shellWord(container)} lists them`] : []),
  ].join('\n'), { path: container, snapshots: references.length });
}
