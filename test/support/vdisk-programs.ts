/** What a test says and sees of the programs that a daemon runs for container files (see vdisk-programs-program.ts), and of what they leave on this host. */
import { randomUUID } from 'node:crypto';
import { existsSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { command } from './model/command.js';
import type { TestDaemon } from './daemon.js';
import { processesNaming, signalProcess, waitUntilGone } from './processes.js';
import type { Cleanup } from './temp.js';

export interface ProgramOrder {
  /** Another one for each order: each is counted from its own beginning. */
  readonly id: string;
  /** Counted from the order on, from 1. */
  readonly at: number;
  readonly what: 'kill' | 'fail';
}

/** A loop device that there was when a program began. */
export interface NotedDevice {
  readonly program: string;
  readonly file: string;
  readonly directIo: boolean;
}

export class ProgramSeat {
  readonly directory: string;

  constructor(directory: string) { this.directory = directory; }

  order(order: Omit<ProgramOrder, 'id'>): void {
    this.forget();
    writeFileSync(join(this.directory, 'order'), JSON.stringify({ ...order, id: randomUUID() }));
  }

  forget(): void {
    rmSync(join(this.directory, 'order'), { force: true });
    for (const each of ['programs', 'devices']) rmSync(join(this.directory, each), { force: true });
  }

  wasObeyed(): boolean { return !existsSync(join(this.directory, 'order')); }

  run(): string[] { return this.#lines('programs'); }

  /** Of one file, when each of the programs began. */
  devicesShowing(file: string): NotedDevice[] {
    return this.#lines('devices').map((line) => JSON.parse(line) as NotedDevice).filter((each) => each.file === file);
  }

  #lines(name: string): string[] {
    const file = join(this.directory, name);
    return existsSync(file) ? readFileSync(file, 'utf8').split('\n').filter((line) => line !== '') : [];
  }
}

/** `/dev/loop7: /mnt/…` of files below the mount. */
export async function loopDevicesOf(daemon: Pick<TestDaemon, 'mountDir'>): Promise<string[]> {
  return (await devicesOf(daemon)).map(({ name, file }) => `${name}: ${file}`);
}

/** Mount points below a directory. */
export function mountsBelow(directory: string): string[] {
  return readFileSync('/proc/self/mountinfo', 'utf8').split('\n').flatMap((line) => {
    const mountPoint = line.split(' ')[4] ?? '';
    return mountPoint.startsWith(`${directory}/`) ? [mountPoint] : [];
  });
}

/** Machines whose files are below a directory, whoever started them. */
function machinesBelow(directory: string): number[] {
  return processesNaming(`${directory}/`).filter((pid) => readFileOr(`/proc/${pid}/cmdline`).split('\0')[0]?.includes('qemu-system') === true);
}

function readFileOr(file: string): string {
  try {
    return readFileSync(file, 'latin1');
  } catch {
    // It has just ended.
    return '';
  }
}

/** To be added behind the daemon's own: runs before it, for a daemon does not go while its files are attached. */
export function cleanVdisks(cleanup: Cleanup, daemon: Pick<TestDaemon, 'mountDir'>, runtimeBase: string): void {
  cleanup.add(async () => {
    for (const pid of machinesBelow(runtimeBase)) {
      signalProcess(pid, 'SIGKILL');
      await waitUntilGone(pid, 30_000);
    }
    for (const mountPoint of mountsBelow(runtimeBase).toReversed()) await command('umount', [mountPoint], { timeoutMs: 30_000 }).catch(() => undefined);
    for (const mountPoint of mountsBelow(runtimeBase).toReversed()) await command('umount', ['--lazy', mountPoint], { timeoutMs: 30_000 }).catch(() => undefined);
    for (const { name } of await devicesOf(daemon)) await command('losetup', ['--detach', name], { timeoutMs: 30_000 }).catch(() => undefined);
  });
}

export function directoriesOf(runtimeBase: string): string[] {
  return readdirSync(runtimeBase).filter((name) => name.startsWith('offshoot-deployed-')).map((name) => join(runtimeBase, name));
}

async function devicesOf({ mountDir }: Pick<TestDaemon, 'mountDir'>): Promise<{ readonly name: string; readonly file: string }[]> {
  const { stdout } = await command('losetup', ['--list', '--json', '--output', 'NAME,BACK-FILE'], { timeoutMs: 30_000 });
  if (stdout.trim() === '') return [];
  const { loopdevices } = JSON.parse(stdout) as { readonly loopdevices: readonly { readonly name: string; readonly 'back-file': string | null }[] };
  return loopdevices.flatMap((each) => (each['back-file']?.startsWith(`${mountDir}/`) === true ? [{ name: each.name, file: each['back-file'].slice(mountDir.length + 1) }] : []));
}
