/**
 * The control API on its unix sockets: what listens (`listener.ts`) and what answers (`http-app.ts`), put together.
 *
 * Runs on the main thread of the server process. Requests that came before there was an answerer are answered first. `close` stops
 * listening at once, lets calls that are being answered end (for a while), then closes what is left.
 */
import { createHttpApp, type ControlLogger } from './http-app.js';
import { listenForControl, type ControlListener, type ListenerOptions } from './listener.js';
import type { ControlService } from './service.js';

export interface ControlServerOptions extends ListenerOptions {
  readonly service: ControlService;
  readonly version: string;
  readonly logger: ControlLogger;
  /** A programmer error was met (and answered): the owner ends the process. */
  readonly onInternalError: (error: unknown) => void;
}

export interface ControlServer {
  readonly socketPath: string;
  /** Safe to call more than once. */
  close(): Promise<void>;
}

/** `given`: what listens already, for whoever could not wait for this to be loaded. */
export async function startControlServer(options: ControlServerOptions, given?: ControlListener): Promise<ControlServer> {
  const listener = given ?? await listenForControl(options);
  const app = await answering(options, listener);
  const close = async (): Promise<void> => {
    await listener.withdraw();
    await app.close();
    await listener.close();
  };
  let closing: Promise<void> | undefined;
  return {
    socketPath: options.socketPath,
    close: async () => { await (closing ??= close()); },
  };
}

async function answering(options: ControlServerOptions, listener: ControlListener): Promise<{ close(): Promise<unknown> }> {
  try {
    return await createHttpApp({
      version: options.version,
      logger: options.logger,
      dispatch: (route, input, caller) => route.handle(options.service, input, caller),
      metricsText: () => options.service.metricsText(),
      onInternalError: options.onInternalError,
      callerOf: listener.callerOf,
      listener,
    });
  } catch (error) {
    await listener.withdraw();
    await listener.close();
    throw error;
  }
}
