/**
 * The lint rules of the whole checkout; run from its root: `eslint -c scripts/lint/eslint.config.js .`
 *
 * typescript-eslint's strictest sets, everything an error. A rule that is off has its reason beside it. The hot path has a
 * law of its own (synchronous, nothing allocated on purpose, no 32-bit arithmetic on offsets), kept by the block
 * named "hot path" below.
 */
import { defineConfig } from 'eslint/config';
import tseslint from 'typescript-eslint';

const typescript = ['**/*.ts'];
const tests = ['test/**/*.ts'];
const shipped = ['blockstore/**/*.ts', 'daemon/**/*.ts', 'cli/**/*.ts'];
const hotPath = ['blockstore/hot/**/*.ts', 'daemon/transport/kernel/io-worker.ts'];
/** What may shift: it takes packed words of the block map apart, never offsets. */
const mayShift = ['blockstore/hot/block-map.ts', 'blockstore/hot/journal.ts', 'blockstore/hot/shared-state.ts'];

const noShifts = [
  {
    selector: 'BinaryExpression[operator=/^(<<|>>|>>>)$/]',
    message: 'Shifts wrap at 2^32, which is a 4 GiB disk: divide and multiply, through blockstore/units.',
  },
  {
    selector: 'AssignmentExpression[operator=/^(<<=|>>=|>>>=)$/]',
    message: 'Shifts wrap at 2^32, which is a 4 GiB disk: divide and multiply, through blockstore/units.',
  },
  {
    selector: "BinaryExpression[operator='|'][right.value=0]",
    message: '`| 0` wraps at 2^31: use Math.floor or Math.trunc.',
  },
];

const hotLaw = [
  { selector: ':function[async=true]', message: 'The hot path is synchronous: no async functions.' },
  { selector: 'AwaitExpression', message: 'The hot path is synchronous: no await.' },
  { selector: 'ForOfStatement[await=true]', message: 'The hot path is synchronous: no for await.' },
  { selector: 'Literal[bigint]', message: 'No BigInt on the hot path: keep 64-bit ids as two 32-bit words or as bytes.' },
  { selector: "CallExpression[callee.name='BigInt']", message: 'No BigInt on the hot path.' },
  { selector: 'CallExpression[callee.property.name=/BigU?[iI]nt64$/]', message: 'No BigInt on the hot path: read two 32-bit words.' },
  { selector: "MemberExpression[object.name='JSON']", message: 'No JSON on the hot path.' },
];

const noFocusedTests = [
  {
    selector: "CallExpression[callee.object.name=/^(it|test|describe|suite|bench)$/][callee.property.name=/^(only|skip|todo|fails)$/]",
    message: 'Every test runs. A missing tool is dealt with by test/support/tools.ts.',
  },
  { selector: 'CallExpression[callee.name=/^(xit|xtest|xdescribe|fit|fdescribe)$/]', message: 'Every test runs.' },
];

/** ESLint's own rules that the compiler does not already keep. */
const coreRules = {
  'array-callback-return': 'error',
  curly: ['error', 'multi-line'],
  eqeqeq: ['error', 'always'],
  'for-direction': 'error',
  'no-async-promise-executor': 'error',
  'no-case-declarations': 'error',
  'no-compare-neg-zero': 'error',
  'no-cond-assign': ['error', 'except-parens'],
  'no-constant-condition': ['error', { checkLoops: 'allExceptWhileTrue' }],
  'no-control-regex': 'error',
  'no-debugger': 'error',
  'no-duplicate-case': 'error',
  'no-else-return': 'error',
  // An empty catch forgets an error; a comment inside it (why it may be forgotten) makes it non-empty for this rule.
  'no-empty': 'error',
  'no-empty-pattern': 'error',
  'no-eval': 'error',
  'no-fallthrough': 'error',
  'no-irregular-whitespace': 'error',
  'no-loss-of-precision': 'error',
  'no-regex-spaces': 'error',
  'no-self-assign': 'error',
  'no-self-compare': 'error',
  'no-sparse-arrays': 'error',
  'no-template-curly-in-string': 'error',
  'no-unneeded-ternary': 'error',
  'no-unsafe-finally': 'error',
  'no-unused-labels': 'error',
  'no-useless-escape': 'error',
  'no-useless-rename': 'error',
  'no-useless-return': 'error',
  'no-var': 'error',
  'object-shorthand': 'error',
  'prefer-const': 'error',
  'require-yield': 'error',
  'use-isnan': 'error',
  'valid-typeof': 'error',
};

const typedRules = {
  '@typescript-eslint/consistent-type-imports': 'error',
  '@typescript-eslint/prefer-readonly': 'error',
  '@typescript-eslint/switch-exhaustiveness-check': ['error', { considerDefaultExhaustiveForUnions: true }],
  // A promise that nobody waits for hides its error. `void` says that this one cannot fail; tests may not even say that (below).
  '@typescript-eslint/no-floating-promises': ['error', { checkThenables: true }],
  // Numbers in messages read well; anything else in a template is still an error.
  '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
  // `() => list.push(x)` as a callback is clear; a void value that is used is still an error.
  '@typescript-eslint/no-confusing-void-expression': ['error', { ignoreArrowShorthand: true }],
  // `while (true)` is how a worker's loop says that it ends only with its process.
  '@typescript-eslint/no-unnecessary-condition': ['error', { allowConstantLoopConditions: 'only-allowed-literals' }],
  // Off: with noUncheckedIndexedAccess, `list[i]!` under a loop's bound is how the code says that the index was checked. The other
  // ways are worse: `as T` says less and hides more, `?? 0` turns a wrong index into a wrong offset.
  '@typescript-eslint/no-non-null-assertion': 'off',
  // Off: an async function without await is how an interface's promise is kept by synchronous work: a throw becomes a rejection.
  '@typescript-eslint/require-await': 'off',
  // A leading underscore says that a parameter is there for its position only; the compiler reads it the same way.
  '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_', destructuredArrayIgnorePattern: '^_', caughtErrors: 'all' }],
};

export default defineConfig(
  { ignores: ['dist/**', '.cache/**', 'node_modules/**', 'coverage/**'] },
  { linterOptions: { reportUnusedDisableDirectives: 'error', reportUnusedInlineConfigs: 'error' } },
  {
    files: ['**/*.js', '**/*.cjs', '**/*.mjs'],
    extends: [tseslint.configs.base],
    rules: coreRules,
  },
  {
    files: typescript,
    extends: [tseslint.configs.strictTypeChecked, tseslint.configs.stylisticTypeChecked],
    languageOptions: { parserOptions: { project: ['./tsconfig.test.json'], tsconfigRootDir: process.cwd() } },
    rules: { ...coreRules, ...typedRules },
  },
  {
    name: 'shipped code',
    files: [...shipped, 'scripts/**/*.ts'],
    rules: { 'max-lines': ['error', { max: 400, skipBlankLines: true, skipComments: true }] },
  },
  {
    name: 'no console but in the command line',
    files: ['blockstore/**/*.ts', 'daemon/**/*.ts'],
    rules: { 'no-console': 'error' },
  },
  {
    name: 'tests',
    files: tests,
    rules: {
      '@typescript-eslint/no-floating-promises': ['error', { checkThenables: true, ignoreVoid: false }],
      'no-restricted-syntax': ['error', ...noFocusedTests],
    },
  },
  {
    name: 'hot path',
    files: hotPath,
    rules: {
      'no-restricted-syntax': ['error', ...hotLaw, ...noShifts],
      'no-restricted-imports': ['error', {
        paths: [
          { name: 'pino', message: 'Workers have no logger: post a message to the main thread.' },
          { name: 'better-sqlite3', message: 'SQLite belongs to the main thread.' },
        ],
        patterns: [{ group: ['**/meta/**'], message: 'blockstore/meta is SQLite and belongs to the main thread.' }],
      }],
      // Off: an indexed loop over a typed array makes no iterator.
      '@typescript-eslint/prefer-for-of': 'off',
    },
  },
  {
    name: 'hot path: page numbers, and counters that wrap at 2^32 by design',
    files: mayShift,
    rules: { 'no-restricted-syntax': ['error', ...hotLaw] },
  },
);
