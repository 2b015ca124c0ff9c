/**
 * Reads reports of vitest's JSON reporter.
 *
 *   vitest-totals.mjs again REPORT                     the files that may be run a second time, a line each
 *   vitest-totals.mjs totals FAILURES REPORT [SECOND]  prints three numbers: passed, failed, skipped
 *
 * Totals: a file that could not even be loaded holds no test; it counts as one that failed. A file that is in the second report too
 * counts as it ended there. Appended to FAILURES is which tests failed, and how each of them says it in its first lines, so that
 * whoever sees only the end of a long run sees why; and which failed the first time only, so that none of them is forgotten.
 */
import { appendFileSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { stripVTControlCharacters } from 'node:util';

const LINES_MAX = 60;
/** A failure that names the seed with which it comes again was found by chance: passing with another seed says nothing. */
const SEEDED = /\bseed[ =]\d/iu;

const read = (file) => JSON.parse(readFileSync(file, 'utf8')).testResults;
const withStatus = (file, ...statuses) => file.assertionResults.filter((test) => statuses.includes(test.status));
const failedIn = (file) => withStatus(file, 'failed');
const isUnloadable = (file) => file.status === 'failed' && failedIn(file).length === 0;
const nameOf = (file) => path.relative(process.cwd(), file.name);

/** The message indented, its long tail cut. */
function excerpt(message) {
  const lines = stripVTControlCharacters(message).trimEnd().split('\n');
  const shown = lines.slice(0, LINES_MAX).map((line) => `    ${line}`.trimEnd());
  return lines.length > LINES_MAX ? [...shown, `    (${lines.length - LINES_MAX} more lines above)`] : shown;
}

function failuresOf(file, how) {
  const tests = failedIn(file).flatMap((test) => [`${how}: ${nameOf(file)}: ${test.fullName}`, ...test.failureMessages.flatMap(excerpt)]);
  return isUnloadable(file) ? [`${how}: ${nameOf(file)}`, ...excerpt(file.message ?? '')] : tests;
}

function again(report) {
  const failed = read(report).filter((file) => file.status === 'failed');
  const isByChance = (file) => failedIn(file).some((test) => test.failureMessages.some((message) => SEEDED.test(message)));
  return failed.filter((file) => !isByChance(file)).map((file) => `${nameOf(file)}\n`).join('');
}

function totals(failuresFile, report, second) {
  const later = new Map((second === undefined ? [] : read(second)).map((file) => [file.name, file]));
  const first = read(report);
  const files = first.map((file) => later.get(file.name) ?? file);
  const lines = [
    ...first.filter((file) => later.get(file.name)?.status === 'passed').flatMap((file) => failuresOf(file, 'passed only the second time')),
    ...files.flatMap((file) => failuresOf(file, 'failed')),
  ];
  if (lines.length > 0) appendFileSync(failuresFile, `${lines.join('\n')}\n`);
  const count = (counted) => files.reduce((sum, file) => sum + counted(file), 0);
  const failed = count((file) => failedIn(file).length + (isUnloadable(file) ? 1 : 0));
  const skipped = count((file) => withStatus(file, 'pending', 'skipped', 'todo').length);
  return `${count((file) => withStatus(file, 'passed').length)} ${failed} ${skipped}\n`;
}

const [what, ...rest] = process.argv.slice(2);
process.stdout.write(what === 'again' ? again(...rest) : totals(...rest));
