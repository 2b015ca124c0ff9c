/**
 * A vSphere for a test: govmomi's simulator, built from Debian's packages when the cache has none, on loopback with TLS.
 *
 * What it has registered is asked of it through its standard input, where it answers with what another client reads; see `vcsim/main.go`.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

import { cacheDirectory } from './guest-image.js';
import { mustRun } from './model/command.js';
import { makeTempDir, type Cleanup } from './temp.js';

const SOURCE = join(import.meta.dirname, 'vcsim', 'main.go');
const BUILD_TIMEOUT_MS = 300_000;
export const VCSIM_PACKAGES = ['go', '/usr/share/gocode/src/github.com/vmware/govmomi/simulator'] as const;
export const VCSIM_USER = 'root';
export const VCSIM_PASSWORD = 'secret & <word>';

export interface SimulatedMachine {
  readonly id: string;
  readonly name: string;
  readonly uuid: string;
  readonly path: string;
  readonly power: string;
  readonly macs: readonly string[];
  /** As the .vmx names them; -1 bytes where a host could not open one from there. */
  readonly disks: readonly { readonly file: string; readonly bytes: number }[];
  readonly folder: string;
  readonly pool: string;
}

export interface SimulatedDatastore {
  readonly name: string;
  readonly server: string;
  readonly path: string;
  readonly type: string;
  readonly hosts: number;
}

export interface Vcsim {
  readonly host: string;
  readonly port: number;
  /** SHA-256 of the simulator's certificate. */
  readonly thumbprint: string;
  /** Where it looks for datastores: a datastore `x` is the directory `x` in it. */
  readonly directory: string;
  machines(): Promise<readonly SimulatedMachine[]>;
  datastores(): Promise<readonly SimulatedDatastore[]>;
  /** Ends all sessions but its own; gives how many there were. */
  expireSessions(): Promise<number>;
  sessions(): Promise<number>;
  /** How often a method was called. */
  calls(method: string): Promise<number>;
  /** The next call of a method is refused. A task is made, and fails. */
  refuseNext(method: string, fault: string): Promise<void>;
  /** Nothing that is still to be refused is. */
  forgive(): Promise<void>;
  delay(method: string, ms: number): Promise<void>;
  /** VMware Tools run in all machines from now on. */
  runTools(): Promise<void>;
  /** No machine hears that it is to shut down from now on. */
  deafen(): Promise<void>;
  /** As when the host loses its power. */
  kill(): Promise<void>;
}

export async function startVcsim(model: 'esx' | 'vpx', cleanup: Cleanup): Promise<Vcsim> {
  const program = await buildVcsim();
  const directory = makeTempDir('vcsim', cleanup);
  const child = spawn(program, ['-model', model], { cwd: directory, stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, TMPDIR: directory } });
  let said = '';
  child.stderr.on('data', (chunk: Buffer) => { said = `${said}${chunk.toString()}`.slice(-4000); });
  child.stdin.on('error', () => {
    // It has ended: whoever waits for an answer is told so below.
  });
  const waiting: { readonly resolve: (answer: unknown) => void; readonly reject: (error: Error) => void }[] = [];
  const ended = new Promise<void>((resolve) => {
    child.on('error', (error) => { said += error.message; resolve(); });
    child.on('close', () => {
      for (const each of waiting.splice(0)) each.reject(new Error(`the simulator has ended: ${said}`));
      resolve();
    });
  });
  cleanup.add(async () => {
    child.stdin.end();
    child.kill('SIGKILL');
    await ended;
  });
  createInterface({ input: child.stdout }).on('line', (line) => waiting.shift()?.resolve(JSON.parse(line)));
  const next = async <T>(): Promise<T> => new Promise<unknown>((resolve, reject) => { waiting.push({ resolve, reject }); }) as Promise<T>;
  const ask = async <T>(command: Readonly<Record<string, unknown>>): Promise<T> => {
    const answer = next<T>();
    child.stdin.write(`${JSON.stringify(command)}\n`);
    return answer;
  };
  const first = await next<{ readonly host: string; readonly port: string; readonly thumbprint: string }>();
  return {
    host: first.host,
    port: Number(first.port),
    thumbprint: first.thumbprint,
    directory,
    machines: () => ask({ do: 'machines' }),
    datastores: () => ask({ do: 'datastores' }),
    expireSessions: () => ask({ do: 'expire' }),
    sessions: () => ask({ do: 'sessions' }),
    calls: (method) => ask({ do: 'calls', method }),
    refuseNext: (method, fault) => ask({ do: 'fault', method, fault }),
    forgive: () => ask({ do: 'forgive' }),
    delay: (method, ms) => ask({ do: 'delay', method, ms }),
    runTools: () => ask({ do: 'tools' }),
    deafen: () => ask({ do: 'deafen' }),
    async kill() {
      child.kill('SIGKILL');
      await ended;
    },
  };
}

/** Where the program lies; it is made when its source, or the compiler, is another one than before. */
async function buildVcsim(): Promise<string> {
  const source = readFileSync(SOURCE, 'utf8');
  const { stdout: version } = await mustRun('go', ['version']);
  const hash = createHash('sha256').update(source).update(version).digest('hex').slice(0, 16);
  const cache = cacheDirectory();
  const program = join(cache, `vcsim-${hash}`);
  if (existsSync(program)) return program;
  mkdirSync(cache, { recursive: true });
  // Made beside its place and renamed: two test files may build at the same time, and a broken one must not stay.
  const work = mkdtempSync(join(cache, 'vcsim-build-'));
  try {
    writeFileSync(join(work, 'main.go'), source);
    await mustRun('go', ['build', '-o', 'vcsim', 'main.go'], {
      cwd: work,
      timeoutMs: BUILD_TIMEOUT_MS,
      env: { GO111MODULE: 'off', GOPATH: '/usr/share/gocode', GOCACHE: join(work, 'go-cache'), CGO_ENABLED: '0' },
    });
    renameSync(join(work, 'vcsim'), program);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return program;
}
