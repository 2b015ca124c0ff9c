/**
 * What goes on all the time in a torture run: several model runs beside each other, each on disks of its own, and fio with
 * verification on clones that are filled meanwhile. They can be parked between two steps, for what ends every open file.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import { runFio } from '../fio.js';
import type { ModelRun } from '../model/model-run.js';
import type { Random } from '../model/random.js';
import { removeWhenClosed, type PatientControl } from './patient-control.js';

const MIB = 1024 * 1024;
const POLL_MS = 20;
const FIO_TIMEOUT_MS = 120_000;

export interface FioLane {
  readonly control: PatientControl;
  readonly source: string;
  readonly sourceBytes: number;
  readonly container: string;
  readonly pathOf: (path: string) => string;
  readonly random: Random;
}

export class Lanes {
  readonly #runs: readonly ModelRun[];
  readonly #fio: FioLane;
  readonly #loops: Promise<void>[] = [];
  #parked = 0;
  #wantsParking = false;
  #ended = false;
  #failure: { readonly thrown: unknown } | null = null;
  #fioRuns = 0;

  constructor(runs: readonly ModelRun[], fio: FioLane) {
    this.#runs = runs;
    this.#fio = fio;
  }

  get fioRuns(): number {
    return this.#fioRuns;
  }

  start(): void {
    for (const run of this.#runs) this.#loops.push(this.#loop(() => run.step()));
    this.#loops.push(this.#loop(() => this.#verifyWithFio()));
  }

  /** Throws what went wrong in a lane, if anything did. */
  assertWell(): void {
    if (this.#failure !== null) throw this.#failure.thrown;
  }

  /** Runs `body` while every lane stands between two steps. */
  async whileParked(body: () => Promise<void>): Promise<void> {
    this.#wantsParking = true;
    try {
      while (this.#parked < this.#loops.length) {
        this.assertWell();
        await sleep(POLL_MS);
      }
      await body();
    } finally {
      this.#wantsParking = false;
    }
    while (this.#parked > 0) await sleep(POLL_MS);
  }

  /** Ends the lanes after the steps they are in. */
  async end(): Promise<void> {
    this.#ended = true;
    await Promise.all(this.#loops);
    this.assertWell();
  }

  async #loop(step: () => Promise<void>): Promise<void> {
    while (!this.#ended && this.#failure === null) {
      if (this.#wantsParking) {
        this.#parked += 1;
        while (this.#stillParking()) await sleep(POLL_MS);
        this.#parked -= 1;
        continue;
      }
      try {
        await step();
      } catch (thrown) {
        this.#failure ??= { thrown };
      }
    }
  }

  #stillParking(): boolean {
    return this.#wantsParking && !this.#ended;
  }

  /** A clone that is written and verified by fio while it fills, sometimes paused; then it goes. */
  async #verifyWithFio(): Promise<void> {
    const { control, source, sourceBytes, container, pathOf, random } = this.#fio;
    const path = `${container}/fio-${this.#fioRuns + 1}`;
    await control.clone({ source, targets: [path], fill: false, copyOnRead: random.chance(0.3) });
    await control.fillStart(path, { rateBytesPerSecond: random.pick([MIB, 4 * MIB, 16 * MIB]) });
    const writing = runFio({
      filename: pathOf(path), size: sourceBytes, rw: random.pick(['randrw', 'randwrite']), bsrange: random.pick(['512-16k', '4k-4k', '4k-128k']), bs_unaligned: false,
      ioengine: random.pick(['libaio', 'psync']), iodepth: 8, direct: 1, io_size: 12 * MIB, rate: '3m,3m', verify: 'crc32c', verify_fatal: 1, do_verify: 1,
      fdatasync: random.pick([0, 32]), randseed: random.between(1, 1_000_000), allow_file_create: 0,
    }, FIO_TIMEOUT_MS);
    await Promise.all([writing, this.#pauseAndResume(path)]);
    await removeWhenClosed(control, path);
    this.#fioRuns += 1;
  }

  async #pauseAndResume(path: string): Promise<void> {
    const { control, random } = this.#fio;
    await sleep(random.between(0, 1500));
    if ((await control.fillStatus(path)).state !== 'running') return;
    try {
      await control.fillPause(path);
      await sleep(random.between(0, 500));
      await control.fillResume(path, { rateBytesPerSecond: random.pick([null, 8 * MIB]) });
    } catch (thrown) {
      // It came to its end in between.
      if ((await control.fillStatus(path)).state !== 'completed') throw thrown;
    }
  }
}
