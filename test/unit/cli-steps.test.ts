/** Steps of an operation: one line that is written over on a terminal, few lines elsewhere, none with --json. */
import { describe, expect, it } from 'vitest';

import { createOutput } from '../../cli/output.js';
import { createStepView } from '../../cli/steps.js';
import { createWorld, type CliWorld } from '../support/cli-fixture.js';

const CLEAR = '\r\u001b[K';

function view(terminal: boolean, json = false): { readonly world: CliWorld; readonly steps: ReturnType<typeof createStepView> } {
  const world = createWorld({ socketPath: '/none', terminal, sleepStepMs: 6000 });
  return { world, steps: createStepView(world.io, createOutput(world.io, json)) };
}

describe('the steps of an operation', () => {
  it('are one line on a terminal, never longer than it, and gone at the end', () => {
    const { world, steps } = view(true);
    steps.say('step 1 of 5: checks');
    steps.say('step 1 of 5: checks');
    steps.say(`step 4 of 5: ${'x'.repeat(200)}\u001b[2J`);
    steps.end();
    steps.end();
    expect(world.stderr.text).toBe(`${CLEAR}step 1 of 5: checks${CLEAR}step 4 of 5: ${'x'.repeat(85)}…${CLEAR}`);
  });

  it('are a line each elsewhere, and one now and then for a long one', async () => {
    const { world, steps } = view(false);
    for (const text of ['step 3 of 5: customising 100', 'step 4 of 5: registered 0 of 100', 'step 4 of 5: registered 8 of 100']) steps.say(text);
    await world.io.sleep(1, new AbortController().signal);
    steps.say('step 4 of 5: registered 16 of 100');
    steps.end();
    expect(world.stderr.text).toBe('step 3 of 5: customising 100\nstep 4 of 5: registered 0 of 100\nstep 4 of 5: registered 16 of 100\n');
  });

  it('are nothing with --json', () => {
    const { world, steps } = view(true, true);
    steps.say('step 1 of 5: checks');
    steps.end();
    expect(world.stderr.text).toBe('');
  });
});
