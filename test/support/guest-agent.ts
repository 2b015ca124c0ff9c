/**
 * The QEMU guest agent's protocol: JSON objects, one a line, over the unix socket of a virtio-serial port.
 *
 * One request at a time. The port buffers what was sent before the agent ran, so a connection begins with a
 * `guest-sync` whose number no earlier answer carries, and drops everything up to its answer.
 */
import { connect, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';

const ANSWER_TIMEOUT_MS = 20_000;
const SYNC_TIMEOUT_MS = 2_000;
const POLL_MS = 50;

export interface GuestCommandResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface GuestAgent {
  /** Runs a shell command in the guest, as root, to its end. */
  run(shellCommand: string, timeoutMs?: number): Promise<GuestCommandResult>;
  /** Asks the guest's systemd to power off; whether an answer still comes is not known. */
  powerOff(): void;
  close(): void;
}

interface Answer {
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
}

interface ExecStatus {
  readonly exited: boolean;
  readonly exitcode?: number;
  readonly signal?: number;
  readonly 'out-data'?: string;
  readonly 'err-data'?: string;
}

/** Tries until the agent answers: it is started late in the guest's boot. */
export async function connectGuestAgent(socketPath: string, timeoutMs: number): Promise<GuestAgent> {
  const deadline = performance.now() + timeoutMs;
  const socket = await open(socketPath);
  const lines = createLineReader(socket);

  const ask = async (execute: string, parameters: object, timeout = ANSWER_TIMEOUT_MS): Promise<unknown> => {
    socket.write(`${JSON.stringify({ execute, arguments: parameters })}\n`);
    const answer = JSON.parse(await lines.next(timeout)) as Answer;
    if (answer.error !== undefined) throw new Error(`guest agent, ${execute}: ${answer.error.class}: ${answer.error.desc}`);
    return answer.return;
  };

  for (let id = Math.floor(Math.random() * 1e9); ; id += 1) {
    if (await synchronised(socket, lines, id)) break;
    if (performance.now() > deadline) {
      socket.destroy();
      throw new Error(`the guest agent did not answer within ${timeoutMs} ms`);
    }
  }

  return {
    async run(shellCommand, runTimeoutMs = 60_000) {
      const started = await ask('guest-exec', { path: '/bin/sh', arg: ['-c', shellCommand], 'capture-output': true }) as { readonly pid: number };
      const runDeadline = performance.now() + runTimeoutMs;
      for (;;) {
        const status = await ask('guest-exec-status', { pid: started.pid }) as ExecStatus;
        if (status.exited) {
          return { code: status.exitcode ?? 128 + (status.signal ?? 0), stdout: decode(status['out-data']), stderr: decode(status['err-data']) };
        }
        if (performance.now() > runDeadline) throw new Error(`in the guest, not done after ${runTimeoutMs} ms: ${shellCommand}`);
        await sleep(POLL_MS);
      }
    },
    powerOff() {
      // Not guest-shutdown: it runs shutdown(8), which needs logind and so D-Bus, and the guest has neither.
      socket.write(`${JSON.stringify({ execute: 'guest-exec', arguments: { path: '/bin/systemctl', arg: ['poweroff'] } })}\n`);
    },
    close() {
      socket.destroy();
    },
  };
}

function decode(base64: string | undefined): string {
  return Buffer.from(base64 ?? '', 'base64').toString();
}

async function open(socketPath: string): Promise<Socket> {
  return await new Promise((resolve, reject) => {
    const socket = connect(socketPath);
    socket.once('connect', () => { resolve(socket); });
    socket.once('error', reject);
  });
}

async function synchronised(socket: Socket, lines: LineReader, id: number): Promise<boolean> {
  socket.write(`${JSON.stringify({ execute: 'guest-sync', arguments: { id } })}\n`);
  try {
    for (;;) {
      const answer = JSON.parse(await lines.next(SYNC_TIMEOUT_MS)) as Answer;
      if (answer.return === id) return true;
    }
  } catch {
    // No answer yet, or a line that was cut: ask again.
    return false;
  }
}

interface LineReader {
  next(timeoutMs: number): Promise<string>;
}

function createLineReader(socket: Socket): LineReader {
  const lines: string[] = [];
  let rest = '';
  let wake: (() => void) | null = null;
  let ended: Error | null = null;
  const end = (error: Error): void => {
    ended ??= error;
    wake?.();
  };
  socket.setEncoding('utf8');
  socket.on('data', (chunk: string) => {
    const parts = (rest + chunk).split('\n');
    rest = parts.pop() ?? '';
    lines.push(...parts.filter((line) => line.trim() !== ''));
    wake?.();
  });
  socket.on('error', end);
  socket.on('close', () => { end(new Error('the guest agent has hung up')); });
  return {
    async next(timeoutMs) {
      const deadline = performance.now() + timeoutMs;
      for (;;) {
        const line = lines.shift();
        if (line !== undefined) return line;
        if (ended !== null) throw ended;
        const leftMs = deadline - performance.now();
        if (leftMs <= 0) throw new Error(`no answer from the guest agent within ${timeoutMs} ms`);
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, leftMs);
          wake = () => {
            clearTimeout(timer);
            resolve();
          };
        });
        wake = null;
      }
    },
  };
}
