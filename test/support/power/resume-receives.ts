/**
 * What becomes of the streams that were being received when the power went: the next server has what was promised to be kept, and its sender goes on
 * behind that, or begins anew where nothing had been begun; in the end the target is whole.
 */
import { decodeToken } from '../../../blockstore/stream-format.js';
import { controlParts } from '../control-parts.js';
import type { More } from './power-test.js';
import { damageOf, readDisks, verdictOfCheck } from './store-image.js';
import { encodeStream, type StreamSpec } from './streams.js';
import { writtenBytes, type FoundDisk, type WindowModel } from './window.js';

/** Records in one request. */
const BATCH = 8;
/** Every so many images the senders go on; that what was kept is there is looked at in each. */
const GO_ON_EVERY = 4;

let looks = 0;

export function resumeReceives(window: WindowModel): More {
  return async (store, disks) => {
    const { receives } = controlParts(store);
    const found = await receives.list();
    const wrong = window.judgeReceives(found.map(({ uuid, durableRecords }) => ({ uuid, records: durableRecords })), disks);
    looks += 1;
    if (wrong !== null || looks % GO_ON_EVERY !== 0) return wrong;
    const streams = window.streams().filter((stream) => !disks.some(({ name }) => name === snapshotOf(stream)));
    for (const stream of streams) {
      const kept = found.find(({ uuid }) => uuid === stream.uuid);
      const { records, check } = kept === undefined ? { records: 0, check: '' } : decodeToken(kept.token);
      const encoded = encodeStream(stream, kept === undefined ? null : { records, check });
      const { receiveId } = await receives.begin(stream.target, encoded.json);
      for (let first = records; first < encoded.records.length; first += BATCH) await receives.add(receiveId, first, Buffer.concat(encoded.records.slice(first, first + BATCH)));
      await receives.finish(receiveId);
    }
    if (streams.length === 0) return null;
    const after = readDisks(store);
    return streams.map((stream) => wrongOf(stream, after)).find((each) => each !== null) ?? damageOf(store) ?? verdictOfCheck(store);
  };
}

function wrongOf(stream: StreamSpec, disks: readonly FoundDisk[]): string | null {
  for (const { path, kind, content } of stream.nodes) {
    if (kind === 'directory') continue;
    for (const name of [`${stream.target}/${path}`, `${snapshotOf(stream)}${path}`]) {
      const there = disks.find((disk) => disk.name === name);
      if (there?.content.equals(writtenBytes(content)) !== true) return `${name} is ${there === undefined ? 'not there' : 'not what was sent'} after its receive was gone on with`;
    }
  }
  return null;
}

function snapshotOf({ target, name }: StreamSpec): string {
  return `${target}/.snapshots/${name}/`;
}
