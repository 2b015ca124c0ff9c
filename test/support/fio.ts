/**
 * Runs fio and reads its JSON: one job at a time, options as they stand in fio's manual.
 *
 * Any error that fio saw, a failed verification among them, is thrown with all that it said.
 */
import { command } from './model/command.js';

export type FioOptions = Readonly<Record<string, string | number | boolean>>;

export interface FioDirection {
  readonly iops: number;
  readonly bytesPerSecond: number;
  readonly bytes: number;
  readonly requests: number;
  /** Completion latency, in microseconds. */
  readonly latencyMeanUs: number;
  readonly latencyP99Us: number;
  readonly latencyMaxUs: number;
}

export interface FioResult {
  readonly read: FioDirection;
  readonly write: FioDirection;
}

interface RawDirection {
  readonly iops: number;
  readonly bw_bytes: number;
  readonly io_bytes: number;
  readonly total_ios: number;
  readonly clat_ns: { readonly mean: number; readonly max: number; readonly percentile?: Readonly<Record<string, number>> };
}

interface RawOutput {
  readonly jobs: readonly { readonly error: number; readonly read: RawDirection; readonly write: RawDirection }[];
}

const NS_PER_US = 1000;

/** `{rw: 'randread', bs: '4k', time_based: true}` becomes `--rw=randread --bs=4k --time_based`. */
export function fioArguments(options: FioOptions): string[] {
  return Object.entries(options).flatMap(([name, value]) => {
    if (value === false) return [];
    return value === true ? [`--${name}`] : [`--${name}=${value}`];
  });
}

export async function runFio(options: FioOptions, timeoutMs = 120_000): Promise<FioResult> {
  // A verifying job would leave its state behind, in the working directory.
  const args = ['--name=job', '--verify_state_save=0', ...fioArguments(options), '--output-format=json'];
  const result = await command('fio', args, { timeoutMs });
  const said = `fio ${args.join(' ')}\n${result.stdout.slice(0, 4000)}${result.stderr}`;
  if (result.timedOut) throw new Error(`fio did not end within ${timeoutMs} ms: ${said}`);
  if (result.code !== 0) throw new Error(`exit code ${result.code} of ${said}`);
  // Notes of fio may stand before its JSON.
  const output = JSON.parse(result.stdout.slice(result.stdout.indexOf('{'))) as RawOutput;
  const job = output.jobs[0];
  if (job?.error !== 0) throw new Error(`error ${job?.error ?? 'unknown'} of ${said}`);
  return { read: direction(job.read), write: direction(job.write) };
}

function direction(raw: RawDirection): FioDirection {
  return {
    iops: raw.iops,
    bytesPerSecond: raw.bw_bytes,
    bytes: raw.io_bytes,
    requests: raw.total_ios,
    latencyMeanUs: raw.clat_ns.mean / NS_PER_US,
    latencyP99Us: (raw.clat_ns.percentile?.['99.000000'] ?? 0) / NS_PER_US,
    latencyMaxUs: raw.clat_ns.max / NS_PER_US,
  };
}
