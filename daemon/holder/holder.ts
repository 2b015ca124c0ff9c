/**
 * The holder's conduct from the first server to the end: wait, start again, watch, unmount when the server asks.
 *
 * Runs in the holder's only thread and does nothing else, because what it holds, the last descriptor of the FUSE connection, is what
 * keeps guests alive while there is no server. The promise: from the first `ready` on, the connection is given up only after an
 * unmount. Everything that touches the system is behind `HolderPorts`, so that each path below is tested without a mount.
 *
 *   starting ──ready──► running ──ended──► backing-off ──► restarting ──ready──► running
 *      │                   │                    └──crash loop──► down ──SIGUSR1──► restarting
 *      └──ended: the start failed               a server that ends with 0 after the unmount: finished
 *
 * The next server touches store and mount only after the old one is gone with all its threads (`gone`): a late write of the old one must
 * not land on the new one's. It may be loaded before (`spare.ts`), and it may be another build's (`upgrade.ts`); whether a server
 * that lives is well is the watchdog's.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { describeExit, type HolderEnd, type HolderPorts, type ServerExit, type UnmountOutcome } from './holder-ports.js';
import type { HolderState } from './holder-state.js';
import { HAND_OVER_CODE, type ReportedError, type ServerMessage } from './ipc.js';
import type { RestartPolicy } from './restart-policy.js';
import { ServerSeat, type SeatListener } from './server-seat.js';
import { Spare } from './spare.js';
import { Upgrade, reported } from './upgrade.js';
import { Watchdog } from './watchdog.js';

type Phase = 'starting' | 'running' | 'backing-off' | 'restarting' | 'down' | 'ended';

/** A server that said that it failed gets this long to end itself. */
const FAILED_SERVER_MS_MAX = 5_000;
/** How often the log says that a server is not ready yet. */
const PATIENCE_MS = 30_000;

export class Holder {
  readonly #ports: HolderPorts;
  readonly #policy: RestartPolicy;
  readonly #startedAt: string;
  readonly #spare: Spare;
  readonly #upgrade: Upgrade;
  #phase: Phase = 'starting';
  #server: ServerSeat | undefined;
  /** The program that servers run; another build's after an upgrade. */
  #entry: string | null = null;
  #watchdog: Watchdog | undefined;
  #restarts: number;
  #failure: ReportedError | undefined;
  #giveUpReason: OffshootError | undefined;
  #wasReady = false;
  #unmounted = false;
  #stopWanted = false;
  #lastExit: HolderState['lastExit'] = null;
  #lastHang: HolderState['lastHang'] = null;
  #lastStallMs: number | null = null;
  /** When the last server that served ended; undefined while guests are served. */
  #stalledSinceMs: number | undefined;
  #cancelTimer: () => void = () => undefined;

  constructor(ports: HolderPorts, policy: RestartPolicy) {
    this.#ports = ports;
    this.#policy = policy;
    this.#startedAt = ports.wallClock();
    this.#restarts = ports.takenOverAfter ?? 0;
    const changed = (): void => { this.#publish(); };
    const spawn = (entry: string | null, listener: SeatListener): ServerSeat =>
      new ServerSeat((events) => ports.spawnServer({ restarts: this.#restarts, standby: true, entry }, events), listener);
    this.#spare = new Spare({ log: ports.log, schedule: ports.schedule, changed, spawn: (listener) => spawn(this.#entry, listener) });
    this.#upgrade = new Upgrade({
      check: ports.checkServerEntry, schedule: ports.schedule, wallClock: ports.wallClock, changed, spawn: (entry, listener) => spawn(entry, listener),
    });
  }

  start(): void {
    if (this.#ports.takenOverAfter === null) {
      this.#spawn();
      return;
    }
    // Guests wait already, and a server that fails must not cost them the mount.
    this.#stalledSinceMs = this.#ports.nowMs();
    this.#respawn();
  }

  /** The wish to stop: the server is asked, and unmounts if nobody uses the mount. Before the first `ready`, gives up. */
  stop(): void {
    switch (this.#phase) {
      case 'starting':
        this.giveUp(new OffshootError('cancelled', 'the daemon was told to stop before it was ready'));
        return;
      case 'running':
        this.#server?.send({ type: 'shutdown' });
        return;
      case 'backing-off':
      case 'restarting':
        this.#stopWanted = true;
        return;
      case 'down':
        this.#unmountWithoutServer();
        break;
      case 'ended':
    }
  }

  /** Ends a start that is no longer wanted. The first server has served nobody yet, so it may be killed. */
  giveUp(reason: OffshootError): void {
    if (this.#phase !== 'starting') return;
    this.#giveUpReason ??= reason;
    this.#server?.kill();
  }

  /** An operator's wish to try again after a crash loop. */
  retry(): void {
    if (this.#phase !== 'down') {
      this.#ports.log('info', 'nothing to try again: the server is not down', { state: this.#phase });
      return;
    }
    this.#ports.log('info', 'trying again to start the server');
    this.#policy.forget();
    this.#respawn();
  }

  #spawn(): void {
    const { restarts, entry } = { restarts: this.#restarts, entry: this.#entry };
    this.#sit(new ServerSeat((events) => this.#ports.spawnServer({ restarts, standby: false, entry }, events), { message: () => undefined, gone: () => undefined }));
  }

  /** From now on this one is the server. */
  #sit(seat: ServerSeat): void {
    this.#failure = undefined;
    this.#server = seat;
    seat.listen({
      message: (message) => {
        if (seat === this.#server && this.#phase !== 'ended') this.#serverSaid(seat, message);
      },
      gone: (exit) => {
        if (seat === this.#server && this.#phase !== 'ended') this.#serverGone(exit);
      },
    });
    this.#watch();
  }

  #respawn(): void {
    this.#phase = 'restarting';
    this.#restarts += 1;
    const standing = this.#upgrade.take(() => this.#server?.kill()) ?? this.#spare.take();
    if (standing === undefined) {
      this.#spawn();
    } else {
      this.#sit(standing);
      standing.send({ type: 'go', restarts: this.#restarts });
    }
    this.#publish();
  }

  #serverSaid(seat: ServerSeat, message: ServerMessage): void {
    switch (message.type) {
      case 'hello':
        return;
      case 'serving':
        this.#guestsGoOn();
        return;
      case 'ready':
        this.#guestsGoOn();
        this.#serverReady(seat);
        return;
      case 'pong':
        this.#watchdog?.answered();
        return;
      case 'failed':
        this.#failure = message.error;
        if (this.#upgrade.isUnderWay) this.#upgrade.failed(message.error);
        this.#ports.log('error', `the server cannot start: ${message.error.message}`, { kind: message.error.kind });
        this.#setTimer(FAILED_SERVER_MS_MAX, () => { seat.kill(); });
        return;
      case 'upgrade':
        void this.#beginUpgrade(seat, message.requestId, message.entry);
        return;
      case 'unmount': {
        const { requestId } = message;
        const outcome = this.#unmount(message.force);
        seat.send(outcome.unmounted ? { type: 'unmounted', requestId } : { type: 'unmount-refused', requestId, message: outcome.message });
      }
    }
  }

  #guestsGoOn(): void {
    if (this.#stalledSinceMs === undefined) return;
    this.#lastStallMs = Math.round(this.#ports.nowMs() - this.#stalledSinceMs);
    this.#stalledSinceMs = undefined;
  }

  #serverReady(seat: ServerSeat): void {
    if (this.#phase !== 'starting' && this.#phase !== 'restarting') return;
    const isFirst = !this.#wasReady;
    this.#wasReady = true;
    this.#cancelTimer();
    this.#phase = 'running';
    this.#policy.serverReady();
    if (!isFirst) {
      this.#ports.log('info', 'the server is back', { serverPid: seat.pid, restarts: this.#restarts, stallMs: this.#lastStallMs, version: seat.identity?.version ?? null });
    }
    if (this.#upgrade.isUnderWay && this.#upgrade.state?.state === 'running' && !isFirst) {
      this.#entry = this.#upgrade.entry;
      this.#upgrade.done(seat.pid, this.#lastStallMs);
      // Of the build before: of no use any more.
      this.#spare.take()?.dismiss();
      this.#ports.log('info', 'upgraded', { fromVersion: this.#upgrade.state.fromVersion, toVersion: this.#upgrade.state.toVersion, stallMs: this.#lastStallMs });
    } else {
      this.#upgrade.settled(seat.pid, this.#lastStallMs);
    }
    this.#watchdog = new Watchdog(seat, {
      log: this.#ports.log, nowMs: this.#ports.nowMs, schedule: this.#ports.schedule, processState: this.#ports.processState,
      hung: (ms) => {
        this.#lastHang = { ms, serverPid: seat.pid, at: this.#ports.wallClock() };
        this.#publish();
      },
    });
    if (this.#ports.keepsSpare) this.#spare.plan();
    this.#publish();
    if (isFirst) this.#ports.ready(seat.pid);
    if (this.#stopWanted) {
      this.#stopWanted = false;
      seat.send({ type: 'shutdown' });
    }
  }

  async #beginUpgrade(seat: ServerSeat, requestId: number, entry: string): Promise<void> {
    try {
      if (this.#phase !== 'running' || this.#unmounted) throw new OffshootError('busy', 'the server is not running: try again later');
      if (!this.#ports.keepsTheMount) throw new OffshootError('not-supported', 'with the transport fuse-native the mount ends with its server: stop the daemon, and start the new build');
      const upgradeId = await this.#upgrade.begin(seat, entry);
      this.#ports.log('info', 'upgrading: the server is told to hand over', { upgradeId, entry, toVersion: this.#upgrade.state?.toVersion ?? null });
      seat.send({ type: 'upgrade-accepted', requestId, upgradeId });
      seat.send({ type: 'hand-over' });
    } catch (thrown) {
      const error = reported(thrown);
      this.#ports.log('warn', `no upgrade: ${error.message}`, { entry });
      seat.send({ type: 'upgrade-refused', requestId, error });
    }
  }

  #serverGone(exit: ServerExit): void {
    this.#cancelTimer();
    this.#watchdog?.stop();
    this.#watchdog = undefined;
    const phase = this.#phase;
    if (phase !== 'starting') this.#stalledSinceMs ??= this.#ports.nowMs();
    this.#lastExit = { code: exit.code, signal: exit.signal, at: this.#ports.wallClock() };
    if (phase === 'starting') {
      this.#end({ kind: 'not-started', error: this.#startError(exit) });
      return;
    }
    if (exit.code === 0 && (this.#unmounted || !this.#ports.isMounted())) {
      this.#ports.log('info', 'the mount is gone and the store is closed');
      this.#end({ kind: 'finished' });
      return;
    }
    const serverPid = this.#server?.pid ?? 0;
    const isUpgrading = this.#upgrade.isUnderWay && this.#upgrade.state?.state === 'running';
    if (isUpgrading && phase === 'restarting') {
      const error = this.#upgrade.rolledBack(exit);
      this.#ports.log('error', `the new build did not become ready, the old one serves again: ${error.message}`, { serverPid });
      this.#respawn();
      return;
    }
    if (isUpgrading || exit.code === HAND_OVER_CODE) {
      if (exit.code !== HAND_OVER_CODE) this.#ports.log('warn', `the old server ${describeExit(exit)} before it had handed over; the new one recovers`, { serverPid });
      this.#respawn();
      return;
    }
    const decision = this.#policy.serverEnded();
    if (decision.action === 'restart') {
      this.#ports.log('error', `the server ${describeExit(exit)}; starting the next`, { serverPid, delayMs: decision.delayMs });
      if (decision.delayMs === 0) {
        this.#respawn();
        return;
      }
      this.#phase = 'backing-off';
      this.#publish();
      this.#setTimer(decision.delayMs, () => {
        this.#respawn();
      });
      return;
    }
    if (this.#unmounted) {
      this.#ports.log('fatal', `the server ${describeExit(exit)} again and again after the unmount: the next start of the daemon recovers the store`);
      this.#end({ kind: 'abandoned' });
      return;
    }
    this.#phase = 'down';
    this.#ports.log(
      'fatal',
      `the server ${describeExit(exit)}, ${decision.crashes} crashes in a short time: staying down. Guests wait and nothing is lost. ` +
        `Look above for the cause, then 'kill -USR1 ${process.pid}' tries again, and 'kill ${process.pid}' unmounts if nobody uses the mount`,
      { serverPid },
    );
    this.#publish();
    if (this.#stopWanted) this.#unmountWithoutServer();
  }

  #startError(exit: ServerExit): OffshootError {
    if (this.#giveUpReason !== undefined) return this.#giveUpReason;
    if (this.#failure !== undefined) return new OffshootError(this.#failure.kind, this.#failure.message);
    return new OffshootError('internal', `the server ${describeExit(exit)} before it was ready`);
  }

  #unmount(force: boolean): UnmountOutcome {
    if (this.#unmounted) return { unmounted: true };
    const outcome = this.#ports.unmount(force);
    if (outcome.unmounted) {
      this.#unmounted = true;
      this.#ports.log('info', 'unmounted', { force });
    } else {
      this.#ports.log('warn', `not unmounted: ${outcome.message}`, { force });
    }
    return outcome;
  }

  #unmountWithoutServer(): void {
    this.#stopWanted = false;
    if (!this.#unmount(false).unmounted) return;
    this.#ports.log('warn', 'unmounted without a server: the next start of the daemon recovers the store');
    this.#end({ kind: 'abandoned' });
  }

  /** Says from time to time that a server takes long. It is not killed: recovery may take long, and would begin again. */
  #watch(): void {
    const sinceMs = this.#ports.nowMs();
    const look = (): void => {
      this.#ports.log('warn', 'the server is not ready yet', { serverPid: this.#serverPid(), waitedMs: Math.round(this.#ports.nowMs() - sinceMs) });
      this.#setTimer(PATIENCE_MS, look);
    };
    this.#setTimer(PATIENCE_MS, look);
  }

  #setTimer(delayMs: number, body: () => void): void {
    this.#cancelTimer();
    this.#cancelTimer = this.#ports.schedule(delayMs, body);
  }

  #serverPid(): number {
    return this.#server?.pid ?? 0;
  }

  #publish(): void {
    this.#ports.publish({
      holderPid: process.pid,
      holderVersion: this.#ports.version,
      serverPid: this.#serverPid(),
      sparePid: this.#spare.pid,
      restarts: this.#restarts,
      startedAt: this.#startedAt,
      lastExit: this.#lastExit,
      lastStallMs: this.#lastStallMs,
      lastHang: this.#lastHang,
      upgrade: this.#upgrade.state,
      state: this.#phase === 'running' || this.#phase === 'down' ? this.#phase : 'restarting',
    });
  }

  /** Processes that only wait go first, so that nothing of the daemon is left when it has ended. */
  #end(end: HolderEnd): void {
    this.#cancelTimer();
    this.#phase = 'ended';
    const done = (): void => { this.#ports.ended(end); };
    this.#upgrade.dismiss(() => {
      const spare = this.#spare.take();
      if (spare === undefined) done();
      else spare.dismiss(done);
    });
  }
}
