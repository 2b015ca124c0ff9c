/**
 * What a recorded process does, by name. Small disks, many operations: what matters is the order of things, not their size.
 *
 * Flushes are begun and not waited for at once, so that writes come while data is being synced. Random choices come from
 * the run's seed. Runs in the recorded process.
 */
import type { Guest } from './guest.js';
import { containers, independence } from './container-workloads.js';
import { machines } from './machine-workload.js';
import { vdisks } from './vdisk-workload.js';
import { receives } from './receive-workload.js';
import { Flushes, place } from './workload-steps.js';

const BLOCK = 4096;

type Workload = (open: () => Guest) => Promise<void> | void;

async function writes(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  guest.create('base', 128 * BLOCK, 3);
  guest.clone('base', ['a', 'b']);
  guest.createFile('f');
  for (const disk of ['base', 'a', 'b', 'f']) guest.open(disk);
  const flushes = new Flushes(guest);
  for (let step = 0; step < 170; step += 1) {
    const disk = random.pick(['a', 'a', 'b', 'base']);
    const { at, length } = place(random, guest.sizeOf(disk), 6);
    guest.write(disk, at, length);
    if (random.chance(0.2)) {
      const length2 = random.between(1, 3 * BLOCK);
      guest.write('f', random.pick([guest.sizeOf('f'), random.between(0, guest.sizeOf('f'))]), length2);
    }
    if (random.chance(0.25)) flushes.begin(random.pick(['a', 'b', 'base', 'f']));
    if (random.chance(0.15)) await flushes.end();
    if (random.chance(0.05)) await guest.commitAll();
    if (random.chance(0.04)) guest.checkpoint(random.chance(0.5));
  }
  await flushes.end();
}

/** Range clones among three disks, one of them a filled one, with writes, discards and flushes between them. */
async function ranges(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  const blocks = 64;
  guest.create('base', blocks * BLOCK, 3);
  guest.create('c', blocks * BLOCK);
  guest.clone('base', ['a', 'b']);
  const disks = ['a', 'b', 'c'];
  for (const disk of disks) guest.open(disk);
  const flushes = new Flushes(guest);
  for (let step = 0; step < 90; step += 1) {
    const disk = random.pick(disks);
    const { at, length } = place(random, guest.sizeOf(disk), 6);
    if (random.chance(0.8)) guest.write(disk, at, length);
    else guest.discard(disk, at, length);
    if (random.chance(0.3)) {
      const count = random.between(1, 12);
      const first = random.between(0, blocks / 2 - count);
      guest.cloneRanges(random.pick(disks), random.pick(disks), [
        { from: random.between(0, blocks - count) * BLOCK, to: first * BLOCK, length: count * BLOCK },
        { from: random.between(0, blocks - count) * BLOCK, to: (blocks / 2 + first) * BLOCK, length: count * BLOCK },
      ]);
    }
    if (random.chance(0.2)) flushes.begin(random.pick(disks));
    if (random.chance(0.15)) await flushes.end();
    if (random.chance(0.05)) await guest.commitAll();
    if (random.chance(0.04)) guest.checkpoint(random.chance(0.5));
  }
  await flushes.end();
}

async function fill(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  for (const round of [1, 2, 3]) {
    guest.create(`base${round}`, 96 * BLOCK, round + 1);
    guest.clone(`base${round}`, [`a${round}`]);
    const disk = `a${round}`;
    guest.open(disk);
    const flushes = new Flushes(guest);
    // In small steps, because a step copies as much as a run of data has.
    for (let atEnd = false; !atEnd;) {
      for (let i = random.between(0, 2); i > 0; i -= 1) {
        const { at, length } = place(random, guest.sizeOf(disk), 4);
        if (random.chance(0.8)) guest.write(disk, at, length);
        else guest.discard(disk, at, length);
      }
      if (random.chance(0.3)) flushes.begin(disk);
      atEnd = guest.fillStep(disk);
      if (random.chance(0.3)) await flushes.end();
      if (random.chance(0.1)) await guest.commitAll();
    }
    await flushes.end();
    await guest.completeFill(disk);
    guest.remove(`base${round}`);
    for (let i = 0; i < 8; i += 1) {
      const { at, length } = place(random, guest.sizeOf(disk), 4);
      guest.write(disk, at, length);
      if (i % 3 === 0) await guest.flush(disk);
    }
    guest.checkpoint(random.chance(0.5));
  }
}

async function copyOnRead(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  guest.create('base', 128 * BLOCK, 4);
  guest.clone('base', ['a', 'b'], true);
  guest.open('a');
  guest.open('b');
  const flushes = new Flushes(guest);
  for (let step = 0; step < 260; step += 1) {
    const disk = random.pick(['a', 'b']);
    const { at, length } = place(random, guest.sizeOf(disk), 5);
    if (random.chance(0.65)) guest.read(disk, at, length);
    else guest.write(disk, at, length);
    if (random.chance(0.2)) flushes.begin(disk);
    if (random.chance(0.15)) await flushes.end();
    if (random.chance(0.05)) await guest.commitAll();
  }
  await flushes.end();
}

async function discard(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  guest.create('base', 128 * BLOCK + 512, 5);
  guest.clone('base', ['a']);
  for (const disk of ['base', 'a']) guest.open(disk);
  const flushes = new Flushes(guest);
  for (let step = 0; step < 220; step += 1) {
    const disk = random.pick(['a', 'a', 'base']);
    const { at, length } = place(random, guest.sizeOf(disk), random.chance(0.1) ? 40 : 5);
    if (random.chance(0.55)) guest.discard(disk, at, length);
    else guest.write(disk, at, length);
    if (random.chance(0.25)) flushes.begin(disk);
    if (random.chance(0.15)) await flushes.end();
    if (random.chance(0.05)) await guest.commitAll();
    if (random.chance(0.03)) guest.checkpoint(random.chance(0.5));
  }
  await flushes.end();
}

/** What an operator does, while guests write: clone (open and closed, several at once), import, resize, remove. */
async function control(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  guest.create('base', 48 * BLOCK, 3);
  const disks = ['base'];
  const opened = new Set<string>();
  const flushes = new Flushes(guest);
  let made = 0;
  for (let step = 0; step < 190; step += 1) {
    const disk = random.pick(disks);
    if (!opened.has(disk) && random.chance(0.6)) {
      guest.open(disk);
      opened.add(disk);
    }
    const choice = random.below(20);
    if (choice < 9 && opened.has(disk)) {
      const { at, length } = place(random, guest.sizeOf(disk), 4);
      if (random.chance(0.8)) guest.write(disk, at, length);
      else guest.discard(disk, at, length);
    } else if (choice < 11) flushes.begin(disk);
    else if (choice < 12) await flushes.end();
    else if (choice < 15) {
      const targets = Array.from({ length: random.between(1, 3) }, () => `c${made += 1}`);
      guest.clone(disk, targets);
      disks.push(...targets);
    } else if (choice < 17) {
      guest.resize(disk, 512 * random.between(1, 80 * 8));
    } else if (choice < 18 && opened.has(disk)) {
      await flushes.end();
      guest.close(disk);
      opened.delete(disk);
    } else if (disks.length > 5) {
      await flushes.end();
      if (opened.delete(disk)) guest.close(disk);
      guest.remove(disk);
      disks.splice(disks.indexOf(disk), 1);
    }
    if (random.chance(0.03)) {
      const name = `i${made += 1}`;
      guest.create(name, 512 * random.between(1, 200), 4);
      disks.push(name);
    }
    if (step % 40 === 20) await cloneClosed(guest, `k${made += 1}`);
    if (random.chance(0.05)) await guest.commitAll();
    if (random.chance(0.03)) guest.checkpoint(random.chance(0.5));
  }
  await flushes.end();
}

/** Snapshots of a group while its disks are written, flushed, cloned and closed; one is under way at a time, and nobody waits for it. */
async function snapshots(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  guest.create('base', 48 * BLOCK, 3);
  guest.clone('base', ['a', 'b', 'c']);
  guest.createFile('f');
  const disks = ['base', 'a', 'b', 'c', 'f'];
  const opened = new Set<string>();
  const flushes = new Flushes(guest);
  const taken: string[][] = [];
  let taking: Promise<void> | null = null;
  for (let step = 0; step < 60; step += 1) {
    const disk = random.pick(disks);
    if (!opened.has(disk) && random.chance(0.7)) {
      guest.open(disk);
      opened.add(disk);
    }
    if (opened.has(disk)) {
      if (disk === 'f') guest.write('f', random.pick([guest.sizeOf('f'), random.between(0, guest.sizeOf('f'))]), random.between(1, 2 * BLOCK));
      else {
        const { at, length } = place(random, guest.sizeOf(disk), 4);
        if (random.chance(0.85)) guest.write(disk, at, length);
        else guest.discard(disk, at, length);
      }
    }
    if (random.chance(0.25)) flushes.begin(disk);
    if (random.chance(0.2)) await flushes.end();
    else if (random.chance(0.5)) await new Promise((resolve) => { setImmediate(resolve); });
    if (step % 8 === 3) {
      await taking;
      const targets = disks.map((name) => `${name}@${step}`);
      taken.push(targets);
      taking = guest.snapshot(disks, targets);
    }
    if (random.chance(0.04)) guest.clone(disk, [`clone${step}`]);
    if (random.chance(0.04) && disk !== 'f') guest.resize(disk, BLOCK * random.between(20, 60));
    if (random.chance(0.06) && opened.has(disk)) {
      await flushes.end();
      guest.close(disk);
      opened.delete(disk);
    }
    if (taken.length > 2) {
      await taking;
      for (const target of taken.shift() ?? []) guest.remove(target);
    }
    if (random.chance(0.05)) await guest.commitAll();
    if (random.chance(0.03)) guest.checkpoint(random.chance(0.5));
  }
  await taking;
  await flushes.end();
}

/** A disk that was written where it owned the blocks already, closed without a flush, and cloned: only the seal can sync it. */
async function cloneClosed(guest: Guest, disk: string): Promise<void> {
  guest.create(disk, 8 * BLOCK, 3);
  guest.open(disk);
  guest.write(disk, 0, 4 * BLOCK);
  await guest.flush(disk);
  guest.write(disk, BLOCK, 2 * BLOCK);
  guest.close(disk);
  guest.clone(disk, [`${disk}-clone`]);
  guest.remove(disk);
}

/** Layers are merged while guests write, disks are sealed, made smaller and larger, and removed. */
async function merge(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  guest.create('base', 48 * BLOCK, 3);
  guest.clone('base', ['a', 'b']);
  const flushes = new Flushes(guest);
  guest.open('a');
  for (let round = 0; round < 4; round += 1) {
    for (let layer = random.between(2, 3); layer > 0; layer -= 1) {
      for (const disk of ['a', 'b']) {
        if (disk === 'b') guest.open(disk);
        for (let i = random.between(1, 3); i > 0; i -= 1) {
          const { at, length } = place(random, guest.sizeOf(disk), 5);
          if (random.chance(0.7)) guest.write(disk, at, length);
          else guest.discard(disk, at, length);
        }
        if (disk === 'b') guest.close(disk);
        guest.clone(disk, ['seal']);
        guest.remove('seal');
      }
    }
    if (random.chance(0.4)) guest.resize('a', 512 * random.between(8 * 8, 8 * 60));
    flushes.begin('a');
    const merged = guest.merge('a');
    // What a guest does while the copy runs.
    const { at, length } = place(random, guest.sizeOf('a'), 3);
    guest.write('a', at, length);
    await merged;
    await guest.merge('b');
    await flushes.end();
    if (random.chance(0.5)) guest.checkpoint(random.chance(0.5));
  }
  guest.remove('b');
  await guest.merge('a');
}

/** Killed in the midst, with much that no commit has seen, of many disks and files. */
async function killed(open: () => Guest): Promise<void> {
  const guest = open();
  const { random } = guest;
  const disks = Array.from({ length: 12 }, (_, index) => `a${index}`);
  const files = Array.from({ length: 6 }, (_, index) => `f${index}`);
  guest.create('base', 24 * BLOCK, 3);
  guest.clone('base', disks);
  for (const file of files) guest.createFile(file);
  for (const disk of [...disks, ...files]) guest.open(disk);
  for (let step = 0; step < 90; step += 1) {
    const disk = random.pick(disks);
    const { at, length } = place(random, guest.sizeOf(disk), 4);
    if (random.chance(0.7)) guest.write(disk, at, length);
    else guest.discard(disk, at, length);
    const file = random.pick(files);
    if (step % 4 === 0) guest.write(file, guest.sizeOf(file), random.between(1, 2 * BLOCK));
    if (step % 25 === 0) await guest.flush(disk);
    if (step === 60) guest.clone('a1', ['c']);
  }
  process.kill(process.pid, 'SIGKILL');
}

const STEPS = ['partial', 'full', 'discard', 'flush', 'clone', 'fill', 'grow', 'shrink'] as const;

/** Every sequence of three operations on a new clone (CrashMonkey: three are enough), one disk after the other. */
async function sequences(open: () => Guest): Promise<void> {
  const guest = open();
  guest.create('base', 8 * BLOCK, 3);
  let number = 0;
  for (const first of STEPS) {
    for (const second of STEPS) {
      for (const third of STEPS) {
        number += 1;
        const disk = `s${number}`;
        guest.clone('base', [disk]);
        guest.open(disk);
        for (const [index, step] of [first, second, third].entries()) await act(guest, disk, step, `${disk}-${index}`);
        guest.close(disk);
        guest.remove(disk);
        for (const index of [0, 1, 2]) if ([first, second, third][index] === 'clone') guest.remove(`${disk}-${index}`);
        if (number % 20 === 0) guest.checkpoint(number % 40 === 0);
      }
    }
  }
}

async function act(guest: Guest, disk: string, step: (typeof STEPS)[number], target: string): Promise<void> {
  switch (step) {
    case 'partial': guest.write(disk, 2 * BLOCK + 700, 1000); return;
    case 'full': guest.write(disk, 2 * BLOCK, Math.min(2 * BLOCK, guest.sizeOf(disk) - 2 * BLOCK)); return;
    case 'discard': guest.discard(disk, 2 * BLOCK + 512, 2 * BLOCK); return;
    case 'flush': await guest.flush(disk); return;
    case 'clone': guest.clone(disk, [target]); return;
    case 'fill': guest.fillStep(disk); return;
    case 'grow': guest.resize(disk, 9 * BLOCK + 512); return;
    case 'shrink': guest.resize(disk, 3 * BLOCK + 1024); return;
    default: throw new Error(`there is no step ${String(step satisfies never)}`);
  }
}

/** The first start of a store, some disks, an orderly end; and what the next start finds. */
function start(open: () => Guest): void {
  open();
}

async function useAndClose(open: () => Guest): Promise<void> {
  const guest = open();
  guest.create('base', 16 * BLOCK, 3);
  guest.clone('base', ['a']);
  guest.open('a');
  guest.write('a', 5 * BLOCK + 100, 2 * BLOCK);
  await guest.flush('a');
  guest.write('a', 0, BLOCK);
  guest.close('a');
  await guest.store.close();
}

const WORKLOADS: Readonly<Record<string, Workload>> = {
  snapshots, containers, independence, receives, machines, vdisks, merge, writes, ranges, fill, 'copy-on-read': copyOnRead, discard, control, killed, sequences, start, 'use-and-close': useAndClose,
};

export async function runWorkload(name: string, open: () => Guest): Promise<void> {
  const workload = WORKLOADS[name];
  if (workload === undefined) throw new Error(`there is no workload ${name}`);
  await workload(open);
}
