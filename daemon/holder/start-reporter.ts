/**
 * Tells whoever started the daemon how the start went: one JSON line on an inherited descriptor, then closed.
 *
 * Also the other way round: when that process goes away before the start is over (Ctrl-C), the start has nobody to be reported to, and
 * is given up, so that nothing is left half done. Runs in the holder.
 */
import { Socket } from 'node:net';

import type { StartReport } from './ipc.js';

export interface StartReporter {
  /** Resolves when the line has left this process, or nobody is there to read it. */
  report(report: StartReport): Promise<void>;
}

export function startReporter(fd: number | null, launcherGone: () => void): StartReporter {
  if (fd === null) return { report: () => Promise.resolve() };
  let isReported = false;
  const socket = new Socket({ fd, readable: true, writable: true });
  const gone = (): void => {
    if (!isReported) launcherGone();
    isReported = true;
  };
  // An error is followed by 'close', which is what counts.
  socket.on('error', () => undefined);
  socket.on('end', gone);
  socket.on('close', gone);
  socket.resume();
  return {
    report: (report) =>
      new Promise((settle) => {
        if (isReported) {
          settle();
          return;
        }
        isReported = true;
        socket.once('close', () => {
          settle();
        });
        socket.end(`${JSON.stringify(report)}\n`, () => {
          socket.destroy();
        });
      }),
  };
}
