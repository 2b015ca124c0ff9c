/** The holder's surroundings as data: servers that say what a test lets them say, a mount, and a clock that the test moves. */
import { OffshootError } from '../../blockstore/errors.js';
import { Holder } from '../../daemon/holder/holder.js';
import type { HolderEnd, HolderPorts, ServerEvents, ServerExit, ServerStart } from '../../daemon/holder/holder-ports.js';
import type { HolderState } from '../../daemon/holder/holder-state.js';
import type { HolderMessage, ServerMessage } from '../../daemon/holder/ipc.js';
import { RestartPolicy } from '../../daemon/holder/restart-policy.js';

export interface FakeServer {
  readonly pid: number;
  readonly restarts: number;
  readonly standby: boolean;
  readonly entry: string | null;
  readonly received: HolderMessage[];
  killed: boolean;
  hasEnded: boolean;
  say(message: ServerMessage): void;
  end(exit: ServerExit): void;
}

export const KILLED: ServerExit = { code: null, signal: 'SIGKILL' };

export class World {
  readonly servers: FakeServer[] = [];
  readonly logged: string[] = [];
  readonly readyPids: number[] = [];
  readonly unmountRequests: boolean[] = [];
  nowMs = 0;
  isMounted = true;
  busyWith: string | undefined;
  state: HolderState | undefined;
  end: HolderEnd | undefined;
  readonly holder: Holder;
  #timers: { readonly atMs: number; readonly body: () => void }[] = [];

  processState = 'S';
  readonly #keepsSpare: boolean;
  readonly #takenOverAfter: number | null;

  constructor({ keepsSpare = false, takenOverAfter = null }: { keepsSpare?: boolean; takenOverAfter?: number | null } = {}) {
    this.#keepsSpare = keepsSpare;
    this.#takenOverAfter = takenOverAfter;
    this.holder = new Holder(this.#ports(), new RestartPolicy(() => this.nowMs));
  }

  get server(): FakeServer {
    const newest = this.servers.at(-1);
    if (newest === undefined) throw new Error('no server was started');
    return newest;
  }

  pass(durationMs: number): void {
    const untilMs = this.nowMs + durationMs;
    for (;;) {
      const next = this.#timers.filter(({ atMs }) => atMs <= untilMs).sort((a, b) => a.atMs - b.atMs)[0];
      if (next === undefined) break;
      this.#timers = this.#timers.filter((timer) => timer !== next);
      this.nowMs = next.atMs;
      next.body();
    }
    this.nowMs = untilMs;
  }

  startReady(): void {
    this.holder.start();
    this.server.say({ type: 'ready' });
  }

  /** Brings the holder down by a crash loop. */
  crashUntilDown(): void {
    for (let crash = 0; crash < 5; crash += 1) {
      this.server.end(KILLED);
      this.pass(5_000);
    }
  }

  #ports(): HolderPorts {
    return {
      version: '1.0.0',
      keepsSpare: this.#keepsSpare,
      keepsTheMount: true,
      takenOverAfter: this.#takenOverAfter,
      processState: () => this.processState,
      checkServerEntry: (entry) => {
        if (entry === '/untrusted') throw new OffshootError('not-permitted', 'can be changed by others');
      },
      spawnServer: (start, events) => this.#spawn(start, events),
      unmount: (force) => {
        this.unmountRequests.push(force);
        if (this.busyWith !== undefined && !force) return { unmounted: false, message: `in use by ${this.busyWith}` };
        this.isMounted = false;
        return { unmounted: true };
      },
      isMounted: () => this.isMounted,
      publish: (state) => {
        this.state = state;
      },
      log: (level, message) => {
        this.logged.push(`${level}: ${message}`);
      },
      nowMs: () => this.nowMs,
      wallClock: () => `time ${this.nowMs}`,
      schedule: (delayMs, body) => {
        const timer = { atMs: this.nowMs + delayMs, body };
        this.#timers.push(timer);
        return () => {
          this.#timers = this.#timers.filter((other) => other !== timer);
        };
      },
      ready: (serverPid) => {
        this.readyPids.push(serverPid);
      },
      ended: (end) => {
        if (this.end !== undefined) throw new Error('ended twice');
        this.end = end;
      },
    };
  }

  #spawn({ restarts, standby, entry }: ServerStart, events: ServerEvents): FakeServer & { send: (message: HolderMessage) => void; kill: () => void } {
    const server = {
      pid: 1_000 + this.servers.length,
      restarts,
      standby,
      entry,
      received: [] as HolderMessage[],
      killed: false,
      hasEnded: false,
      say: (message: ServerMessage) => {
        events.message(message);
      },
      end: (exit: ServerExit) => {
        server.hasEnded = true;
        events.gone(exit);
      },
      send: (message: HolderMessage) => {
        server.received.push(message);
      },
      kill: () => {
        server.killed = true;
      },
    };
    this.servers.push(server);
    return server;
  }
}
