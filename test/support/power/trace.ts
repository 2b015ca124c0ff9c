/**
 * A log of strace, taken apart: which system calls were made, with what, in which order they began and ended.
 *
 * Read from `strace -f -xx`: every text is hexadecimal, so nothing in it can look like syntax. A call that another thread
 * interrupted stands in two lines, and gives a beginning and an end with other events in between; any other call gives
 * both at once. A line that is not understood ends the test: what was not understood was not recorded.
 */

/** One line's worth: `enter` when the call began, `exit` with its result when it ended. */
export type TraceEvent =
  | { readonly kind: 'enter'; readonly call: Call }
  | { readonly kind: 'exit'; readonly call: Call; readonly result: number };

export interface Call {
  readonly name: string;
  readonly args: readonly Argument[];
}

/** Texts come as bytes; everything else (numbers, flags) as strace writes it. */
export type Argument = Buffer | string;

const LINE = /^(\d+)\s+(.*)$/su;
const RESUMED = /^<\.\.\. \w+ resumed>(.*)$/su;
const UNFINISHED = ' <unfinished ...>';

export function* parseTrace(log: string): Generator<TraceEvent> {
  const pending = new Map<string, { readonly call: Call; readonly text: string }>();
  let at = 0;
  while (at < log.length) {
    let end = log.indexOf('\n', at);
    // The last line of a process that was killed may be cut.
    if (end < 0) end = log.length;
    const line = log.slice(at, end);
    at = end + 1;
    const [, thread, text] = LINE.exec(line) ?? [];
    if (thread === undefined || text === undefined) throw new Error(`a line of the trace is not understood: ${line.slice(0, 200)}`);
    if (text.startsWith('+++') || text.startsWith('---')) continue;
    const resumed = RESUMED.exec(text);
    if (resumed !== null) {
      const began = pending.get(thread);
      if (began === undefined) throw new Error(`the trace resumes a call that never began: ${line.slice(0, 200)}`);
      pending.delete(thread);
      const result = resultOf(text);
      if (result !== null) yield { kind: 'exit', call: began.call, result };
      continue;
    }
    if (text.endsWith(UNFINISHED)) {
      const call = parseCall(text.slice(0, -UNFINISHED.length));
      pending.set(thread, { call, text });
      yield { kind: 'enter', call };
      continue;
    }
    const call = parseCall(text);
    const result = resultOf(text);
    yield { kind: 'enter', call };
    if (result !== null) yield { kind: 'exit', call, result };
  }
}

/** Null for a call that never returned. */
function resultOf(text: string): number | null {
  const at = text.lastIndexOf(') = ');
  const equals = at >= 0 ? at + 4 : text.lastIndexOf(' = ') + 3;
  const [word = ''] = text.slice(equals).split(' ');
  if (word === '?') return null;
  const value = Number(word);
  if (Number.isNaN(value)) throw new Error(`the result of a call is not understood: ${text.slice(-200)}`);
  return value;
}

function parseCall(text: string): Call {
  const open = text.indexOf('(');
  if (open < 0) throw new Error(`a call in the trace is not understood: ${text.slice(0, 200)}`);
  const args: Argument[] = [];
  let at = open + 1;
  while (at < text.length && text[at] !== ')') {
    if (text[at] === '"') {
      const close = text.indexOf('"', at + 1);
      if (text.startsWith('...', close + 1)) throw new Error('the trace cut a text short: strace needs a larger -s');
      args.push(Buffer.from(text.slice(at + 1, close).replaceAll('\\x', ''), 'hex'));
      at = close + 1;
    } else {
      let end = at;
      while (end < text.length && text[end] !== ',' && text[end] !== ')') end += 1;
      args.push(text.slice(at, end));
      at = end;
    }
    if (text.startsWith(', ', at)) at += 2;
  }
  return { name: text.slice(0, open), args };
}
