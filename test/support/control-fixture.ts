/** A control server on a socket of its own, over a service in memory, with what it logged; and its end. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createControlClient, type ControlClient } from '../../daemon/control/client.js';
import { startControlServer, type ControlServer } from '../../daemon/control/server.js';
import { MemoryService, type MemoryServiceOptions } from './control-memory-service.js';

export interface LogLine {
  readonly level: 'debug' | 'info' | 'warn' | 'error';
  readonly fields: Readonly<Record<string, unknown>>;
  readonly message: string;
}

export interface Fixture {
  readonly directory: string;
  readonly socketPath: string;
  readonly service: MemoryService;
  readonly server: ControlServer;
  readonly client: ControlClient;
  readonly log: readonly LogLine[];
  readonly internalErrors: readonly unknown[];
  end(): Promise<void>;
}

export function makeDirectory(): { readonly path: string; remove(): void } {
  const path = mkdtempSync(join(tmpdir(), 'offshoot-control-'));
  return { path, remove: () => { rmSync(path, { recursive: true, force: true }); } };
}

export function recordingLogger(log: LogLine[]): Record<LogLine['level'], (fields: object, message: string) => void> {
  const at = (level: LogLine['level']) => (fields: object, message: string): void => { log.push({ level, fields: { ...fields }, message }); };
  return { debug: at('debug'), info: at('info'), warn: at('warn'), error: at('error') };
}

export async function startFixture(options: MemoryServiceOptions = {}): Promise<Fixture> {
  const directory = makeDirectory();
  const socketPath = join(directory.path, 'o.sock');
  const service = new MemoryService(options);
  const log: LogLine[] = [];
  const internalErrors: unknown[] = [];
  const server = await startControlServer({
    service, socketPath, version: '1.2.3', logger: recordingLogger(log), onInternalError: (error) => internalErrors.push(error),
  });
  return {
    directory: directory.path, socketPath, service, server, log, internalErrors,
    client: createControlClient({ socketPath }),
    end: async () => {
      await server.close();
      directory.remove();
    },
  };
}
