/**
 * The probe of the stall benchmark: a worker thread's program, as text, because it needs nothing of the rest.
 *
 * Alternates 4 KiB writes and reads of one open disk, with blocking direct I/O, and keeps the longest pause between two answers in shared
 * word 0 (milliseconds), which the main thread sets back before each kill. What it reads must be what it wrote last.
 */
export const PROBE_WORDS = 2;

export const probeSource = `
const fs = require('node:fs');
const { workerData } = require('node:worker_threads');
const words = new Float64Array(workerData.shared);
const nap = new Int32Array(new SharedArrayBuffer(4));
const fd = fs.openSync(workerData.file, fs.constants.O_RDWR | fs.constants.O_DIRECT);
const raw = Buffer.from(new ArrayBuffer(16384));

const block = raw.subarray(0, 4096);
const back = raw.subarray(4096, 8192);
let last = performance.now();
const answered = () => {
  const now = performance.now();
  if (now - last > words[0]) words[0] = now - last;
  last = now;
};
for (let round = 0; ; round += 1) {
  const at = (round % 1024) * 4096;
  block.fill(round & 255);
  if (fs.writeSync(fd, block, 0, 4096, at) !== 4096) throw new Error('a short write');
  answered();
  if (fs.readSync(fd, back, 0, 4096, at) !== 4096 || !back.equals(block)) throw new Error('read what was not written');
  answered();
  Atomics.wait(nap, 0, 0, 1);
}
`;
