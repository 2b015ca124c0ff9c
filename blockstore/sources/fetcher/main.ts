/**
 * A fetcher: the process that reads one remote source, so that nobody else has to.
 *
 * A file on a network or FUSE file system may not answer for a minute or for ever, and a thread that waits for it cannot even be killed.
 * That thread is one of this process: it holds nothing that anybody needs, no mount, no lock, no descriptor of the store, and
 * nobody waits for its end. It opens the file for reading, makes sure that it is the file that was taken in, and serves it to the server
 * process by NBD over a socket pair. Raw bytes only, no format is ever guessed.
 *
 * Never zeros: a read that comes short, or behind which the file is found to be another (size, time of modification), is an error that
 * ends the process; the next one says at the door what changed. An error of the file system is the answer to that read alone.
 * The process dies with the server: by its parent-death signal, or when the socket closes.
 */
import fs from 'node:fs';
import net from 'node:net';

import { dieWithParent, exitNow } from '../../hot/door.js';
import { differenceOf, identityOf } from '../identity.js';
import { NbdError } from '../nbd.js';
import { serveNbd, type NbdExport } from './nbd-server.js';
import { FETCHER_SOCKET_FD, HEAD_BYTES, type FetcherOptions, type FetcherRefusal, type ProbeAnswer } from './options.js';

const options = JSON.parse(process.argv[2] ?? '') as FetcherOptions;
/** How often an open file is looked at although nobody reads. */
const LOOK_MS = 2000;

dieWithParent();
// It died before we asked for its signal.
if (process.ppid !== options.parentPid) exitNow(1);
process.on('uncaughtException', (error) => {
  process.stderr.write(`${error.stack ?? error.message}\n`);
  exitNow(1);
});

function refusal(kind: FetcherRefusal['kind'], message: string, code: string | null = null): Error {
  return new Error(JSON.stringify({ kind, message, code } satisfies FetcherRefusal));
}

/** The file, open; the refusal when it is not there, or not the one that it was. */
async function openSource(expected: NonNullable<FetcherOptions['expected']>): Promise<NbdExport> {
  let handle: fs.promises.FileHandle;
  try {
    handle = await fs.promises.open(options.file, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK | fs.constants.O_NOFOLLOW);
  } catch (thrown) {
    throw refusal('source-unreachable', (thrown as Error).message, (thrown as NodeJS.ErrnoException).code ?? null);
  }
  const difference = async (): Promise<string | null> => differenceOf(expected.identity, identityOf(await handle.stat({ bigint: true })), expected.scope);
  let changed: string | null;
  try {
    changed = await difference();
  } catch (thrown) {
    await handle.close();
    throw refusal('source-unreachable', (thrown as Error).message, (thrown as NodeJS.ErrnoException).code ?? null);
  }
  if (changed !== null) {
    await handle.close();
    throw refusal('source-changed', changed);
  }
  const look = setInterval(() => {
    difference().then((now) => { if (now !== null) exitNow(0); }, () => undefined);
  }, LOOK_MS);
  look.unref();
  return {
    sizeBytes: expected.identity.sizeBytes,
    async read(target, offsetBytes) {
      try {
        let done = 0;
        while (done < target.length) {
          const { bytesRead } = await handle.read(target, done, target.length - done, offsetBytes + done);
          if (bytesRead === 0) return NbdError.ESHUTDOWN;
          done += bytesRead;
        }
        // Looked at after the read: what was read before the file changed is right, whatever came later.
        return await difference() === null ? 0 : NbdError.ESHUTDOWN;
      } catch (thrown) {
        return isConnectionLost((thrown as NodeJS.ErrnoException).code) ? NbdError.ESHUTDOWN : NbdError.EIO;
      }
    },
  };
}

/** Errors after which this descriptor will not read again, and another open might. */
function isConnectionLost(code: string | undefined): boolean {
  return code === 'ENOTCONN' || code === 'ECONNABORTED' || code === 'ESTALE' || code === 'ENODEV' || code === 'EBADF';
}

async function probe(): Promise<ProbeAnswer> {
  try {
    const path = await fs.promises.realpath(options.file);
    const stat = await fs.promises.stat(path, { bigint: true });
    const identity = identityOf(stat);
    if (!stat.isFile()) return { ok: true, kind: stat.isDirectory() ? 'directory' : 'other', path, identity, headBase64: '' };
    const handle = await fs.promises.open(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK | fs.constants.O_NOFOLLOW);
    const head = Buffer.alloc(HEAD_BYTES);
    const { bytesRead } = await handle.read(head, 0, HEAD_BYTES, 0);
    await handle.close();
    return { ok: true, kind: 'file', path, identity, headBase64: head.subarray(0, bytesRead).toString('base64') };
  } catch (thrown) {
    return { ok: false, code: (thrown as NodeJS.ErrnoException).code ?? 'EIO', message: (thrown as Error).message };
  }
}

if (options.expected === null) {
  const answer = await probe();
  process.stdout.write(JSON.stringify(answer), () => { exitNow(0); });
} else {
  const { expected } = options;
  const socket = new net.Socket({ fd: FETCHER_SOCKET_FD });
  await serveNbd(socket, async () => openSource(expected)).catch(() => undefined);
  // Not an ordinary exit: that would wait for the threads that wait for the source.
  exitNow(0);
}
