/**
 * Whether a server that lives is well: its main thread is asked from time to time, over the channel, and must answer.
 *
 * Runs in the holder. While the main thread hangs, the I/O workers still serve open disks; what waits is names, flushes and commands.
 * Silence is logged and shown by the status afterwards. A server that is silent for very long is killed, because guests come off
 * better with the next one, and dying at any instruction is what it is made for. Not killed is one that somebody has stopped (SIGSTOP, a
 * debugger), nor one that waits for a device in the kernel: the next would have to wait for the same device.
 */
import type { HolderLog } from './holder-log.js';
import type { HolderMessage } from './ipc.js';

export const WATCHDOG_LIMITS = { pingMs: 5_000, warnMs: 15_000, killMs: 120_000 } as const;

export interface WatchdogPorts {
  readonly log: HolderLog;
  nowMs(): number;
  schedule(delayMs: number, body: () => void): () => void;
  /** The state of the process's main thread as in /proc/PID/stat, one letter; empty when it is gone. */
  processState(pid: number): string;
  /** It answers again, after this long. */
  hung(ms: number): void;
}

export interface Watched {
  readonly pid: number;
  send(message: HolderMessage): void;
  kill(): void;
}

/** Of one server, from `ready` to its end. */
export class Watchdog {
  readonly #ports: WatchdogPorts;
  readonly #server: Watched;
  readonly #limits: { readonly pingMs: number; readonly warnMs: number; readonly killMs: number };
  #askedAtMs: number | null = null;
  #isWarned = false;
  #cancel: () => void;

  constructor(server: Watched, ports: WatchdogPorts, limits = WATCHDOG_LIMITS) {
    this.#server = server;
    this.#ports = ports;
    this.#limits = limits;
    this.#cancel = ports.schedule(limits.pingMs, () => { this.#look(); });
  }

  stop(): void {
    this.#cancel();
  }

  answered(): void {
    if (this.#askedAtMs === null) return;
    const silentMs = Math.round(this.#ports.nowMs() - this.#askedAtMs);
    this.#askedAtMs = null;
    if (!this.#isWarned) return;
    this.#isWarned = false;
    this.#ports.log('warn', 'the server answers again', { serverPid: this.#server.pid, silentMs });
    this.#ports.hung(silentMs);
  }

  #look(): void {
    this.#cancel = this.#ports.schedule(this.#limits.pingMs, () => { this.#look(); });
    if (this.#askedAtMs === null) {
      this.#askedAtMs = this.#ports.nowMs();
      this.#server.send({ type: 'ping' });
      return;
    }
    const silentMs = Math.round(this.#ports.nowMs() - this.#askedAtMs);
    if (silentMs < this.#limits.warnMs) return;
    const processState = this.#ports.processState(this.#server.pid);
    if (!this.#isWarned) {
      this.#isWarned = true;
      this.#ports.log('error', 'the main thread of the server does not answer: open disks are still served, names, flushes and commands wait', {
        serverPid: this.#server.pid, silentMs, processState,
      });
      // Nothing worse at the first look: it may have been this process that slept, and the answer lies in the channel.
      return;
    }
    if (silentMs < this.#limits.killMs || ['T', 't', 'D', ''].includes(processState)) return;
    this.#ports.log('fatal', 'the main thread of the server hangs: it is killed, and the next one is started', { serverPid: this.#server.pid, silentMs, processState });
    this.#ports.hung(silentMs);
    this.#cancel();
    this.#server.kill();
  }
}
