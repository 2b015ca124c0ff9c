/**
 * The notifier's thread: writes each message that it is given to /dev/fuse, in order.
 *
 * It holds no lock, owns no state and answers nobody, so that it stops nothing else. The kernel says ENOENT for what it
 * has not cached, and ENODEV or ECONNABORTED when the mount is gone: nothing is left to invalidate in
 * either case. Any other failure is thrown, which ends the server. Each message that was written is answered, in order. A
 * message of null ends the thread.
 */
import { writeSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';

const EXPECTED_ERRORS: readonly unknown[] = ['ENOENT', 'ENODEV', 'ECONNABORTED', 'ENOTCONN'];

const { descriptor } = workerData as { readonly descriptor: number };
const port = parentPort;
if (port === null) throw new Error('notifier-thread is the entry of a worker thread');

port.on('message', (message: Uint8Array | null) => {
  if (message === null) {
    port.close();
    return;
  }
  notify(message);
  port.postMessage(null);
});

function notify(message: Uint8Array): void {
  try {
    writeSync(descriptor, message);
  } catch (thrown) {
    if (!EXPECTED_ERRORS.includes((thrown as { readonly code?: unknown }).code)) throw thrown;
  }
}
