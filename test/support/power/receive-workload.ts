/**
 * Streams are received into new containers and, as differences, into what was received before; some are interrupted, gone on with by the next
 * server, or dropped; a guest writes meanwhile. Runs in the recorded process.
 */
import { decodeToken } from '../../../blockstore/stream-format.js';
import { ContainerGuest } from './container-guest.js';
import type { Guest } from './guest.js';
import { encodeStream, uuidOf, type StreamSpec, type StreamSpecNode } from './streams.js';
import { Flushes, place } from './workload-steps.js';
import type { Turned } from './window.js';

const BLOCK = 4096;
const ROUNDS = 3;

export async function receives(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  const operator = new ContainerGuest(guest);
  const flushes = new Flushes(guest);
  guest.create('g', 16 * BLOCK, 3);
  guest.open('g');
  const busy = (): void => {
    const { at, length } = place(random, guest.sizeOf('g'), 3);
    guest.write('g', at, length);
    if (random.chance(0.3)) flushes.begin('g');
  };
  let number = 0;
  for (let round = 0; round < ROUNDS; round += 1) {
    const target = `r${round}`;
    const full: StreamSpec = { uuid: uuidOf(number += 1), name: 'v1', target, baseUuid: null, nodes: [
      { path: 'etc', kind: 'directory', content: empty(0), delta: false },
      { path: 'etc/conf', kind: 'file', content: { ...empty(5000), seed: guest.next() }, delta: false },
      { path: 'a.img', kind: 'disk', content: { ...empty(BLOCK * random.between(8, 20)), seed: guest.next(), holes: 4 }, delta: false },
      { path: 'zeros.img', kind: 'disk', content: { ...empty(4 * BLOCK), seed: guest.next(), holes: 1 }, delta: false },
    ] };
    await receive(operator, full, busy, null);
    const later: StreamSpec = { uuid: uuidOf(number += 1), name: 'v2', target, baseUuid: full.uuid, nodes: [
      full.nodes[0]!,
      round % 2 === 0 ? { ...full.nodes[1]!, content: { ...empty(9000), seed: guest.next() } } : { ...full.nodes[1]!, delta: true },
      changed(full.nodes[2]!, guest),
      { path: 'new.img', kind: 'disk', content: { ...empty(5 * BLOCK), seed: guest.next(), holes: 2 }, delta: false },
    ] };
    await receive(operator, later, busy, full);
    const given: StreamSpec = { ...full, uuid: uuidOf(number += 1), target: `never${round}` };
    await begin(operator, given);
    await takeSome(operator, given, busy, 2);
    await operator.during({ op: 'drop', uuid: given.uuid }, async () => { await operator.parts.receives.abort(await idOf(operator, given)); });
    if (random.chance(0.5)) guest.checkpoint(random.chance(0.5));
  }
  await flushes.end();
}

function empty(sizeBytes: number): StreamSpecNode['content'] {
  return { sizeBytes, seed: 1, holes: 0, writes: [] };
}

/** Some blocks of it, apart from each other, are written or zeroed. */
function changed(node: StreamSpecNode, guest: Guest): StreamSpecNode {
  const { random } = guest;
  const writes: { at: number; length: number; seed: number }[] = [];
  for (let block = random.between(0, 2); block + 2 <= node.content.sizeBytes / BLOCK; block += random.between(3, 5)) {
    writes.push({ at: block * BLOCK, length: BLOCK * random.between(1, 2), seed: random.chance(0.3) ? 0 : guest.next() });
  }
  return { ...node, delta: true, content: { ...node.content, writes } };
}

async function begin(operator: ContainerGuest, stream: StreamSpec): Promise<void> {
  await operator.during({ op: 'receive', stream }, async () => await operator.parts.receives.begin(stream.target, encodeStream(stream).json));
}

async function idOf(operator: ContainerGuest, { uuid }: StreamSpec): Promise<number> {
  const found = (await operator.parts.receives.list()).find((each) => each.uuid === uuid);
  if (found === undefined) throw new Error(`nothing is received of ${uuid}`);
  return found.receiveId;
}

/** Hands over what comes next, at most `batches` times; true when there is no more. */
async function takeSome(operator: ContainerGuest, stream: StreamSpec, busy: () => void, batches: number): Promise<boolean> {
  const { receives: jobs } = operator.parts;
  const id = await idOf(operator, stream);
  const { records } = encodeStream(stream);
  for (let batch = 0; batch < batches; batch += 1) {
    const { records: first } = await jobs.info(id);
    if (first === records.length) break;
    busy();
    const count = operator.guest.random.between(1, 3);
    const info = await jobs.add(id, first, Buffer.concat(records.slice(first, first + count)));
    // The answer says what would be there after a loss.
    const marker = { op: 'received', uuid: stream.uuid, records: info.durableRecords } as const;
    operator.guest.say({ ...marker, phase: 'begin' });
    operator.guest.say({ ...marker, phase: 'end' });
  }
  return (await jobs.info(id)).records === records.length;
}

/** From its beginning to its end, with interruptions; `base` is what the target holds until then. */
async function receive(operator: ContainerGuest, stream: StreamSpec, busy: () => void, base: StreamSpec | null): Promise<void> {
  const { guest } = operator;
  await begin(operator, stream);
  while (!await takeSome(operator, stream, busy, guest.random.between(1, 3))) {
    const id = await idOf(operator, stream);
    const { records } = await operator.parts.receives.info(id);
    await operator.during({ op: 'received', uuid: stream.uuid, records }, async () => {
      const info = await operator.parts.receives.pause(id);
      if (info.durableRecords !== records) throw new Error('a pause keeps all that came');
    });
    if (guest.random.chance(0.5)) operator.restart();
    const token = decodeToken((await operator.parts.receives.info(id)).token);
    await operator.parts.receives.begin(stream.target, encodeStream(stream, { records: token.records, check: token.check }).json);
  }
  busy();
  const id = await idOf(operator, stream);
  guest.say({ op: 'finish', uuid: stream.uuid, phase: 'begin' });
  await operator.during({ op: 'turn', ...turnOf(stream, base) }, async () => await operator.parts.receives.finish(id));
  guest.say({ op: 'finish', uuid: stream.uuid, phase: 'end' });
}

/** What a finished receive makes, changes and takes away. */
function turnOf({ target, name, nodes }: StreamSpec, base: StreamSpec | null): { readonly made: readonly Turned[]; readonly changed: readonly Turned[]; readonly gone: readonly string[] } {
  const nameOf = ({ path, kind }: StreamSpecNode): string => (kind === 'directory' ? `${path}/` : path);
  const directory = (disk: string): Turned => ({ disk, content: empty(0) });
  const before = new Map((base?.nodes ?? []).map((node) => [nameOf(node), node]));
  const at = (top: string) => (node: StreamSpecNode): Turned => ({ disk: `${top}/${nameOf(node)}`, content: node.content });
  const frozen = `${target}/.snapshots/${name}`;
  return {
    made: [
      ...(base === null ? [directory(`${target}/`), directory(`${target}/.snapshots/`)] : []), directory(`${frozen}/`),
      ...nodes.map(at(frozen)), ...nodes.filter((node) => !before.has(nameOf(node))).map(at(target)),
    ],
    changed: nodes.filter((node) => node.kind !== 'directory' && before.has(nameOf(node))).map(at(target)),
    gone: [...before.values()].filter((node) => !nodes.some((each) => nameOf(each) === nameOf(node))).map((node) => `${target}/${nameOf(node)}`),
  };
}
