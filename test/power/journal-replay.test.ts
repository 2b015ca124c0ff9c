/** Recovery is interrupted: by a power loss, which takes the journals too, and by another kill, which leaves them. */
import path from 'node:path';
import { afterEach, afterAll, describe, expect, it } from 'vitest';

import { imagesWanted } from '../support/power/cuts.js';
import { RUNTIME, compileRecorded, createBench, cutAndReport, killVerdict, powerVerdict, type PowerBench } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('journal-replay');

const ROUNDS = 3;

afterEach(async () => { await cleanup.run(); });
afterAll(() => { programs.remove(); });

/** A process killed in the midst, and the one that recovers; where the second begins. */
async function recordRecovery(round: number): Promise<{ readonly bench: PowerBench; readonly recoveryAt: number }> {
  const bench = createBench(programs, cleanup, round);
  await bench.record('killed', { isKilled: true });
  // The journals are mapped memory, which outlives the process, and of which a trace shows nothing.
  bench.recorder.addMapped(path.join(bench.recorder.root, RUNTIME));
  const recoveryAt = bench.recorder.events.length;
  await bench.record('start');
  return { bench, recoveryAt };
}

describe('a recovery', () => {
  it('that a power loss interrupts leaves every block between its last flush and its newest write', async () => {
    let images = 0;
    // A recovery is short, so several are recorded: each of another store, killed at another moment.
    for (let round = 0; round < ROUNDS; round += 1) {
      const { bench, recoveryAt } = await recordRecovery(round);
      const result = await cutAndReport(bench, {
        name: `journal replay ${round}`, firstCut: recoveryAt - 1, images: Math.ceil((1.15 * imagesWanted()) / ROUNDS), verdict: powerVerdict(bench),
      });
      expect(result.failures).toEqual([]);
      images += result.images;
    }
    expect(images).toBeGreaterThanOrEqual(1000);
  });

  it('that is killed at any step and begun again gives back everything that was answered', async () => {
    const { bench, recoveryAt } = await recordRecovery(0);
    const result = await cutAndReport(bench, {
      name: 'killed recovery', firstCut: recoveryAt - 1, tears: ['everything'], without: [], images: bench.recorder.events.length - recoveryAt, verdict: killVerdict(),
    });
    expect(result.failures).toEqual([]);
    expect(result.cuts).toBeGreaterThan(30);
  });
});
