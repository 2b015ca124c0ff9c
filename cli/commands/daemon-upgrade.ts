/**
 * `offshoot daemon upgrade`: the build that this command belongs to takes over a running daemon's mount.
 *
 * The daemon loads this build's server beside its own, and only when that fits does the old one hand over; the command follows until one of
 * the two serves. Between the two nobody listens on the socket for a moment, which is no error here.
 */
import { fileURLToPath } from 'node:url';
import type { Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import type { DaemonStatus, UpgradeInfo } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { renderFields } from '../output.js';
import { formatDuration } from '../sizes.js';

/** Of this build. */
const SERVER_ENTRY = fileURLToPath(new URL('../../daemon/server/main.js', import.meta.url));
/** The holder gives either server a minute. */
const WAIT_MS_MAX = 180_000;
const POLL_MS = 100;

export function addUpgradeCommand(daemon: Command, io: CliIo): void {
  daemon.command('upgrade')
    .description("Let this build's server take over the running daemon's mount. Guests see a pause, not an error.")
    .usage('[OPTIONS]')
    .addHelpText('after', `
Run the new build's own command (/opt/offshoot-2/scripts/offshoot, say). That build is loaded
and checked before anything is stopped, and refused where it does not fit (another store
schema, for example). If it does not become ready, the
old build serves again, and the command fails with the reason. The holder, the small process
that keeps the mount, stays what it is until the next stop and start.

Examples:
  offshoot daemon upgrade
  offshoot daemon upgrade --json | jq .stallMs
`)
    .action(async (_options: unknown, command: Command) => { await upgrade(contextOf(io, command)); });
}

async function upgrade(context: CliContext): Promise<void> {
  const { output } = context;
  const { upgradeId } = await context.client().upgrade(SERVER_ENTRY);
  const { status, outcome } = await follow(context, upgradeId);
  if (outcome.state === 'rolled-back') {
    throw new OffshootError(
      outcome.error?.kind ?? 'internal',
      `${outcome.toVersion} did not become ready, and ${outcome.fromVersion} serves again: ${outcome.error?.message ?? 'no reason was given'}. Look at ${status.storeDir}/offshoot.log`,
      { fromVersion: outcome.fromVersion, toVersion: outcome.toVersion, serverPid: status.serverPid },
    );
  }
  const { fromVersion, toVersion, fromServerPid, stallMs } = outcome;
  const { serverPid, holderPid, holderVersion } = status;
  output.result({ upgraded: true, fromVersion, toVersion, fromServerPid, serverPid, holderPid, holderVersion, stallMs }, () => renderFields(`offshoot ${toVersion} serves now`, [
    ['Before', `${fromVersion}, server ${fromServerPid}`],
    ['Now', `${toVersion}, server ${serverPid}`],
    ['Holder', `${holderVersion}, process ${holderPid}, as before`],
    ['Guests waited', stallMs === null ? 'not known' : formatDuration(stallMs)],
  ], output.bold));
}

async function follow(context: CliContext, upgradeId: number): Promise<{ readonly status: DaemonStatus; readonly outcome: UpgradeInfo }> {
  const { io } = context;
  const deadlineMs = io.nowMs() + WAIT_MS_MAX;
  const never = new AbortController().signal;
  for (;;) {
    const status = await statusIfAny(context);
    const outcome = status?.upgrade;
    if (status !== null && outcome?.id === upgradeId && outcome.state !== 'running' && outcome.serverPid !== null) return { status, outcome };
    if (io.nowMs() > deadlineMs) {
      throw new OffshootError('timed-out', `neither build has become ready within ${formatDuration(WAIT_MS_MAX)}; guests wait: look at the daemon's log`, { upgradeId });
    }
    await io.sleep(POLL_MS, never);
  }
}

/** Null between two servers. */
async function statusIfAny(context: CliContext): Promise<DaemonStatus | null> {
  try {
    return await context.client().status();
  } catch (error) {
    if (error instanceof OffshootError && ['daemon-not-running', 'io-error', 'busy'].includes(error.kind)) return null;
    throw error;
  }
}
