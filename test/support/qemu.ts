/**
 * A virtual machine for a test: booted from a raw disk, spoken to through its serial line and the guest agent, ended for certain.
 *
 * Runs under TCG, so that it needs nothing of the host's processor; a Debian guest is up some ten seconds after the start.
 */
import { spawn } from 'node:child_process';
import { chownSync, createWriteStream, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { connectGuestAgent, type GuestAgent } from './guest-agent.js';
import type { GuestImage } from './guest-image.js';
import { waitUntil } from './processes.js';
import { makeTempDir, type Cleanup } from './temp.js';

export interface GuestOptions {
  readonly image: Pick<GuestImage, 'kernel' | 'initrd'>;
  /** The raw disk to boot from: a file, or options of another driver of QEMU's. */
  readonly disk: string | Readonly<Record<string, string | number>>;
  readonly cleanup: Cleanup;
  readonly cache?: 'none' | 'directsync' | 'writeback';
  readonly memoryMib?: number;
  /** What a discard of the guest does to the disk. */
  readonly discard?: 'unmap' | 'ignore';
  /** `enospc`: the guest is paused when there is no room for what it writes. */
  readonly onWriteError?: 'report' | 'enospc';
  /** The user that QEMU runs as; the test's own by default. */
  readonly uid?: number;
}

export interface Guest {
  readonly pid: number;
  /** Of the machine protocol; see `qmp.ts`. */
  readonly qmpSocket: string;
  /** All that the guest has said on its serial line so far. */
  serial(): string;
  waitForSerial(text: string, timeoutMs: number): Promise<void>;
  agent(timeoutMs?: number): Promise<GuestAgent>;
  /** Orderly: the guest flushes and unmounts, QEMU ends by itself. */
  powerOff(agent: GuestAgent, timeoutMs?: number): Promise<void>;
  /** As when the power fails. */
  kill(): Promise<void>;
}

const AGENT_TIMEOUT_MS = 90_000;
const POWER_OFF_TIMEOUT_MS = 90_000;
const END_TIMEOUT_MS = 10_000;
const PROCESSORS = 2;

export function bootGuest(options: GuestOptions): Guest {
  const { image, disk, cleanup, cache = 'none', memoryMib = 512, discard = 'unmap', onWriteError = 'report', uid } = options;
  const directory = makeTempDir('guest', cleanup);
  const agentSocket = join(directory, 'agent');
  const qmpSocket = join(directory, 'qmp');
  const serialLog = join(directory, 'serial.log');
  if (uid !== undefined) chownSync(directory, uid, uid);
  // A comma in a value is doubled for QEMU.
  const valueOf = (value: string | number): string => String(value).replaceAll(',', ',,');
  const file = typeof disk === 'string' ? `file=${valueOf(disk)},aio=threads` : Object.entries(disk).map(([name, value]) => `file.${name}=${valueOf(value)}`).join(',');
  const child = spawn('qemu-system-x86_64', [
    '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot',
    '-machine', 'pc', '-accel', 'tcg,thread=multi', '-smp', String(PROCESSORS), '-m', String(memoryMib),
    '-kernel', image.kernel, '-initrd', image.initrd, '-append', 'console=ttyS0 root=/dev/vda rw quiet panic=-1',
    '-drive', `${file},if=virtio,format=raw,cache=${cache},discard=${discard},werror=${onWriteError}`,
    '-qmp', `unix:${qmpSocket},server=on,wait=off`,
    '-chardev', `file,id=serial0,path=${serialLog}`, '-serial', 'chardev:serial0',
    '-device', 'virtio-serial-pci', '-chardev', `socket,id=agent0,path=${agentSocket},server=on,wait=off`,
    '-device', 'virtserialport,chardev=agent0,name=org.qemu.guest_agent.0',
  ], { stdio: ['ignore', 'ignore', 'pipe'], ...(uid === undefined ? {} : { uid, gid: uid }) });
  const said = createWriteStream(join(directory, 'qemu.log'));
  child.stderr.pipe(said);

  let ending: string | null = null;
  child.on('error', (error) => { ending = `QEMU could not be started: ${error.message}`; });
  child.on('exit', (code, signal) => { ending ??= `exit code ${code ?? 'none'}, signal ${signal ?? 'none'}`; });
  const hasEnded = (): boolean => ending !== null;
  cleanup.add(kill);

  const serial = (): string => readOrEmpty(serialLog);
  const lastWords = (): string => `\nserial line:\n${serial().slice(-3000)}\nQEMU:\n${readOrEmpty(join(directory, 'qemu.log')).slice(-2000)}`;

  async function kill(): Promise<void> {
    if (!hasEnded()) child.kill('SIGKILL');
    if (!(await waitUntil(hasEnded, END_TIMEOUT_MS))) throw new Error(`QEMU (process ${child.pid ?? 'unknown'}) could not be killed`);
    said.end();
  }

  return {
    pid: child.pid ?? 0,
    qmpSocket,
    serial,
    kill,
    async waitForSerial(text, timeoutMs) {
      const came = await waitUntil(() => serial().includes(text) || hasEnded(), timeoutMs);
      if (serial().includes(text)) return;
      throw new Error(`'${text}' ${came ? `will not come, QEMU has ended (${ending ?? ''})` : `did not come within ${timeoutMs} ms`}${lastWords()}`);
    },
    async agent(timeoutMs = AGENT_TIMEOUT_MS) {
      if (!(await waitUntil(() => readOrEmpty('/proc/net/unix').includes(agentSocket) || hasEnded(), END_TIMEOUT_MS)) || hasEnded()) {
        throw new Error(`QEMU did not start: ${ending ?? 'no socket'}${lastWords()}`);
      }
      const agent = await connectGuestAgent(agentSocket, timeoutMs);
      cleanup.add(() => { agent.close(); });
      return agent;
    },
    async powerOff(agent, timeoutMs = POWER_OFF_TIMEOUT_MS) {
      agent.powerOff();
      if (!(await waitUntil(hasEnded, timeoutMs))) throw new Error(`the guest did not power off within ${timeoutMs} ms${lastWords()}`);
      agent.close();
      if (child.exitCode !== 0) throw new Error(`QEMU failed: ${ending ?? ''}${lastWords()}`);
    },
  };
}

function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    // Not there yet.
    return '';
  }
}
