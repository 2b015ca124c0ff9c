/**
 * Layering, checked: who may import whom. Run from the root of the checkout:
 * `depcruise --config scripts/lint/dependency-cruiser.cjs blockstore daemon cli`
 *
 * Type-only imports count too: a layer that names another one's types knows of it.
 */

/** What is started rather than imported: programs and worker threads. */
const ENTRY_POINTS = '(^|/)main\\.ts$|-(worker|thread)\\.ts$';
const SOURCES = '^(blockstore|daemon|cli)/';
const SQLITE = '(^|/)node_modules/better-sqlite3/';

/** @type {import('dependency-cruiser').IConfiguration} */
module.exports = {
  forbidden: [
    {
      name: 'blockstore-knows-only-itself',
      comment: 'The block store is a library: no FUSE, no HTTP, no command line.',
      severity: 'error',
      from: { path: '^blockstore/' },
      to: { path: '^(daemon|cli)/' },
    },
    {
      name: 'hot-is-worker-safe',
      comment: 'The data path runs in worker threads: Node, koffi, units, errors and itself, nothing more.',
      severity: 'error',
      from: { path: '^blockstore/hot/' },
      to: {
        pathNot: ['^blockstore/hot/', '^blockstore/(units|errors)\\.ts$', '(^|/)node_modules/koffi/'],
        dependencyTypesNot: ['core'],
      },
    },
    {
      name: 'only-meta-knows-sqlite',
      comment: 'One writer connection in one thread: everything else goes through MetaStore.',
      severity: 'error',
      from: { path: SOURCES, pathNot: '^blockstore/meta/' },
      to: { path: SQLITE },
    },
    {
      name: 'workers-reach-no-sqlite-logger-or-server',
      comment: 'Protocol code and every worker thread stay clear of SQLite, pino and fastify, through whatever they import.',
      severity: 'error',
      from: { path: ['^daemon/transport/kernel/(protocol|io-worker)\\.ts$', '^(blockstore|daemon)/.*-(worker|thread)\\.ts$'] },
      to: { path: [SQLITE, '(^|/)node_modules/(pino|fastify|@fastify)/'], reachable: true },
    },
    {
      name: 'filesystem-knows-no-transport',
      comment: 'Names, attributes and promises; transports translate to it, never the other way round.',
      severity: 'error',
      from: { path: '^daemon/filesystem/' },
      to: { path: '^daemon/transport/' },
    },
    {
      name: 'transports-know-no-other',
      comment: 'Two transports behind one seam: what they share lies beside them.',
      severity: 'error',
      from: { path: '^daemon/transport/([^/]+)/.+' },
      to: { path: '^daemon/transport/[^/]+/', pathNot: '^daemon/transport/$1/' },
    },
    {
      name: 'cli-knows-only-control',
      comment: 'The command line is a client: the control API, the words for errors and units, and the format of streams.',
      severity: 'error',
      from: { path: '^cli/' },
      to: { path: '^(blockstore|daemon)/', pathNot: ['^daemon/control/', '^blockstore/(units|errors|stream-format)\\.ts$'] },
    },
    {
      name: 'cli-reaches-no-server',
      comment: 'A command starts quickly and needs no native module: no SQLite, no HTTP server, no FFI behind what it imports.',
      severity: 'error',
      from: { path: '^cli/' },
      to: { path: [SQLITE, '(^|/)node_modules/(fastify|@fastify|koffi|@koromix|fuse-native)/'], reachable: true },
    },
    {
      name: 'nothing-imports-test-or-scripts',
      severity: 'error',
      from: { path: SOURCES },
      to: { path: '^(test|scripts)/' },
    },
    {
      name: 'no-cycles',
      comment: 'Neither of two modules in a cycle can be understood or tested alone.',
      severity: 'error',
      from: {},
      to: { circular: true },
    },
    {
      name: 'no-orphans',
      comment: 'A module that nothing imports and that imports nothing is left over.',
      severity: 'error',
      from: { orphan: true, path: SOURCES, pathNot: ENTRY_POINTS },
      to: {},
    },
    {
      name: 'no-dead-modules',
      comment: 'Every module is reached from a program or a worker thread; one that only tests import is dead.',
      severity: 'error',
      from: { path: ENTRY_POINTS },
      to: { path: SOURCES, pathNot: ENTRY_POINTS, reachable: false },
    },
    {
      name: 'no-unresolvable',
      severity: 'error',
      from: {},
      to: { couldNotResolve: true },
    },
    {
      name: 'only-declared-dependencies',
      comment: 'What ships depends on what package.json gives to those who install it.',
      severity: 'error',
      from: { path: SOURCES },
      to: { dependencyTypes: ['npm-dev', 'npm-no-pkg', 'npm-unknown'], dependencyTypesNot: ['type-only'] },
    },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    tsPreCompilationDeps: true,
    tsConfig: { fileName: 'tsconfig.json' },
    enhancedResolveOptions: {
      exportsFields: ['exports'],
      conditionNames: ['import', 'require', 'node', 'default', 'types'],
      mainFields: ['module', 'main', 'types', 'typings'],
      extensions: ['.ts', '.js', '.cjs', '.mjs', '.json'],
    },
  },
};
