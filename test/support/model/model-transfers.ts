/**
 * Send and receive in a model run: a disk or the whole container leaves the store as two streams, the second of them what changed
 * since the first, and comes back under another name.
 *
 * A store that has a snapshot refuses to receive it again, so the two that were sent are removed in between. The command line
 * does both, as it would in a pipe; the streams lie in files meanwhile. It waits for a server that is killed.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { command, type CommandResult } from './command.js';
import { resize } from './model-life.js';
import type { ModelSnapshots, Remembered } from './model-snapshots.js';
import { disturb, pause, retryBusy, type ModelParts, type Operation } from './model-parts.js';

const TIMEOUT_MS = 120_000;
/** A store that is checked, started or emptied while others work may be away for some time. */
const PATIENCE_MS = 60_000;
const RETRY_MS = 300;
/** What a command says whose server was away for longer than it waits. Sending changes nothing, so it is done again. */
const AWAY = /no daemon answers|connection to the daemon broke|about to end/u;

export class ModelTransfers {
  readonly operations: readonly Operation[];
  readonly #parts: ModelParts;
  readonly #snapshots: ModelSnapshots;

  constructor(parts: ModelParts, snapshots: ModelSnapshots) {
    this.#parts = parts;
    this.#snapshots = snapshots;
    this.operations = [
      { name: 'transfer of a disk', weight: 2, run: () => this.#withDirectory((directory) => this.#disk(directory)) },
      { name: 'transfer of all', weight: 1, run: () => this.#withDirectory((directory) => this.#all(directory)) },
    ];
  }

  async #disk(directory: string): Promise<string> {
    const { random, container, disks, hands, freshName, makeRoom } = this.#parts;
    await makeRoom();
    const path = random.pick(disks.paths);
    const disk = path.slice(container.length + 1);
    const [first, second] = await this.#sendTwo(directory, disk, [path]);
    const name = freshName('received');
    const target = `${container}/${name}`;
    for (const [index, sent] of [first, second].entries()) {
      await this.#receive(join(directory, String(index)), target);
      const held = sent.contents.get(disk)!;
      disks.put(target, held);
      this.#snapshots.adopt({ name: sent.name, reference: `${target}@${sent.name}`, only: name, contents: new Map([[name, held]]) });
      await this.#snapshots.compareTree(`${container}/.snapshots/${sent.name}`, new Map([[name, held]]));
      if (index === 0 && random.chance(0.5)) await hands.compareWhole(target);
    }
    await hands.compareWhole(target);
    return `${path} as ${target}`;
  }

  async #all(directory: string): Promise<string> {
    const { random, container, disks, freshName, daemon } = this.#parts;
    const changed = disks.paths.filter(() => random.chance(0.4));
    const [first, second] = await this.#sendTwo(directory, null, changed);
    const target = freshName(`${container}-received`);
    for (const [index, sent] of [first, second].entries()) {
      await this.#receive(join(directory, String(index)), target);
      await this.#snapshots.compareTree(`${target}/.snapshots/${sent.name}`, sent.contents);
    }
    await this.#snapshots.compareTree(target, second.contents, ['.snapshots']);
    for (const { name } of [first, second]) await retryBusy(() => daemon.control.removeSnapshot(`${target}@${name}`, { keepData: true }));
    await retryBusy(() => daemon.control.remove(target, { keepData: true, recursive: true }));
    return `${container} as ${target}, with changes of ${changed.join(' ')}`;
  }

  /** Two snapshots, between which disks change, sent to the files `0` and `1`, the second as what changed; then both are removed. */
  async #sendTwo(directory: string, only: string | null, changed: readonly string[]): Promise<readonly [Remembered, Remembered]> {
    const { container, random } = this.#parts;
    const reference = only === null ? container : `${container}/${only}`;
    const first = await this.#snapshots.take(only, 'sent');
    for (const path of changed) {
      if (random.chance(0.3)) await resize(this.#parts, path);
      await disturb(this.#parts, path, random.between(1, 4), 0.5);
    }
    const second = await this.#snapshots.take(only, 'sent');
    // What comes later is no part of either.
    for (const path of changed) await disturb(this.#parts, path, 1);
    await this.#send([`${reference}@${first.name}`], join(directory, '0'));
    await this.#send([`${reference}@${second.name}`, '--from', `@${first.name}`], join(directory, '1'));
    await this.#snapshots.remove(first);
    await this.#snapshots.remove(second);
    return [first, second];
  }

  async #send(args: readonly string[], file: string): Promise<void> {
    const deadline = Date.now() + PATIENCE_MS;
    for (;;) {
      const result = await this.#offshoot(`> ${file}`, ['send', ...args]);
      if (result.code === 0) return;
      if (Date.now() > deadline || !AWAY.test(result.stderr)) throw failed(`send ${args.join(' ')}`, result);
      await pause(RETRY_MS);
    }
  }

  async #receive(file: string, target: string): Promise<void> {
    const result = await this.#offshoot(`< ${file}`, ['receive', target]);
    if (result.code !== 0) throw failed(`receive ${target}`, result);
  }

  async #offshoot(redirection: string, args: readonly string[]): Promise<CommandResult> {
    const { cliEntry, socketPath } = this.#parts.daemon;
    return await command('sh', ['-c', `exec "$0" "$@" ${redirection}`, process.execPath, cliEntry, ...args, '--socket', socketPath], { timeoutMs: TIMEOUT_MS });
  }

  async #withDirectory(body: (directory: string) => Promise<string>): Promise<string> {
    const directory = mkdtempSync(join(tmpdir(), 'offshoot-model-streams-'));
    try {
      return await body(directory);
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  }
}

function failed(what: string, { code, timedOut, stdout, stderr }: CommandResult): Error {
  return new Error(`offshoot ${what}: ${timedOut ? 'timed out' : `exit code ${code}`}\n${stdout}${stderr}`);
}
