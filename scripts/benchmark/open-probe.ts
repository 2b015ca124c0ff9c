/**
 * How long a guest waits for an open, while the daemon does something large: a thread that opens and closes one file under the
 * mount again and again. An open goes to the server's main thread, so its longest wait is the longest time that thread did nothing else.
 */
import { Worker } from 'node:worker_threads';

/** Pause between two opens: the probe must not be a load of its own. */
const PAUSE_MS = 1;

const source = `
import { openSync, closeSync } from 'node:fs';
import { workerData } from 'node:worker_threads';
const words = new Float64Array(workerData.shared);
const flags = new Int32Array(new SharedArrayBuffer(4));
for (;;) {
  const begin = performance.now();
  closeSync(openSync(workerData.file, 'r'));
  words[0] = Math.max(words[0], performance.now() - begin);
  Atomics.wait(flags, 0, 0, ${PAUSE_MS});
}
`;

export interface OpenProbe {
  /** Runs `body`, and gives the longest wait of an open meanwhile, in milliseconds. */
  longestDuring(body: () => Promise<unknown>): Promise<number>;
  end(): Promise<void>;
}

/** `file` is under the mount. */
export function startOpenProbe(file: string): OpenProbe {
  const shared = new SharedArrayBuffer(8);
  const words = new Float64Array(shared);
  let failure: unknown = null;
  const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`), { workerData: { file, shared } });
  worker.on('error', (error) => { failure = error; });
  return {
    longestDuring: async (body) => {
      words[0] = 0;
      await body();
      if (failure !== null) throw new Error('the probe failed', { cause: failure });
      return words[0];
    },
    end: async () => { await worker.terminate(); },
  };
}
