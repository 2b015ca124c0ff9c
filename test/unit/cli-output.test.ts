/** Tables and fields: aligned, without surprises for the terminal; progress in lines and as a bar. */
import { describe, expect, it } from 'vitest';
import { exitCodeOf } from '../../blockstore/errors.js';
import { checkExitCodes, exitCodeTable } from '../../cli/errors.js';
import { createOutput, displayWidth, renderFields, renderTable } from '../../cli/output.js';
import { createProgressView, createRateMeter, fitLine, progressText } from '../../cli/progress.js';
import { createWorld } from '../support/cli-fixture.js';

const GIB = 1024 ** 3;

describe('tables', () => {
  it('align their columns and end no line in spaces', () => {
    expect(renderTable([{ header: 'NAME' }, { header: 'SIZE', right: true }, { header: 'FILL' }], [['a', '10 GiB', 'running'], ['longer-name', '5 B', '']])).toEqual([
      'NAME           SIZE  FILL',
      'a            10 GiB  running',
      'longer-name     5 B',
    ]);
  });

  it('align names that take two columns a character, or none', () => {
    expect(displayWidth('日本')).toBe(4);
    expect(displayWidth('e\u0301')).toBe(1);
    expect(renderTable([{ header: 'NAME' }, { header: 'X' }], [['日本', '1'], ['e\u0301abc', '2']])).toEqual(['NAME  X', '日本  1', 'e\u0301abc  2']);
  });

  it('never let a name reach the terminal as a command', () => {
    const lines = [...renderTable([{ header: 'NAME' }], [['evil\u001b]0;title\u0007\n']]), ...renderFields('evil\u001b[2J', [['Path', 'a\rb']])];
    // eslint-disable-next-line no-control-regex -- control characters are what must not be there
    expect(lines.filter((line) => /[\u0000-\u001f]/u.test(line))).toEqual([]);
    expect(lines).toContain('evil\\x1b]0;title\\x07\\n');
  });

  it('fields go on under their first line', () => {
    expect(renderFields('vms/a.img', [['Size', '1 GiB'], ['Backing chain', ['layer 2', '└ layer 1']]])).toEqual([
      'vms/a.img', '  Size           1 GiB', '  Backing chain  layer 2', '                 └ layer 1',
    ]);
  });

  it('are bold at the top on a terminal only, and never with NO_COLOR or a dumb terminal', () => {
    const bold = (terminal: boolean, env: Record<string, string> = {}): string => createOutput(createWorld({ socketPath: '/x', terminal, env }).io, false).bold('x');
    expect([bold(true), bold(false), bold(true, { NO_COLOR: '1' }), bold(true, { TERM: 'dumb' })]).toEqual(['\u001b[1mx\u001b[22m', 'x', 'x', 'x']);
  });
});

describe('progress', () => {
  it('measures speed over the last seconds', () => {
    const meter = createRateMeter(1000);
    expect(meter(0, 0)).toBeNull();
    expect(meter(500, 500)).toBe(1000);
    for (let ms = 600; ms <= 5000; ms += 100) meter(ms, 500 + (ms - 500) * 4);
    expect(meter(5100, 500 + 4600 * 4)).toBe(4000);
  });

  it('says share, amount, speed and time left', () => {
    expect(progressText({ doneBytes: 4.2 * GIB, totalBytes: 10 * GIB }, 0.5 * GIB)).toBe('42 %, 4.2 of 10 GiB, 512 MiB/s, 12 s left');
    expect(progressText({ doneBytes: 4 * GIB, totalBytes: 10 * GIB }, GIB, { pace: 3 * GIB })).toBe('40 %, 4 of 10 GiB, 1 GiB/s, 2 s left');
    expect(progressText({ doneBytes: 10 * GIB, totalBytes: 10 * GIB }, GIB)).toBe('100 %, 10 of 10 GiB, 1 GiB/s');
    expect(progressText({ doneBytes: GIB, totalBytes: 0 }, null)).toBe('1 GiB done');
  });

  it('leaves out of a narrow line what matters least, and cuts a label from its beginning', () => {
    const parts = ['42 %', '4.2 of 10 GiB', '512 MiB/s', '12 s left'];
    const line = (label: string, columns: number): string => { const { label: cut, text } = fitLine(label, parts, columns); return `${cut}  ${text}`; };
    expect(line('flatten vms/web.img', 79)).toBe('flatten vms/web.img  42 %  4.2 of 10 GiB  512 MiB/s  12 s left');
    expect(line('flatten vms/web.img', 60)).toBe('flatten vms/web.img  42 %  4.2 of 10 GiB  12 s left');
    expect(line('flatten vms/web.img', 39)).toBe('flatten vms/web.img  42 %  12 s left');
    expect(line('flatten vms/web.img', 30)).toBe('flatten vms/web.img  42 %');
    expect(line('flatten vms/web.img', 15)).toBe('…/web.img  42 %');
    expect(fitLine('x', parts, 3)).toEqual({ label: '', text: '42 %' });
    for (let columns = 12; columns < 100; columns += 1) expect(line('a rather long label/of a disk.img', columns).length).toBeLessThanOrEqual(columns);
  });

  it('is a plain line every five seconds where there is no terminal', async () => {
    const world = createWorld({ socketPath: '/x', sleepStepMs: 1000 });
    const view = createProgressView(world.io, createOutput(world.io, false), 'import a/b');
    for (let step = 0; step <= 10; step += 1) {
      view.update({ doneBytes: step * GIB, totalBytes: 20 * GIB, bytesPerSecond: GIB });
      await world.io.sleep(0, new AbortController().signal);
    }
    view.end();
    expect(world.stderr.text).toBe('import a/b: 25 %, 5 of 20 GiB, 1 GiB/s, 15 s left\nimport a/b: 50 %, 10 of 20 GiB, 1 GiB/s, 10 s left\n');
  });

  it('is a bar on a terminal, that fits the line and gives the cursor back', async () => {
    const world = createWorld({ socketPath: '/x', terminal: true, sleepStepMs: 2000 });
    const view = createProgressView(world.io, createOutput(world.io, false), 'fill a/b');
    view.update({ doneBytes: 0, totalBytes: 4 * GIB, bytesPerSecond: GIB });
    await world.io.sleep(0, new AbortController().signal);
    view.update({ doneBytes: 2 * GIB, totalBytes: 4 * GIB, bytesPerSecond: GIB });
    view.end();
    expect(world.stderr.text).toContain('fill a/b  ███████████████░░░░░░░░░░░░░░░  50 %  2 of 4 GiB  1 GiB/s  2 s left');
    expect(world.stderr.text.lastIndexOf('\u001b[?25h')).toBeGreaterThan(world.stderr.text.lastIndexOf('\u001b[?25l'));
    expect(world.stdout.text).toBe('');
  });

  it('is plain ASCII where the locale is', () => {
    const world = createWorld({ socketPath: '/x', terminal: true, env: { LANG: 'C' } });
    const view = createProgressView(world.io, createOutput(world.io, false), 'x');
    view.update({ doneBytes: 1, totalBytes: 2 });
    view.end();
    expect(world.stderr.text).toContain('###############...............');
  });

  it('is silent with --json', () => {
    const world = createWorld({ socketPath: '/x', terminal: true });
    const view = createProgressView(world.io, createOutput(world.io, true), 'x');
    view.update({ doneBytes: 1, totalBytes: 2 });
    view.end();
    expect([world.stdout.text, world.stderr.text]).toEqual(['', '']);
  });
});

it('the list of exit codes has every code that an error can give, and no others', () => {
  expect(exitCodeTable.map(([code]) => code)).toEqual([...new Set([0, ...Object.values(exitCodeOf), ...Object.values(checkExitCodes)])].sort((a, b) => a - b));
});
