/**
 * Operators with containers, and with clones that are to stand on something else; guests write, discard and flush between and meanwhile.
 * Runs in the recorded process.
 */
import { ContainerGuest } from './container-guest.js';
import type { Guest } from './guest.js';
import { Flushes, place } from './workload-steps.js';

const BLOCK = 4096;
const ROUNDS = 6;

/** Snapshots of a container and of one disk, going back to them, removing them, clones of the container as it is and as it was. */
export async function containers(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  const operator = new ContainerGuest(guest);
  operator.makeDirectory('vm');
  operator.makeDirectory('vm/etc');
  guest.create('vm/a.img', 16 * BLOCK, 3);
  guest.clone('vm/a.img', ['vm/b.img']);
  guest.createFile('vm/etc/f');
  const flushes = new Flushes(guest);
  const snapshots: string[] = [];
  const clones: string[] = [];
  const disks = (): string[] => operator.namesIn('vm').filter((name) => name !== '' && !name.endsWith('/')).map((name) => `vm/${name}`);
  const use = async (steps: number): Promise<void> => {
    for (const disk of disks()) guest.open(disk);
    for (let step = 0; step < steps; step += 1) change(guest, random.pick(disks()), flushes);
    await flushes.end();
    for (const disk of disks()) guest.close(disk);
  };
  for (let round = 0; round < ROUNDS; round += 1) {
    for (const disk of disks()) guest.open(disk);
    for (let step = 0; step < 8; step += 1) change(guest, random.pick(disks()), flushes);
    await operator.snapshot('vm', `s${round}`);
    snapshots.push(`s${round}`);
    if (round % 2 === 0) {
      await operator.cloneContainer('vm', random.chance(0.5) ? [`live${round}`] : [`live${round}`, `more${round}`]);
      clones.push(`live${round}`);
    }
    for (let step = 0; step < 5; step += 1) change(guest, random.pick(disks()), flushes);
    await flushes.end();
    for (const disk of disks()) guest.close(disk);
    if (round === 1 || round === 4) {
      await operator.snapshot('vm', `one${round}`, round === 1 ? 'a.img' : 'etc/f');
      await use(4);
      await operator.revert('vm', `one${round}`);
      snapshots.push(`one${round}`);
    }
    // What came, went and changed its size since is what a revert undoes.
    guest.create(`vm/n${round}.img`, 8 * BLOCK, 3);
    if (round % 2 === 1) guest.remove('vm/b.img');
    if (round % 3 === 1) guest.resize('vm/a.img', BLOCK * random.between(6, 20));
    await use(6);
    if (round % 3 !== 2) await operator.revert('vm', random.pick(snapshots.filter((name) => name.startsWith('s'))));
    if (!disks().includes('vm/b.img')) guest.clone('vm/a.img', ['vm/b.img']);
    await operator.cloneContainer(`vm@s${round}`, [`was${round}`]);
    clones.push(`was${round}`);
    if (clones.length > 2) await operator.removeContainer(clones.shift()!);
    if (snapshots.length > 2) await operator.removeSnapshot('vm', snapshots.shift()!);
    if (random.chance(0.3)) await guest.commitAll();
    if (random.chance(0.5)) guest.checkpoint(random.chance(0.5));
  }
  for (const name of snapshots) await operator.removeSnapshot('vm', name);
}

function change(guest: Guest, disk: string, flushes: Flushes): void {
  const { random } = guest;
  const sizeBytes = guest.sizeOf(disk);
  if (disk.endsWith('/f')) guest.write(disk, random.pick([sizeBytes, random.between(0, sizeBytes)]), random.between(1, 2 * BLOCK));
  else {
    const { at, length } = place(random, sizeBytes, 4);
    if (random.chance(0.8)) guest.write(disk, at, length);
    else guest.discard(disk, at, length);
  }
  if (random.chance(0.3)) flushes.begin(disk);
}

/** Clones get newer images to stand on, clones take the place of what they were cloned from, and copy_file_range fills open disks and files. */
export async function independence(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  const operator = new ContainerGuest(guest);
  const flushes = new Flushes(guest);
  const blocks = 32;
  guest.create('v0', blocks * BLOCK, 3);
  guest.create('from', blocks * BLOCK, 4);
  guest.clone('from', ['from2']);
  guest.create('d', 48 * BLOCK, 4);
  guest.createFile('f');
  guest.open('d');
  guest.open('f');
  for (let round = 1; round <= 5; round += 1) {
    const [old, fresh, clone] = [`v${round - 1}`, `v${round}`, `c${round}`];
    guest.clone(old, [clone]);
    // The clone writes in the lower half, the new version of the image differs in the upper one: no conflict.
    const own = changeBlocks(guest, clone, 0, blocks / 2, 4);
    if (round % 2 === 0) {
      // A sealed layer of its own moves along.
      guest.clone(clone, ['seal']);
      guest.remove('seal');
      for (const block of changeBlocks(guest, clone, 0, blocks / 2, 2)) own.add(block);
    }
    guest.clone(old, [fresh]);
    writeAgain(guest, fresh, changeBlocks(guest, fresh, blocks / 2, blocks, 5));
    const isForced = round % 3 === 0;
    if (isForced) changeBlocks(guest, fresh, 0, blocks, 3);
    await operator.rebase(clone, fresh, [...own], isForced);
    // Guests of another disk go on, and copies into it and into a file come from a closed disk and from a clone that changes.
    changeBlocks(guest, 'from2', 0, blocks, 2);
    for (let step = 0; step < 3; step += 1) {
      change(guest, 'd', flushes);
      const inBlock = random.pick([0, 0, 512, 700]);
      const length = random.between(18 * BLOCK, 24 * BLOCK - 4 * 1024);
      await operator.copyRange(random.pick(['from', 'from2', 'from2']), 'd', BLOCK * random.between(0, 6) + inBlock, BLOCK * random.between(0, 20) + inBlock, length);
      const end = guest.sizeOf('f');
      if (end < 64 * BLOCK) await operator.copyRange('from2', 'f', end % BLOCK, end, length);
      if (random.chance(0.5)) flushes.begin(random.pick(['d', 'f']));
      if (random.chance(0.3)) await flushes.end();
    }
    const next = `p${round}`;
    changeBlocks(guest, clone, 0, blocks, 3);
    guest.clone(clone, [next]);
    await operator.promote(next);
    // Now it is the original that can go.
    guest.open(next);
    for (let step = 0; step < 3; step += 1) change(guest, next, flushes);
    await flushes.end();
    guest.close(next);
    if (round % 2 === 0) guest.remove(clone);
    if (round > 1) guest.remove(`p${round - 1}`);
    guest.remove(old);
    if (random.chance(0.4)) await guest.commitAll();
    if (random.chance(0.5)) guest.checkpoint(random.chance(0.5));
  }
  await flushes.end();
}

/** Blocks that the disk owns are written once more, and nothing is flushed: whoever seals it must sync them, for no commit does. */
function writeAgain(guest: Guest, disk: string, owned: ReadonlySet<number>): void {
  guest.open(disk);
  for (const block of owned) if (guest.random.chance(0.5)) guest.write(disk, block * BLOCK, BLOCK);
  guest.close(disk);
}

/** Writes and discards between two blocks of a closed disk; gives the blocks that it owns by that. Sometimes nothing of it is flushed. */
function changeBlocks(guest: Guest, disk: string, firstBlock: number, endBlock: number, times: number): Set<number> {
  const { random } = guest;
  const touched = new Set<number>();
  guest.open(disk);
  for (let time = 0; time < times; time += 1) {
    const place1 = place(random, (endBlock - firstBlock) * BLOCK, 4);
    const at = firstBlock * BLOCK + place1.at;
    if (random.chance(0.75)) guest.write(disk, at, place1.length);
    else guest.discard(disk, at, place1.length);
    for (let block = Math.floor(at / BLOCK); block * BLOCK < at + place1.length; block += 1) touched.add(block);
  }
  guest.close(disk);
  return touched;
}
