/**
 * `offshoot daemon start | status | stop`; `upgrade` is in a file of its own.
 *
 * `start` returns when the mount serves, in the foreground when the daemon has ended; `stop` when the daemon's processes are gone, so that what follows in a script may
 * remove the mount point or start another daemon on the same store.
 */
import { join, resolve } from 'node:path';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import type { StartDaemonOptions, StartDaemonResult } from '../../daemon/control/launch.js';
import { ATTACH_LIMIT_DEFAULT, ATTACH_LIMIT_MAX, DEFAULT_SOCKET_PATH, LOG_LEVELS, SOURCE_TIMEOUT_SECONDS, SOURCE_TIMEOUT_SECONDS_MAX, TRANSPORTS, WORKERS_MAX } from '../../daemon/control/limits.js';
import { visible } from '../../daemon/control/paths.js';
import type { DaemonStatus } from '../../daemon/control/schemas.js';
import { addPolicyOptions, policyFrom, type PolicyOptions } from '../policy-options.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { counted, renderFields } from '../output.js';
import { formatBytes, formatDuration, formatPercent, formatTime, parseRate } from '../sizes.js';
import { addUpgradeCommand } from './daemon-upgrade.js';
import { progressText } from '../progress.js';
import { scrubStatusText } from './scrub.js';

/** A stop flushes every disk first. */
const STOP_WAIT_MS_MAX = 60_000;
const STOP_POLL_MS = 50;

interface StartOptions extends PolicyOptions {
  readonly store: string;
  readonly mount: string;
  readonly workers?: number;
  readonly transport: StartDaemonOptions['transport'];
  readonly logLevel: StartDaemonOptions['logLevel'];
  readonly sourceTimeout: number;
  readonly foreground?: boolean;
  /** commander's way of --no-spare. */
  readonly spare: boolean;
  readonly scrubRate?: string;
  readonly libvirt?: string;
  readonly vsphere?: string;
  readonly exportAddress?: string;
  readonly nfs?: boolean;
  readonly attachLimit?: number;
}

export function addDaemonCommands(program: Command, io: CliIo): void {
  const daemon = program.command('daemon').description('Start, look at and stop the daemon that serves the mount.').summary('start, look at and stop the daemon that serves the mount')
    .helpCommand(false).usage('start|status|stop|upgrade [OPTIONS]');
  const starting = daemon.command('start');
  starting
    .description('Mount a store and serve it. Returns when the mount is ready; the daemon goes on in the background.')
    .usage('--store DIR --mount DIR [OPTIONS]')
    .requiredOption('--store <dir>', 'directory of the store; an empty or missing one becomes a new store')
    .requiredOption('--mount <dir>', 'an empty directory: here the disks will be seen')
    .addOption(new Option('--workers <n>', `I/O worker threads, 1 to ${WORKERS_MAX} (default: as many as suit the machine)`).argParser(parseWorkers))
    .addOption(new Option('--transport <kernel|fuse-native>', 'kernel: worker threads read /dev/fuse, fast; fuse-native: the npm package, needs fusermount and libfuse2').choices(TRANSPORTS).default('kernel'))
    .addOption(new Option('--log-level <level>', `how much goes to the log: ${LOG_LEVELS.join(', ')}`).choices(LOG_LEVELS).default('info'))
    .addOption(new Option('--source-timeout <seconds>', 'how long a read waits for a source that does not answer, before it fails').argParser(parseSeconds).default(SOURCE_TIMEOUT_SECONDS))
    .option('--no-spare', 'keep no next server loaded: saves memory, and guests wait longer when a server dies')
    .option('--scrub-rate <bytes>', 'limit of the scrub that begins by itself each 30 days, as in 32M, or off: none begins (default: 32M)')
    .option('--libvirt <uri>', 'the libvirt that machines are registered with (default: qemu:///system)')
    .option('--vsphere <file>', 'settings of the vSphere that machines are registered with (daemon/hypervisor/vsphere/VSPHERE.md)')
    .option('--export-address <address>', 'where servers of exports listen (offshoot present); 0.0.0.0: everywhere (default: 127.0.0.1, this host alone)')
    .option('--nfs', 'let an NFS server show what is under the mount: makes file handles possible, for this mount as long as it is there')
    .addOption(new Option('--attach-limit <n>', `virtual disks that may be attached as block devices of this host at a time (default: ${ATTACH_LIMIT_DEFAULT})`).argParser(parseAttachLimit))
    .option('--foreground', 'stay in the foreground, log to standard error, end with Ctrl-C (for systemd and containers)')
    .addHelpText('after', `
The kernel transport and the default socket need root. The log of a daemon in the
background is STORE/offshoot.log.

Examples:
  offshoot daemon start --store /srv/offshoot --mount /mnt/offshoot
  offshoot daemon start --store /srv/offshoot --mount /mnt/offshoot --workers 4 --log-level debug
  offshoot daemon start --store ./store --mount ./mnt --socket ./offshoot.sock --foreground
`)
    .action(async (options: StartOptions, command: Command) => { await start(contextOf(io, command), options); });
  addPolicyOptions(starting);
  daemon.command('status')
    .description('Say how the daemon is and what it serves. Fails with exit code 13 when none runs.')
    .usage('[OPTIONS]')
    .addHelpText('after', `
Examples:
  offshoot daemon status
  offshoot daemon status --json | jq -r .mountDir
`)
    .action(async (_options: unknown, command: Command) => { await status(contextOf(io, command)); });
  daemon.command('stop')
    .description('Make everything durable, unmount, and end the daemon. Refused while disks are open.')
    .usage('[OPTIONS]')
    .option('--force', 'unmount although files are open: whoever has them open gets I/O errors')
    .addHelpText('after', `
Returns when the daemon's processes are gone. Fills go on where they were after the next start.

Examples:
  offshoot daemon stop
  offshoot daemon stop --socket ./offshoot.sock
`)
    .action(async (options: { force?: boolean }, command: Command) => { await stop(contextOf(io, command), options.force === true); });
  addUpgradeCommand(daemon, io);
}

function parseWorkers(text: string): number {
  const workers = Number(text);
  if (!/^[0-9]+$/u.test(text) || workers < 1 || workers > WORKERS_MAX) throw new InvalidArgumentError(`It must be a number from 1 to ${WORKERS_MAX}.`);
  return workers;
}

function parseAttachLimit(text: string): number {
  const limit = Number(text);
  if (!/^[0-9]+$/u.test(text) || limit > ATTACH_LIMIT_MAX) throw new InvalidArgumentError(`It must be a number from 0 to ${ATTACH_LIMIT_MAX}.`);
  return limit;
}

function parseSeconds(text: string): number {
  const seconds = Number(text);
  if (!/^[0-9]+$/u.test(text) || seconds < 1 || seconds > SOURCE_TIMEOUT_SECONDS_MAX) {
    throw new InvalidArgumentError(`It must be a whole number of seconds from 1 to ${SOURCE_TIMEOUT_SECONDS_MAX}.`);
  }
  return seconds;
}

async function start(context: CliContext, options: StartOptions): Promise<void> {
  const { io, output } = context;
  const storeDir = resolve(io.cwd(), options.store);
  const mountDir = resolve(io.cwd(), options.mount);
  const foreground = options.foreground === true;
  const ready = (started: StartDaemonResult): void => {
    for (const note of started.notes) output.note(`note: ${visible(note)}`);
    const { holderPid, serverPid, socketPath, notes } = started;
    output.result({ holderPid, serverPid, socketPath, storeDir, mountDir: started.mountDir, notes }, () => startedLines(started, storeDir, foreground, output.bold));
  };
  const started = await io.startDaemon({
    storeDir, mountDir, socketPath: context.socketPath(), workers: options.workers, transport: options.transport, logLevel: options.logLevel,
    sourceTimeoutSeconds: options.sourceTimeout, foreground, spare: options.spare, ...policyFrom(options),
    scrubRateBytesPerSecond: options.scrubRate === undefined ? undefined : options.scrubRate === 'off' ? null : (parseRate(options.scrubRate) ?? Number.MAX_SAFE_INTEGER),
    ...hypervisorsFrom(io, options), ...(options.exportAddress === undefined ? {} : { exportAddress: options.exportAddress }), ...(options.nfs === true ? { nfs: true } : {}), attachLimit: options.attachLimit,
  }, foreground ? { onReady: ready } : {});
  if (!foreground) ready(started);
}

function hypervisorsFrom(io: CliIo, { libvirt, vsphere }: StartOptions): Pick<StartDaemonOptions, 'hypervisors'> {
  if (libvirt === undefined && vsphere === undefined) return {};
  return { hypervisors: { ...(libvirt === undefined ? {} : { libvirtUri: libvirt }), ...(vsphere === undefined ? {} : { vsphereSettings: resolve(io.cwd(), vsphere) }) } };
}

function startedLines(started: StartDaemonResult, storeDir: string, foreground: boolean, bold: (text: string) => string): string[] {
  const lines = renderFields(foreground ? 'offshoot is running; Ctrl-C ends it' : 'offshoot is running', [
    ['Store', storeDir],
    ['Mount', started.mountDir],
    ['Socket', started.socketPath],
    ['Processes', `holder ${started.holderPid}, server ${started.serverPid}`],
    ...(foreground ? [] : [['Log', join(storeDir, 'offshoot.log')] as const]),
  ], bold);
  if (started.socketPath !== DEFAULT_SOCKET_PATH) lines.push(`Other commands find it with: export OFFSHOOT_SOCKET=${visible(started.socketPath)}`);
  return lines;
}

async function status(context: CliContext): Promise<void> {
  const { output } = context;
  const found = await context.client().status();
  output.result(found, () => renderFields(`offshoot ${found.version} is running`, statusFields(found), output.bold));
}

function statusFields(found: DaemonStatus): [string, string | string[]][] {
  const restarts = found.restarts === 0 ? 'never restarted'
    : `restarted ${counted(found.restarts, 'time')}${found.lastStallMs === null ? '' : `, the last time within ${formatDuration(found.lastStallMs)}`}`;
  const fields: [string, string | string[]][] = [
    ['Store', `${found.storeDir} (${formatBytes(found.storeBytesFree)} of ${formatBytes(found.storeBytesTotal)} free, ${formatPercent(found.storeBytesFree, found.storeBytesTotal)})`],
    ['Mount', found.mountDir],
    ['Socket', found.socketPath],
    ['Transport', found.workers === 0 ? found.transport : `${found.transport}, ${counted(found.workers, 'worker')}`],
    ['Processes', `holder ${found.holderPid}, server ${found.serverPid}${found.sparePid === null ? '' : `, spare ${found.sparePid}`}`],
    ['Serving since', `${formatTime(found.startedAt)}, ${restarts}`],
    ['In the store', `${counted(found.containersTotal, 'container')}, ${counted(found.disksTotal, 'disk')}, ${counted(found.snapshotsTotal, 'snapshot')}, ${counted(found.layersTotal, 'layer')}`],
    ['Virtual size', virtualText(found)],
    ['Open now', counted(found.disksOpen, 'disk or file', 'disks and files')],
    ['Scrub', scrubStatusText(found.scrub)],
    ['Merge', found.merge === null ? 'none' : `layers of ${found.merge.path}, ${progressText(found.merge, null)} (job ${found.merge.jobId})`],
    ['Versions', `${found.holderVersion === found.version ? '' : `holder ${found.holderVersion} (until the next stop and start), `}Node.js ${found.nodeVersion.replace(/^v/u, '')}, SQLite ${found.sqliteVersion}`],
  ];
  if (found.warnings.length > 0) fields.push(['Warnings', found.warnings]);
  return fields;
}

async function stop(context: CliContext, force: boolean): Promise<void> {
  const { io, output } = context;
  const client = context.client();
  const before = await client.status();
  const { holderPid } = await client.stop({ force });
  const deadlineMs = io.nowMs() + STOP_WAIT_MS_MAX;
  const never = new AbortController().signal;
  while (io.processLives(holderPid)) {
    if (io.nowMs() > deadlineMs) {
      throw new OffshootError('timed-out', `the mount is gone, but the daemon (process ${holderPid}) has not ended after ${formatDuration(STOP_WAIT_MS_MAX)}: look at ${join(before.storeDir, 'offshoot.log')}`, { holderPid });
    }
    await io.sleep(STOP_POLL_MS, never);
  }
  output.result({ stopped: true, holderPid, storeDir: before.storeDir, mountDir: before.mountDir }, () => [`offshoot has stopped; ${before.mountDir} is unmounted`]);
}

/** More than the store's file system holds is what clones are for, and what has to be watched. */
function virtualText({ virtualBytesTotal, storeBytesTotal }: DaemonStatus): string {
  const times = virtualBytesTotal / Math.max(1, storeBytesTotal);
  return `${formatBytes(virtualBytesTotal)} in all, ${times < 1 ? `${formatPercent(virtualBytesTotal, storeBytesTotal)} of` : `${times.toFixed(1)} times`} the store's file system`;
}
