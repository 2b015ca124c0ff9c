/**
 * The torture run: many clones at work, verified all the time, while the daemon is killed, stopped, upgraded, starved of space
 * and left without its holder; at the end everything is compared with what it must hold.
 *
 * The choice of what is done comes from the seed alone; what the machine makes of it does not. Does not import vitest:
 * `scripts/torture` runs it for as long as it is told, the tests for two minutes.
 */
import { cpSync, existsSync, mkdirSync, mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { transportAbilities } from '../../../daemon/transport/abilities.js';
import { startTestDaemon, type TestDaemon } from '../daemon.js';
import { importFile, patternRange } from '../../mount/conformance-context.js';
import { makePatternImage, sha256Of } from '../images.js';
import { ModelRun } from '../model/model-run.js';
import { createRandom, type Random } from '../model/random.js';
import { createCleanup, makeTempDir, type Cleanup } from '../temp.js';
import { Disasters } from './disasters.js';
import { Lanes } from './lanes.js';
import { createPatientControl } from './patient-control.js';
import { makeTortureStore, type StoreFileSystemName } from './torture-store.js';

export interface TortureOptions {
  readonly seed: number;
  readonly milliseconds: number;
  readonly storeFileSystem: StoreFileSystemName;
  readonly cliEntry: string;
  /** Called about once a second. */
  readonly onProgress?: (line: string) => void;
}

export interface TortureResult {
  readonly counts: ReadonlyMap<string, number>;
  /** Null: passed. */
  readonly failure: Error | null;
  /** What is left of a run that failed. */
  readonly artefactsDir: string | null;
  /** The last steps, and what the daemon said last that was not usual: for those who see the output of a run and not its files. */
  readonly said: string;
}

interface Source {
  readonly name: string;
  readonly sizeBytes: number;
  readonly seed: number;
  readonly inPlace: boolean;
  readonly isHole: (block: number) => boolean;
}

const MIB = 1024 * 1024;
const LEVEL_WARN = 40;
const LINES_SAID = 25;
const LINE_LENGTH_MAX = 1000;
const LANES = 3;
const SOURCES: readonly Source[] = [
  { name: 'even', sizeBytes: 3 * MIB, seed: 21, inPlace: true, isHole: (block) => block >= 200 && block < 330 },
  { name: 'odd', sizeBytes: 2 * MIB + 3 * 512, seed: 22, inPlace: false, isHole: (block) => block % 7 === 3 },
  { name: 'large', sizeBytes: 24 * MIB, seed: 23, inPlace: true, isHole: (block) => block % 1024 >= 900 },
];
const [EVEN, ODD, LARGE] = SOURCES as readonly [Source, Source, Source];
/** The holder leaves a server down that dies five times within a minute. */
const BETWEEN_KILLS_MS = 16_000;
const BETWEEN_DISASTERS_MS = 1500;
const KEPT_DISKS = 3;
/** What the log rightly says of what is done here. */
const EXPECTED_IN_LOG = [/killed|restart|journal|recover|server (?:ended|died|was)|no server|upgrade/iu, /the store (?:is full|has room)|file system is full|no-space|No space|ENOSPC|errno -?28\b|the store has \d+ left|has no room|--space-(?:warning|critical)/u, /SIGKILL|dead mount|was cleared/iu];

/** What the lanes do that is worth a figure each. */
const GATHERED = ['snapshot', 'revert', 'clone snapshot', 'clone container', 'range clone', 'copy range', 'cp', 'rebase', 'transfer of a disk', 'transfer of all'];

type Disaster = 'kill' | 'killEverything' | 'restart' | 'fillStore' | 'upgrade' | 'check';

export async function torture(options: TortureOptions): Promise<TortureResult> {
  const cleanup = createCleanup();
  const counts = new Map<string, number>();
  let run: Run | null = null;
  let failure: Error | null = null;
  let artefactsDir: string | null = null;
  let said = '';
  try {
    run = await Run.begin(options, counts, cleanup);
    await run.go();
    await run.finish();
  } catch (thrown) {
    failure = thrown instanceof Error ? thrown : new Error(String(thrown));
    artefactsDir = keepArtefacts(options, run, failure);
    const unusual = run?.daemon.log().filter(({ level }) => level >= LEVEL_WARN).slice(-LINES_SAID).map(({ text }) => text.slice(0, LINE_LENGTH_MAX)) ?? [];
    said = [run?.recent() ?? '', ...unusual].join('\n');
  } finally {
    await run?.stopAgents();
    try {
      await cleanup.run();
    } catch (thrown) {
      failure ??= thrown instanceof Error ? thrown : new Error(String(thrown));
    }
  }
  return { counts, failure, artefactsDir, said };
}

class Run {
  readonly daemon: TestDaemon;
  readonly #options: TortureOptions;
  readonly #random: Random;
  readonly #counts: Map<string, number>;
  readonly #models: readonly ModelRun[];
  readonly #lanes: Lanes;
  readonly #disasters: Disasters;
  readonly #sums: ReadonlyMap<string, string>;
  readonly #choices: readonly Disaster[];
  readonly #canCheck: boolean;

  private constructor(parts: {
    readonly options: TortureOptions; readonly random: Random; readonly counts: Map<string, number>; readonly daemon: TestDaemon; readonly models: readonly ModelRun[];
    readonly lanes: Lanes; readonly disasters: Disasters; readonly sums: ReadonlyMap<string, string>; readonly choices: readonly Disaster[];
  }) {
    this.#options = parts.options;
    this.#random = parts.random;
    this.#counts = parts.counts;
    this.daemon = parts.daemon;
    this.#models = parts.models;
    this.#lanes = parts.lanes;
    this.#disasters = parts.disasters;
    this.#sums = parts.sums;
    this.#choices = parts.choices;
    this.#canCheck = parts.choices.includes('check');
  }

  static async begin(options: TortureOptions, counts: Map<string, number>, cleanup: Cleanup): Promise<Run> {
    const random = createRandom(options.seed);
    const directory = makeTempDir('torture', cleanup);
    const store = await makeTortureStore(options.storeFileSystem, directory, cleanup);
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: store.storeDir, cliEntry: options.cliEntry });
    const control = createPatientControl(daemon.socketPath, () => { counts.set('answers lost', (counts.get('answers lost') ?? 0) + 1); });
    const sums = new Map<string, string>();
    for (const source of SOURCES) {
      const file = join(directory, `${source.name}.img`);
      makePatternImage(file, source);
      sums.set(file, await sha256Of(file));
    }
    const take = async (source: Source, target: string): Promise<void> => { await importFile(control, join(directory, `${source.name}.img`), target, source.inPlace); };
    const models: ModelRun[] = [];
    for (let lane = 0; lane < LANES; lane += 1) {
      const container = `lane-${lane}`;
      await control.createContainer(container, {});
      // The lanes do their own kills by nobody: disasters come from outside.
      const model = new ModelRun({
        daemon: { mountDir: daemon.mountDir, control, cliEntry: options.cliEntry, socketPath: daemon.socketPath, killServer: noDisaster, waitUntilServing: noDisaster, stop: noDisaster, start: noDisaster },
        abilities: transportAbilities.kernel, random: createRandom(random.below(2 ** 32)), container, disasters: false,
      });
      for (const source of [EVEN, ODD]) {
        await take(source, `${container}/${source.name}`);
        model.adopt(`${container}/${source.name}`, contentOf(source));
      }
      models.push(model);
    }
    await control.createContainer('disasters', {});
    await take(LARGE, 'disasters/large');
    await take(EVEN, 'disasters/even');
    const lanes = new Lanes(models, {
      control, source: 'disasters/large', sourceBytes: LARGE.sizeBytes, container: 'disasters', pathOf: (path) => daemon.path(path), random: createRandom(random.below(2 ** 32)),
    });
    const disasters = new Disasters({
      daemon, control, store, random: createRandom(random.below(2 ** 32)), container: 'disasters', source: 'disasters/large', sourceContent: contentOf(LARGE),
    });
    const choices: Disaster[] = ['kill', 'kill', 'killEverything', 'restart'];
    if (store.canBeFull) choices.push('fillStore');
    if (await disasters.has('daemon', 'upgrade')) choices.push('upgrade');
    if (await disasters.has('check')) choices.push('check');
    return new Run({ options, random, counts, daemon, models, lanes, disasters, sums, choices });
  }

  async go(): Promise<void> {
    for (const model of this.#models) await model.begin();
    for (const model of this.#models) await model.compareAll();
    this.#lanes.start();
    const began = Date.now();
    const deadline = began + this.#options.milliseconds;
    let killedAt = 0;
    /** Each kind once before any comes twice, in an order of its own each time. */
    let bag: Disaster[] = [];
    while (Date.now() < deadline) {
      for (let waited = 0; waited < BETWEEN_DISASTERS_MS; waited += 500) {
        await sleep(500);
        this.#lanes.assertWell();
        this.#options.onProgress?.(`${Math.round((Date.now() - began) / 1000)} s: ${summaryOf(this.#gather())}`);
      }
      if (bag.length === 0) bag = [...this.#choices];
      const [next] = bag.splice(this.#random.below(bag.length), 1) as [Disaster];
      if (next === 'kill') {
        if (Date.now() - killedAt < BETWEEN_KILLS_MS) continue;
        killedAt = Date.now();
      }
      await this.#strike(next);
      this.#count(next);
    }
    await this.#lanes.end();
  }

  async finish(): Promise<void> {
    const { daemon } = this;
    for (const model of this.#models) await model.compareAll();
    for (const model of this.#models) await model.fillAll();
    for (const model of this.#models) await model.compareAll();
    await this.#disasters.compareKept(Number.MAX_SAFE_INTEGER);
    await this.stopAgents();
    await daemon.stop();
    if (this.#canCheck) await this.#disasters.check('--store', daemon.storeDir);
    await daemon.start();
    for (const model of this.#models) {
      await model.begin();
      await model.compareAll();
    }
    await this.#disasters.compareKept(Number.MAX_SAFE_INTEGER);
    await this.stopAgents();
    for (const [file, sum] of this.#sums) {
      if (await sha256Of(file) !== sum) throw new Error(`${basename(file)}, which was imported, has changed`);
    }
    daemon.assertQuietLog(EXPECTED_IN_LOG);
    await daemon.stop();
    this.#gather();
  }

  async stopAgents(): Promise<void> {
    for (const model of this.#models) await model.end();
  }

  recent(): string {
    return this.#models.map((model, lane) => `lane ${lane}:\n${model.recent()}`).join('\n\n');
  }

  async #strike(disaster: Disaster): Promise<void> {
    switch (disaster) {
      case 'kill': await this.#disasters.killServer(); return;
      case 'upgrade': await this.#disasters.upgrade(); return;
      case 'check': await this.#disasters.check(); return;
      case 'fillStore': await this.#lanes.whileParked(() => this.#disasters.fillStore()); return;
      case 'killEverything': await this.#withoutOpenFiles(() => this.#disasters.killEverything()); return;
      case 'restart': await this.#withoutOpenFiles(() => this.#disasters.restart()); 
    }
  }

  /** For what ends the mount: the lanes close everything, and compare everything afterwards. */
  async #withoutOpenFiles(body: () => Promise<void>): Promise<void> {
    await this.#lanes.whileParked(async () => {
      for (const model of this.#models) await model.end();
      await body();
      for (const model of this.#models) {
        await model.begin();
        await model.compareAll();
      }
      await this.#disasters.compareKept(KEPT_DISKS);
    });
  }

  #count(what: string): void {
    this.#counts.set(what, (this.#counts.get(what) ?? 0) + 1);
  }

  #gather(): ReadonlyMap<string, number> {
    this.#counts.set('steps', this.#models.reduce((sum, model) => sum + model.steps, 0));
    this.#counts.set('clones', this.#models.reduce((sum, model) => sum + (model.counts.get('clone') ?? 0) + (model.counts.get('chase') ?? 0), 0));
    for (const what of GATHERED) this.#counts.set(what, this.#models.reduce((sum, model) => sum + (model.counts.get(what) ?? 0), 0));
    this.#counts.set('fio runs', this.#lanes.fioRuns);
    this.#counts.set('writes refused for space', this.#disasters.refusedForSpace);
    this.#counts.set('writes unanswered', this.#disasters.unansweredWrites);
    return this.#counts;
  }
}

export function summaryOf(counts: ReadonlyMap<string, number>): string {
  return [...counts].map(([what, count]) => `${what} ${count}`).join(', ');
}

function contentOf(source: Source): Buffer {
  return patternRange(source.seed, 0, source.sizeBytes, source.isHole);
}

async function noDisaster(): Promise<void> {
  throw new Error('a lane does not kill or restart the daemon');
}

/** The log, the database and what was done last, in a directory that stays. */
function keepArtefacts(options: TortureOptions, run: Run | null, failure: Error): string {
  const base = process.env['OFFSHOOT_ARTEFACTS'] ?? tmpdir();
  mkdirSync(base, { recursive: true });
  const directory = mkdtempSync(join(base, `offshoot-torture-failed-${options.seed}-`));
  writeFileSync(join(directory, 'report.txt'), `--seed ${options.seed}\n${failure.stack ?? failure.message}\n\n${run?.recent() ?? ''}\n`);
  for (const name of ['offshoot.log', 'offshoot.db', 'offshoot.db-wal']) {
    const file = join(run?.daemon.storeDir ?? '', name);
    if (run !== null && existsSync(file)) cpSync(file, join(directory, name));
  }
  return directory;
}
