/**
 * Progress of long work on standard error: a bar on a terminal, a plain line now and then elsewhere, nothing with --json.
 *
 * Speed is measured here over the last seconds when the daemon does not say it. A view is ended exactly once, and gives
 * the cursor back then; signals are not its business.
 */
import { createRequire } from 'node:module';
import type cliProgress from 'cli-progress';
import { isTerminal, type CliIo } from './io.js';
import { displayWidth, type Output } from './output.js';
import { formatBytes, formatBytesOf, formatPercent, formatRate, formatTimeLeft } from './sizes.js';
import { visible } from '../daemon/control/paths.js';

/** The bar's library is for terminals only, and most commands show no bar: it is loaded with the first one. */
const require = createRequire(import.meta.url);

export interface Progress {
  readonly doneBytes: number;
  /** 0: not known yet. */
  readonly totalBytes: number;
  /** Undefined: measured here. */
  readonly bytesPerSecond?: number | undefined;
}

export interface ProgressView {
  update(progress: Progress): void;
  end(): void;
}

const PLAIN_INTERVAL_MS = 5000;
const RATE_WINDOW_MS = 5000;
const BAR_CHARACTERS_MAX = 30;
/** A shorter one says nothing. */
const BAR_CHARACTERS_MIN = 5;
const COLUMNS_DEFAULT = 80;
const GAP = '  ';
const ELLIPSIS = '…';
/** What the text beside a bar usually takes: with this kept free, the bar keeps its length while the text changes. */
const TEXT_CHARACTERS = 48;

/** Bytes per second over the last few seconds; null until there are two samples. */
export function createRateMeter(windowMs = RATE_WINDOW_MS): (nowMs: number, doneBytes: number) => number | null {
  let samples: { readonly atMs: number; readonly bytes: number }[] = [];
  return (nowMs, doneBytes) => {
    samples.push({ atMs: nowMs, bytes: doneBytes });
    // The oldest sample kept is the last one outside the window, so that the window is always spanned.
    const inside = samples.findIndex((sample) => sample.atMs > nowMs - windowMs);
    if (inside > 1) samples = samples.slice(inside - 1);
    const first = samples[0];
    if (first === undefined || nowMs <= first.atMs) return null;
    return Math.max(0, (doneBytes - first.bytes) * 1000 / (nowMs - first.atMs));
  };
}

/**
 * `42 %, 4.2 of 10 GiB, 512 MiB/s, 12 s left`. What is left goes by the pace at which `doneBytes` grows, when that is known:
 * where holes are passed over, that is faster than bytes are copied.
 */
export function progressText(progress: Progress, bytesPerSecond: number | null, options: { readonly pace?: number | null } = {}): string {
  return progressParts(progress, bytesPerSecond, options).join(', ');
}

function progressParts(progress: Progress, bytesPerSecond: number | null, options: { readonly pace?: number | null } = {}): string[] {
  const { doneBytes, totalBytes } = progress;
  const parts = totalBytes > 0 ? [formatPercent(doneBytes, totalBytes), formatBytesOf(doneBytes, totalBytes)] : [`${formatBytes(doneBytes)} done`];
  if (bytesPerSecond !== null && bytesPerSecond > 0) {
    parts.push(formatRate(bytesPerSecond));
    const pace = Math.max(bytesPerSecond, options.pace ?? 0);
    if (totalBytes > doneBytes) parts.push(`${formatTimeLeft((totalBytes - doneBytes) / pace)} left`);
  }
  return parts;
}

export function createProgressView(io: CliIo, output: Output, label: string): ProgressView {
  if (output.json) return { update: () => undefined, end: () => undefined };
  const meter = createRateMeter();
  const partsOf = (progress: Progress): string[] => {
    const pace = meter(io.nowMs(), progress.doneBytes);
    return progressParts(progress, progress.bytesPerSecond ?? pace, { pace });
  };
  return isTerminal(io, io.stderr) ? barView(io, visible(label), partsOf) : plainView(io, visible(label), partsOf);
}

type PartsOf = (progress: Progress) => string[];

function plainView(io: CliIo, label: string, partsOf: PartsOf): ProgressView {
  let lastMs: number | null = null;
  return {
    update: (progress) => {
      const text = partsOf(progress).join(', ');
      const nowMs = io.nowMs();
      // What ends soon needs no line.
      lastMs ??= nowMs;
      if (nowMs - lastMs < PLAIN_INTERVAL_MS) return;
      lastMs = nowMs;
      io.stderr.write(`${label}: ${text}\n`);
    },
    end: () => undefined,
  };
}

/** Which parts of the text stay where a line is short: speed goes first, then bytes, then the time that is left. */
const KEPT_PARTS = [[0, 1, 2, 3], [0, 1, 3], [0, 3], [0]] as const;

/** What fits into so many columns of a label and the parts of a text. The end of a label says more than its beginning. */
export function fitLine(label: string, parts: readonly string[], columns: number): { readonly label: string; readonly text: string } {
  let text = '';
  for (const kept of KEPT_PARTS) {
    text = parts.filter((_, index) => (kept as readonly number[]).includes(index)).join('  ');
    if (displayWidth(label) + GAP.length + text.length <= columns) return { label, text };
  }
  const characters = Array.from(label);
  while (characters.length > 0 && displayWidth(characters.join('')) + ELLIPSIS.length + GAP.length + text.length > columns) characters.shift();
  return { label: characters.length === 0 ? '' : `${ELLIPSIS}${characters.join('')}`, text };
}

function barView(io: CliIo, label: string, partsOf: PartsOf): ProgressView {
  const [full, empty] = speaksUtf8(io) ? ['█', '░'] : ['#', '.'];
  let parts: readonly string[] = [];
  let share = 0;
  let isShareKnown = true;
  const { SingleBar } = require('cli-progress') as typeof cliProgress;
  const bar = new SingleBar({
    stream: io.stderr,
    format: () => {
      // A terminal that does not know its width says 0.
      const columns = io.stderr.columns === undefined || io.stderr.columns === 0 ? COLUMNS_DEFAULT : io.stderr.columns;
      const line = fitLine(label, parts, columns - 1);
      // The text matters more than the bar: the bar gets what is left of the line.
      const room = columns - 1 - displayWidth(line.label) - Math.max(line.text.length, TEXT_CHARACTERS) - 2 * GAP.length;
      // Of an amount that is not known there is no share.
      const length = room < BAR_CHARACTERS_MIN || !isShareKnown ? 0 : Math.min(BAR_CHARACTERS_MAX, room);
      const done = Math.round(length * share);
      return [line.label, `${full.repeat(done)}${empty.repeat(length - done)}`, line.text].filter((each) => each !== '').join(GAP);
    },
    hideCursor: true,
    gracefulExit: false,
    emptyOnZero: true,
    forceRedraw: true,
  });
  let started = false;
  return {
    update: (progress) => {
      parts = partsOf(progress);
      isShareKnown = progress.totalBytes > 0;
      share = isShareKnown ? Math.min(1, progress.doneBytes / progress.totalBytes) : 0;
      if (!started) bar.start(1, 0);
      started = true;
      bar.update(share);
    },
    end: () => {
      if (started) bar.stop();
    },
  };
}

function speaksUtf8(io: CliIo): boolean {
  const locale = [io.env['LC_ALL'], io.env['LC_CTYPE'], io.env['LANG']].find((value) => value !== undefined && value !== '');
  return /utf-?8/iu.test(locale ?? '');
}
