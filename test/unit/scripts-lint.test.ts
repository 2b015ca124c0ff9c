/**
 * The rules that the machine keeps, each shown to fail: a rule that matches nothing looks just like one that is obeyed.
 */
import { mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { ESLint } from 'eslint';
import { afterAll, describe, expect, it } from 'vitest';

import { command } from '../support/model/command.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const ROOT = resolve(import.meta.dirname, '../..');
const LINT_TIMEOUT_MS = 60_000;

// Under CI=true the parser would take each file as it lies on the disk, whatever text it is given.
process.env['TSESTREE_SINGLE_RUN'] = 'false';

describe('lint', () => {
  const eslint = new ESLint({ cwd: ROOT, overrideConfigFile: join(ROOT, 'scripts/lint/eslint.config.js') });

  /** Rules that `code` breaks when it stands in `file`, which must exist: the types come from the project. */
  async function broken(file: string, code: string): Promise<string[]> {
    const [result] = await eslint.lintText(code, { filePath: join(ROOT, file) });
    return result!.messages.map((message) => message.ruleId ?? message.message);
  }

  it.each([
    ['an async function', 'export async function f(): Promise<void> { return; }'],
    ['await', 'export const x = await Promise.resolve(1);'],
    ['a BigInt literal', 'export const x = 1n;'],
    ['BigInt()', 'export const x = (n: number): unknown => BigInt(n);'],
    ['a 64-bit read', 'export const x = (view: DataView): unknown => view.getBigUint64(0);'],
    ['JSON', 'export const x = (n: number): string => JSON.stringify(n);'],
    ['a left shift', 'export const x = (n: number): number => n << 1;'],
    ['a right shift', 'export const x = (n: number): number => n >> 1;'],
    ['an unsigned shift', 'export const x = (n: number): number => n >>> 1;'],
    ['a shift by assignment', 'export const x = (n: number): number => { n <<= 1; return n; };'],
    ['truncation to 32 bits', 'export const x = (n: number): number => n | 0;'],
  ])('refuses %s on the hot path', async (_what, code) => {
    for (const file of ['blockstore/hot/door.ts', 'daemon/transport/kernel/io-worker.ts']) {
      expect(await broken(file, code)).toContain('no-restricted-syntax');
    }
    expect(await broken('blockstore/units.ts', code)).not.toContain('no-restricted-syntax');
  }, LINT_TIMEOUT_MS);

  it('refuses the logger and SQLite on the hot path', async () => {
    const code = "export { pino } from 'pino'; export * from 'better-sqlite3'; export * from '../meta/rows.js';";
    expect((await broken('blockstore/hot/door.ts', code)).filter((rule) => rule === 'no-restricted-imports')).toHaveLength(3);
  }, LINT_TIMEOUT_MS);

  it('lets the block map shift, and nothing else of the hot path', async () => {
    const code = 'export const x = (n: number): number => n << 1;';
    expect(await broken('blockstore/hot/block-map.ts', code)).toEqual([]);
    expect(await broken('blockstore/hot/block-map.ts', 'export const x = 1n;')).toContain('no-restricted-syntax');
  }, LINT_TIMEOUT_MS);

  it('refuses promises that nobody waits for, in tests even with void', async () => {
    const floating = 'export function f(): void { Promise.resolve(1); }';
    const voided = 'export function f(): void { void Promise.resolve(1); }';
    const rule = '@typescript-eslint/no-floating-promises';
    expect(await broken('blockstore/units.ts', floating)).toContain(rule);
    expect(await broken('test/support/temp.ts', floating)).toContain(rule);
    expect(await broken('test/support/temp.ts', voided)).toContain(rule);
  }, LINT_TIMEOUT_MS);

  it('refuses tests that are left out', async () => {
    for (const test of ["it.only('', () => {});", "describe.skip('', () => {});", "it.todo('');"]) {
      expect(await broken('test/support/temp.ts', `import { it, describe } from 'vitest';\n${test}\nexport { it, describe };`)).toContain('no-restricted-syntax');
    }
  }, LINT_TIMEOUT_MS);

  it('refuses more than 400 lines of code, not of comments', async () => {
    const lines = (count: number, line: (n: number) => string): string => Array.from({ length: count }, (_, n) => line(n)).join('\n');
    expect(await broken('blockstore/units.ts', lines(401, (n) => `export const a${n} = 1;`))).toContain('max-lines');
    expect(await broken('blockstore/units.ts', lines(500, (n) => `// ${n}`))).not.toContain('max-lines');
  }, LINT_TIMEOUT_MS);
});

describe('layering', () => {
  const cleanup = createCleanup();
  afterAll(async () => { await cleanup.run(); });

  /** A small tree in which every rule is broken at least once. */
  const BROKEN: Readonly<Record<string, string>> = {
    'blockstore/errors.ts': 'export const e = 1;',
    'blockstore/units.ts': "import './errors.js'; export const u = 1;",
    'blockstore/upward.ts': "import '../daemon/control/client.js';",
    'blockstore/meta/store.ts': "import D from 'better-sqlite3'; export { D };",
    'blockstore/database.ts': "import D from 'better-sqlite3'; export { D };",
    'blockstore/between.ts': "import type { D } from './meta/store.js'; export type Store = typeof D;",
    'blockstore/hot/path.ts': "import pino from 'pino'; import koffi from 'koffi'; import * as fs from 'node:fs'; import '../units.js'; export { pino, koffi, fs };",
    'daemon/control/client.ts': "import '../../blockstore/units.js';",
    'daemon/control/server.ts': "import fastify from 'fastify'; export { fastify };",
    'daemon/orphan.ts': 'export const o = 1;',
    'daemon/fill-worker.ts': "import '../blockstore/between.js';",
    'daemon/filesystem/names.ts': "import '../transport/kernel/session.js';",
    'daemon/transport/kernel/session.ts': "import '../../filesystem/names.js'; import '../fuse-native/mount.js';",
    'daemon/transport/kernel/protocol.ts': "import '../../control/server.js';",
    'daemon/transport/fuse-native/mount.ts': "import '../../../blockstore/units.js';",
    'daemon/server/parts.ts': 'export const p = 1;',
    'cli/main.ts': "import '../daemon/server/parts.js'; import '../daemon/control/server.js'; import '../test/support.js'; import { it } from 'vitest'; import './gone.js'; export { it };",
    'test/support.ts': 'export const s = 1;',
  };

  it('finds every rule broken where it is', async () => {
    const tree = makeTempDir('layers', cleanup);
    const files: Record<string, string> = { ...BROKEN, 'package.json': JSON.stringify({ type: 'module', dependencies: { 'better-sqlite3': '*', koffi: '*', pino: '*', fastify: '*' }, devDependencies: { vitest: '*' } }) };
    for (const [file, text] of Object.entries(files)) {
      mkdirSync(dirname(join(tree, file)), { recursive: true });
      writeFileSync(join(tree, file), text);
    }
    symlinkSync(join(ROOT, 'node_modules'), join(tree, 'node_modules'));
    symlinkSync(join(ROOT, 'tsconfig.json'), join(tree, 'tsconfig.json'));

    const rules = join(ROOT, 'scripts/lint/dependency-cruiser.cjs');
    const depcruise = join(ROOT, 'node_modules/.bin/depcruise');
    const result = await command(depcruise, ['--config', rules, '--output-type', 'json', 'blockstore', 'daemon', 'cli'], { cwd: tree, timeoutMs: LINT_TIMEOUT_MS });
    const { summary } = JSON.parse(result.stdout) as { readonly summary: { readonly violations: readonly Violation[] } };
    const found = summary.violations.map((violation) => `${violation.rule.name}: ${violation.from}`);

    const { forbidden } = createRequire(import.meta.url)(rules) as { readonly forbidden: readonly { readonly name: string }[] };
    expect(new Set(summary.violations.map((violation) => violation.rule.name))).toEqual(new Set(forbidden.map((rule) => rule.name)));
    expect(found.filter((each) => each.startsWith('workers-reach-no-sqlite-logger-or-server'))).toEqual([
      'workers-reach-no-sqlite-logger-or-server: daemon/fill-worker.ts',
      'workers-reach-no-sqlite-logger-or-server: daemon/transport/kernel/protocol.ts',
    ]);
    // Of what hot/path.ts imports, the logger alone is too much.
    expect(found.filter((each) => each.startsWith('hot-is-worker-safe'))).toEqual(['hot-is-worker-safe: blockstore/hot/path.ts']);
  }, LINT_TIMEOUT_MS);
});

interface Violation {
  readonly from: string;
  readonly rule: { readonly name: string };
}
