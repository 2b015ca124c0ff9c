/** What a metadata store is after kill -9: a child commits as fast as it can, and dies at an instant of nobody's choice. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { afterAll, describe, expect, it } from 'vitest';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { PAGE_BLOCKS } from '../../blockstore/units.js';
import { compilePrograms } from '../support/compiled-program.js';
import { databasePath, openStore } from '../support/meta-store-fixture.js';

const ROUNDS = 8;
const ENTRY = 'test/support/commit-program.ts';

const programs = compilePrograms('meta-kill', [ENTRY]);

afterAll(() => { programs.remove(); });

/** Starts the child, kills it once it said `line` (or a number at least that high), and returns the last number it said. */
async function killAfter(path: string, first: number, line: string): Promise<number> {
  const child = spawn(process.execPath, [programs.pathOf(ENTRY), path, String(first)], { stdio: ['ignore', 'pipe', 'inherit'] });
  const exited = once(child, 'exit');
  let last = first - 1;
  try {
    for await (const said of createInterface({ input: child.stdout })) {
      if (said !== 'opening') last = Number(said);
      if (said === line || last >= Number(line)) child.kill('SIGKILL');
    }
  } finally {
    child.kill('SIGKILL');
  }
  expect((await exited)[1]).toBe('SIGKILL');
  return last;
}

/** Checks that the store holds transactions 0 to some number at least as high as `acknowledged`, each of them whole. */
function expectWholeTransactions(path: string, acknowledged: number): number {
  const store = openStore(path);
  const names = new Set(store.nodes.children(ROOT_ID, 0, 1_000_000).map((node) => node.name));
  const count = names.size / 2;
  expect(count).toBeGreaterThan(acknowledged);
  expect(count).toBeLessThanOrEqual(acknowledged + 2);
  for (let number = 0; number < count; number += 1) {
    expect(names.has(String(number))).toBe(true);
    const layerId = store.nodes.child(ROOT_ID, `${number}.img`)?.layerId ?? 0;
    expect(store.ownership.ownedBlocks(layerId)).toBe(PAGE_BLOCKS + 1);
  }
  store.close();
  return count;
}

describe('a metadata store whose process is killed', () => {
  it('keeps every transaction that returned, and no part of one that did not', { timeout: 60_000 }, async () => {
    const path = databasePath();
    let next = 0;
    for (let round = 0; round < ROUNDS; round += 1) {
      const acknowledged = await killAfter(path, next, String(next + 3 + round));
      next = expectWholeTransactions(path, acknowledged);
    }
  });

  it('opens although the process died while it made the store', { timeout: 60_000 }, async () => {
    for (let round = 0; round < ROUNDS; round += 1) {
      const path = databasePath();
      const acknowledged = await killAfter(path, 0, 'opening');
      const store = openStore(path);
      expect(store.nodes.byId(ROOT_ID)).toBeDefined();
      expect(store.nodes.childCount(ROOT_ID)).toBeGreaterThanOrEqual(2 * (acknowledged + 1));
    }
  });
});
