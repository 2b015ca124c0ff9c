/**
 * What a command prints: one result on standard output, notes on standard error.
 *
 * With --json the result is one object or one array and nothing else is printed; otherwise it is lines made for people,
 * with aligned columns. Names come from whoever can create files under the mount, guests' owners included, so control
 * characters in them are shown as escapes and never reach the terminal. Colours only on a terminal, and not with NO_COLOR.
 */
import { visible } from '../daemon/control/paths.js';
import { hasColours, type CliIo } from './io.js';

export interface Column {
  readonly header: string;
  /** Numbers go to the right. */
  readonly right?: boolean;
}

export interface Output {
  readonly json: boolean;
  /** The one result: `value` with --json, otherwise the lines. */
  result(value: unknown, lines: () => readonly string[]): void;
  /** For people only, on standard error. */
  note(text: string): void;
  readonly bold: (text: string) => string;
}

export function createOutput(io: CliIo, json: boolean): Output {
  const coloured = hasColours(io, io.stdout);
  return {
    json,
    result: (value, lines) => {
      const text = json ? JSON.stringify(value, null, 2) : lines().join('\n');
      if (text !== '') io.stdout.write(`${text}\n`);
    },
    note: (text) => {
      if (!json) io.stderr.write(`${text}\n`);
    },
    bold: (text) => coloured ? `\u001b[1m${text}\u001b[22m` : text,
  };
}

const COMBINING = /\p{Mark}|\u200d|\ufe0f/u;
const WIDE = /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u;

const PLAIN = /^[ -~]*$/u;

/** Columns of a terminal that a text takes. */
export function displayWidth(text: string): number {
  // Nearly every text of a long listing.
  if (PLAIN.test(text)) return text.length;
  let width = 0;
  for (const character of text) {
    if (COMBINING.test(character)) continue;
    width += WIDE.test(character) ? 2 : 1;
  }
  return width;
}

function pad(text: string, width: number, right: boolean): string {
  const space = ' '.repeat(Math.max(0, width - displayWidth(text)));
  return right ? space + text : text + space;
}

const GUTTER = '  ';

/** Lines of a table, the header first; no line ends in spaces. */
export function renderTable(columns: readonly Column[], rows: readonly (readonly string[])[], bold: (text: string) => string = (text) => text): string[] {
  const cells = rows.map((row) => row.map(visible));
  const widths = columns.map((column, index) => {
    let width = displayWidth(column.header);
    for (const row of cells) width = Math.max(width, displayWidth(row[index] ?? ''));
    return width;
  });
  const line = (row: readonly string[]): string =>
    columns.map((column, index) => pad(row[index] ?? '', widths[index] ?? 0, column.right === true)).join(GUTTER).trimEnd();
  return [bold(line(columns.map((column) => column.header))), ...cells.map(line)];
}

/** A title and named values under it. A value of several lines goes on under its first. */
export function renderFields(title: string, fields: readonly (readonly [string, string | readonly string[]])[], bold: (text: string) => string = (text) => text): string[] {
  const width = Math.max(0, ...fields.map(([name]) => displayWidth(name)));
  const lines = [bold(visible(title))];
  for (const [name, value] of fields) {
    const values = typeof value === 'string' ? [value] : value;
    values.forEach((text, index) => {
      lines.push(`${GUTTER}${pad(index === 0 ? name : '', width, false)}${GUTTER}${visible(text)}`.trimEnd());
    });
  }
  return lines;
}

/** `1 disk`, `3 disks`. */
export function counted(count: number, singular: string, plural = `${singular}s`): string {
  return `${count} ${count === 1 ? singular : plural}`;
}
