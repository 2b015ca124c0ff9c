/**
 * A process that commits to a metadata store until it is killed: `commit-program.js DATABASE FIRST-NUMBER`.
 *
 * Says `opening` first, then the number of each transaction once it is durable. One transaction makes a disk
 * `NUMBER.img` that owns a page and a block, and a directory `NUMBER`.
 */
import { writeSync } from 'node:fs';
import { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NewNode } from '../../blockstore/meta/rows.js';
import { PAGE_BLOCKS } from '../../blockstore/units.js';

const DIRECTORY: Omit<NewNode, 'name'> = {
  parentId: ROOT_ID, kind: 'directory', mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: null,
  linkTarget: null, copyOnRead: false, fault: null,
};
const CHECKPOINT_EVERY = 5;

const [path = '', first = '0'] = process.argv.slice(2);
writeSync(1, 'opening\n');
const store = MetaStore.open(path);
for (let number = Number(first); ; number += 1) {
  store.transaction(() => {
    const layer = store.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: 2 ** 30, sealed: false,
      complete: false, createdUs: 0,
    });
    store.nodes.insert({ ...DIRECTORY, kind: 'disk', layerId: layer.id, name: `${number}.img` });
    store.ownership.add(layer.id, [{ block: 0, count: PAGE_BLOCKS }, { block: number + PAGE_BLOCKS, count: 1 }]);
    store.nodes.insert({ ...DIRECTORY, name: String(number) });
  });
  writeSync(1, `${number}\n`);
  if (number % CHECKPOINT_EVERY === 0) store.checkpoint({ idle: number % (2 * CHECKPOINT_EVERY) === 0 });
}
