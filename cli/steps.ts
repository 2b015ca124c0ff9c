/**
 * Steps of an operation on standard error: on a terminal one line that is written over and goes with the end; elsewhere a line for each step,
 * and one now and then for what a long one says of itself; nothing with --json.
 */
import { visible } from '../daemon/control/paths.js';
import { isTerminal, type CliIo } from './io.js';
import { displayWidth, type Output } from './output.js';

export interface StepView {
  say(text: string): void;
  /** The line is free again. Can be called twice. */
  end(): void;
}

const PLAIN_INTERVAL_MS = 5000;
const COLUMNS_DEFAULT = 80;
const CLEAR_LINE = '\r\u001b[K';
const ELLIPSIS = '…';
/** `step 4 of 5` of `step 4 of 5: registered 8 of 100`. */
const STEP = /^[^:]*/u;

export function createStepView(io: CliIo, output: Output): StepView {
  if (output.json) return { say: () => undefined, end: () => undefined };
  return isTerminal(io, io.stderr) ? lineView(io) : plainView(io, output);
}

function lineView(io: CliIo): StepView {
  let said = '';
  return {
    say: (text) => {
      if (text === said) return;
      said = text;
      // A terminal that does not know its width says 0.
      const columns = io.stderr.columns === undefined || io.stderr.columns === 0 ? COLUMNS_DEFAULT : io.stderr.columns;
      io.stderr.write(`${CLEAR_LINE}${fit(visible(text), columns)}`);
    },
    end: () => {
      if (said !== '') io.stderr.write(CLEAR_LINE);
      said = '';
    },
  };
}

function plainView(io: CliIo, output: Output): StepView {
  let said = '';
  let saidMs = 0;
  return {
    say: (text) => {
      if (text === '' || text === said) return;
      if (STEP.exec(text)?.[0] === STEP.exec(said)?.[0] && io.nowMs() - saidMs < PLAIN_INTERVAL_MS) return;
      said = text;
      saidMs = io.nowMs();
      output.note(visible(text));
    },
    end: () => undefined,
  };
}

function fit(text: string, columns: number): string {
  if (displayWidth(text) < columns) return text;
  const characters = Array.from(text);
  while (characters.length > 0 && displayWidth(`${characters.join('')}${ELLIPSIS}`) >= columns) characters.pop();
  return `${characters.join('')}${ELLIPSIS}`;
}
