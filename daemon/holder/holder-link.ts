/**
 * The server's end of the channel to its holder: says ready or failed, asks for the unmount, hears the wish to stop.
 *
 * Runs in the server's main thread. A server may outlive its holder (the holder was killed): it goes on serving, for the
 * connection lives as long as one of them, but nobody can restart it or unmount for it; `unmount` then fails with a
 * message that says so.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { readHolderMessage, type BuildIdentity, type ReportedError, type ServerMessage } from './ipc.js';

export interface HolderLink {
  /** The first message. On standby, resolves with the number of restarts when the holder says `go`. */
  hello(build: BuildIdentity): Promise<void>;
  go(): Promise<number>;
  /** Guests are answered. */
  serving(): Promise<void>;
  /** Resolves with the upgrade's number when the new build is loaded and fits; `handOver` follows. Rejects with the reason otherwise. */
  upgrade(entry: string): Promise<number>;
  /** Resolves when the message has left this process. */
  ready(): Promise<void>;
  failed(error: ReportedError): Promise<void>;
  /** Resolves when the mount is gone: commit, close, exit 0. Rejects with `in-use` when it is not: go on serving. */
  unmount(options: { readonly force: boolean }): Promise<void>;
  /** False once the holder is gone. */
  isConnected(): boolean;
}

export interface HolderLinkEvents {
  /** The holder was told to stop. */
  readonly shutdown: () => void;
  /** Another build's server is loaded: commit, close, and end with HAND_OVER_CODE. */
  readonly handOver: () => void;
  /** The holder is gone. */
  readonly lost: () => void;
  /** A message of a later holder, or of one that has lost its mind. */
  readonly unknown: (received: string) => void;
}

interface Waiter {
  readonly resolve: (value: number) => void;
  readonly reject: (error: OffshootError) => void;
}

const RECEIVED_CHARACTERS_MAX = 200;

export function connectToHolder(events: HolderLinkEvents): HolderLink {
  const waiters = new Map<number, Waiter>();
  let lastRequestId = 0;
  let went: (restarts: number) => void = () => undefined;
  const start = new Promise<number>((resolve) => { went = resolve; });

  const send = async (message: ServerMessage): Promise<void> => {
    const channel = process.send?.bind(process);
    if (channel === undefined || !process.connected) throw holderGone();
    await new Promise<void>((resolve, reject) => {
      channel(message, undefined, undefined, (error) => {
        if (error === null) resolve();
        else reject(holderGone(error));
      });
    });
  };

  process.on('message', (value: unknown) => {
    const message = readHolderMessage(value);
    switch (message?.type) {
      case undefined:
        events.unknown(JSON.stringify(value).slice(0, RECEIVED_CHARACTERS_MAX));
        return;
      case 'go':
        went(message.restarts);
        return;
      case 'ping':
        // A holder that went away meanwhile needs no answer.
        send({ type: 'pong' }).catch(() => undefined);
        return;
      case 'hand-over':
        events.handOver();
        return;
      case 'upgrade-accepted':
        waiters.get(message.requestId)?.resolve(message.upgradeId);
        waiters.delete(message.requestId);
        return;
      case 'upgrade-refused':
        waiters.get(message.requestId)?.reject(new OffshootError(message.error.kind, message.error.message));
        waiters.delete(message.requestId);
        return;
      case 'shutdown':
        events.shutdown();
        return;
      case 'unmounted':
        waiters.get(message.requestId)?.resolve(0);
        waiters.delete(message.requestId);
        return;
      case 'unmount-refused':
        waiters.get(message.requestId)?.reject(new OffshootError('in-use', message.message));
        waiters.delete(message.requestId);
    }
  });
  process.on('disconnect', () => {
    for (const waiter of waiters.values()) waiter.reject(holderGone());
    waiters.clear();
    events.lost();
  });

  const ask = async (makeMessage: (requestId: number) => ServerMessage): Promise<number> => {
    const requestId = ++lastRequestId;
    const answered = new Promise<number>((resolve, reject) => waiters.set(requestId, { resolve, reject }));
    try {
      const [, value] = await Promise.all([send(makeMessage(requestId)), answered]);
      return value;
    } finally {
      waiters.delete(requestId);
    }
  };

  return {
    hello: (build) => send({ type: 'hello', build }),
    go: () => start,
    serving: () => send({ type: 'serving' }),
    ready: () => send({ type: 'ready' }),
    failed: (error) => send({ type: 'failed', error }),
    unmount: async ({ force }) => { await ask((requestId) => ({ type: 'unmount', requestId, force })); },
    upgrade: async (entry) => await ask((requestId) => ({ type: 'upgrade', requestId, entry })),
    isConnected: () => process.connected,
  };
}

function holderGone(cause?: unknown): OffshootError {
  return new OffshootError(
    'daemon-not-running',
    'the holder of this mount is gone, so nobody can unmount for it: close the files in use, `umount` the mount by hand, and start the daemon again',
    {},
    cause,
  );
}
