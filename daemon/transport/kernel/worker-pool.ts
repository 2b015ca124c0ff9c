/**
 * The main thread's side of the I/O workers: starts them, tells them of disks, takes what they hand on.
 *
 * Crash-only: a worker that ends while the mount lives ends the server. News of a disk is in every worker's port, and the
 * generation word is moved on, before the caller goes on to answer the OPEN that made it.
 */
import fs from 'node:fs';
import { MessageChannel, Worker, receiveMessageOnPort, type MessagePort } from 'node:worker_threads';

import type { DiskHandles } from '../../../blockstore/hot/block-map.js';
import type { SharedState } from '../../../blockstore/hot/shared-state.js';
import type { ThreadBoot } from '../../../blockstore/hot/thread-context.js';
import type { DiskAnnouncer } from '../../../blockstore/open-disks.js';
import type { IoWorkerData, WorkerMessage, WorkerNews } from './io-worker.js';

export interface WorkerPoolOptions {
  readonly fuseFd: number;
  readonly boots: readonly ThreadBoot[];
  /** The main thread's view of the shared memory. */
  readonly shared: SharedState;
  /** A whole request that a worker does not answer. */
  readonly onRequest: (message: Uint8Array) => void;
  /** A write that must be durable before its reply is sent. */
  readonly onFlushReply: (nodeId: number, reply: Uint8Array) => void;
  readonly onCommitWanted: () => void;
  /** The mount is gone (each worker says so). */
  readonly onUnmounted: (errno: number) => void;
  readonly onFatal: (error: Error) => void;
}

/** Disks that were opened before the workers were there are told to them when they start. */
export class WorkerPool implements DiskAnnouncer {
  private readonly ports: MessagePort[] = [];
  private readonly known = new Map<number, DiskHandles>();
  private shared: SharedState | null = null;
  private readonly prepared: Worker[] = [];
  private isUnmounted = false;

  /** Starts threads that load themselves and wait: while the rest of the server is loaded, so that guests need not wait for that later. */
  prepare(count: number): void {
    for (let i = 0; i < count; i += 1) this.prepared.push(startThread(i + 1));
  }

  /** Starts the workers; from here on requests are answered. */
  start(options: WorkerPoolOptions): void {
    this.shared = options.shared;
    for (const boot of options.boots) this.startOne(options, boot);
    for (const handles of this.known.values()) this.tell({ type: 'opened', handles });
  }

  opened(handles: DiskHandles): void {
    this.known.set(handles.nodeId, handles);
    this.tell({ type: 'opened', handles });
  }

  closed(nodeId: number, serial: number): void {
    if (this.known.get(nodeId)?.serial === serial) this.known.delete(nodeId);
    this.tell({ type: 'closed', nodeId, serial });
  }

  private tell(news: WorkerNews): void {
    if (this.ports.length === 0) return;
    for (const port of this.ports) port.postMessage(news);
    this.shared?.bumpGeneration();
  }

  private startOne(options: WorkerPoolOptions, boot: ThreadBoot): void {
    const { port1, port2 } = new MessageChannel();
    const data: IoWorkerData = { boot, fuseFd: options.fuseFd, port: port2, directFlag: fs.constants.O_DIRECT };
    const worker = this.prepared.shift() ?? startThread(boot.thread);
    worker.postMessage(data, [port2]);
    port1.on('message', (message: WorkerMessage) => { this.take(options, message); });
    worker.on('error', (error: unknown) => { options.onFatal(error instanceof Error ? error : new Error(String(error))); });
    worker.on('exit', (code) => {
      // The news of its end may arrive before its last message does.
      for (let last = receiveMessageOnPort(port1); last !== undefined; last = receiveMessageOnPort(port1)) this.take(options, last.message as WorkerMessage);
      if (!this.isUnmounted) options.onFatal(new Error(`I/O worker ${boot.thread} ended with code ${code}`));
    });
    this.ports.push(port1);
  }

  private take(options: WorkerPoolOptions, message: WorkerMessage): void {
    switch (message.type) {
      case 'request': options.onRequest(message.message); return;
      case 'flush-reply': options.onFlushReply(message.nodeId, message.reply); return;
      case 'commit-wanted': options.onCommitWanted(); return;
      case 'ended':
        this.isUnmounted = true;
        options.onUnmounted(message.errno);
    }
  }
}

function startThread(number: number): Worker {
  return new Worker(new URL('./io-worker.js', import.meta.url), { name: `io-${number}` });
}
