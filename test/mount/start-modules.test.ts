/**
 * What is loaded before somebody gets an answer: the start of a daemon and every command wait for modules more than for anything else, so
 * libraries that the answer does not need come after it, or not at all. Modules are listed; no time is measured.
 */
import { resolve } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';

import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { recordModules, type ModuleRecorder, type RecordedProcess } from '../support/module-recorder.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const TOP = resolve(import.meta.dirname, '../..');
const WAIT_MS = 60_000;

let cleanup = createCleanup();
afterEach(async () => {
  await cleanup.run();
  cleanup = createCleanup();
});

async function recorded(): Promise<{ readonly daemon: TestDaemon; readonly recorder: ModuleRecorder }> {
  const recorder = recordModules(makeTempDir('modules', cleanup), TOP);
  return { daemon: await startTestDaemon({ transport: 'kernel', cleanup, environment: recorder.environment }), recorder };
}

/** Names of npm packages, from paths of modules. */
function packagesOf(paths: readonly string[]): string[] {
  return [...new Set(paths.flatMap((path) => /node_modules\/((?:@[^/]+\/)?[^/]+)\/(?!.*node_modules)/u.exec(path)?.[1] ?? []))].sort();
}

function processOf(recorder: ModuleRecorder, entry: string): RecordedProcess {
  const found = recorder.processes().find((each) => each.entry === entry);
  if (found === undefined) throw new Error(`no process of ${entry} among ${recorder.processes().map((each) => each.entry).join(', ')}`);
  return found;
}

const pathsOf = (process: RecordedProcess, without: string | null = null): string[] =>
  process.modules.filter(({ after }) => without === null || !after.includes(without)).map(({ path }) => path);

/** What guests do not wait for, and a command that comes at once waits for less than for its own start. */
const LATE = ['@fastify/ajv-compiler', '@fastify/swagger', '@sinclair/typebox', 'ajv', 'fast-json-stringify', 'fastify', 'prom-client', 'yaml'];

describe('the start of a daemon', () => {
  it('loads what its first answer needs before it, and the rest after it', async () => {
    const { recorder } = await recorded();
    const server = processOf(recorder, 'dist/daemon/server/main.js');

    expect(packagesOf(pathsOf(server, 'serving'))).toEqual(expect.arrayContaining(['better-sqlite3', 'koffi', 'pino']));
    const beforeReady = packagesOf(pathsOf(server, 'ready'));
    for (const late of LATE) expect(beforeReady).not.toContain(late);

    const paths = (): string[] => pathsOf(processOf(recorder, 'dist/daemon/server/main.js'));
    // The last one only when somebody asks for the OpenAPI document.
    expect(await waitUntil(() => LATE.every((late) => late === 'yaml' || packagesOf(paths()).includes(late)), WAIT_MS)).toBe(true);
  }, 2 * WAIT_MS);

  it('needs no library in its holder but the one for system calls', async () => {
    const { recorder } = await recorded();
    expect(packagesOf(pathsOf(processOf(recorder, 'dist/daemon/holder/main.js'))).filter((name) => !name.startsWith('@koromix/'))).toEqual(['koffi']);
  }, WAIT_MS);
});

describe('a spare server', () => {
  it('has loaded everything when it takes over', async () => {
    const { daemon, recorder } = await recorded();
    const first = (await daemon.status()).serverPid;
    expect(await waitUntil(async () => (await daemon.status()).sparePid !== null, WAIT_MS)).toBe(true);
    const spare = (await daemon.status()).sparePid;
    const isWarm = (): boolean => recorder.processes().some(({ pid, modules }) => pid === spare && modules.some(({ path }) => path.endsWith('daemon/control/openapi.js')));
    expect(await waitUntil(isWarm, WAIT_MS)).toBe(true);

    await daemon.killServer();
    expect(await daemon.waitForServer(first, WAIT_MS)).toBe(spare);
    const late = recorder.processes().find(({ pid }) => pid === spare)?.modules.filter(({ after }) => after.includes('serving')).map(({ path }) => path);
    // A logger that logs nothing, 12 lines, which fastify asks for when it is set up.
    expect(late?.filter((path) => !path.includes('/abstract-logging/'))).toEqual([]);
  }, 3 * WAIT_MS);
});

describe('a command', () => {
  it('loads itself and no other command', async () => {
    const { daemon, recorder } = await recorded();
    const loaded = async (args: readonly string[]): Promise<{ readonly commands: string[]; readonly packages: string[] }> => {
      const before = new Set(recorder.processes().map(({ pid }) => pid));
      expect((await daemon.cli(args)).code).toBe(0);
      const paths = recorder.processes().filter(({ pid, entry }) => !before.has(pid) && entry === 'dist/cli/main.js').flatMap((each) => pathsOf(each));
      return { commands: paths.filter((path) => path.startsWith('dist/cli/commands/')).map((path) => path.slice('dist/cli/commands/'.length)), packages: packagesOf(paths) };
    };
    expect(await loaded(['ls'])).toEqual({ commands: ['list.js'], packages: ['commander'] });
    expect(await loaded(['--json', 'container', 'ls'])).toEqual({ commands: ['container.js'], packages: ['commander'] });
    expect((await loaded(['daemon', 'status'])).packages).toEqual(['commander']);
    const everything = await loaded(['--help']);
    expect(everything.commands.length).toBeGreaterThan(20);
    expect(everything.packages).toEqual(['commander']);
  }, 2 * WAIT_MS);
});
