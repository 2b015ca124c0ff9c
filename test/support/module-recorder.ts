/**
 * Which modules the processes of a daemon load, and before what: written down by the processes themselves.
 *
 * Every Node.js process that is started with the environment given here notes each module of its own main thread as it is loaded, and each
 * message that it sends to its parent, one line each, in one file, in the order in which they happen. Times are not recorded:
 * what a process loads before it says `ready` is the same on a busy machine.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

export interface ModuleRecorder {
  readonly environment: Readonly<Record<string, string>>;
  /** The processes so far, in the order of their first lines. */
  processes(): RecordedProcess[];
}

export interface RecordedProcess {
  readonly pid: number;
  /** The program's file, from the top of the checkout: `dist/server/main.js`. */
  readonly entry: string;
  /** From the top of the checkout; `after` names the messages that had been sent by then. */
  readonly modules: readonly { readonly path: string; readonly after: readonly string[] }[];
}

const HOOKS = `
import { appendFileSync } from 'node:fs';
let note;
export function initialize(data) { note = (what) => { appendFileSync(data.file, JSON.stringify({ ...data.process, ...what }) + '\\n'); }; }
export async function load(url, context, next) {
  if (url.startsWith('file:')) note({ module: url });
  return await next(url, context);
}
`;

const RECORDER = `
import { appendFileSync } from 'node:fs';
import Module, { register } from 'node:module';
import { pathToFileURL } from 'node:url';
import { isMainThread } from 'node:worker_threads';
if (isMainThread) {
  const file = process.env['OFFSHOOT_TEST_MODULES'];
  const about = { pid: process.pid, entry: process.argv[1] ?? '' };
  const note = (what) => { appendFileSync(file, JSON.stringify({ ...about, ...what }) + '\\n'); };
  register('./hooks.mjs', import.meta.url, { data: { file, process: about } });
  // What is required, and by whatever was imported and is CommonJS, goes past the hooks.
  const load = Module._extensions['.js'];
  Module._extensions['.js'] = function (module, filename) { note({ module: pathToFileURL(filename).href }); load(module, filename); };
  const send = process.send?.bind(process);
  if (send !== undefined) process.send = (message, ...rest) => { note({ sent: String(message?.type) }); return send(message, ...rest); };
}
`;

interface Line {
  readonly pid: number;
  readonly entry: string;
  readonly module?: string;
  readonly sent?: string;
}

/** `top`: the checkout whose modules are named by their paths in it. */
export function recordModules(directory: string, top: string): ModuleRecorder {
  const file = join(directory, 'modules.jsonl');
  const program = join(directory, 'recorder.mjs');
  writeFileSync(join(directory, 'hooks.mjs'), HOOKS);
  writeFileSync(program, RECORDER);
  const prefix = `${pathToFileURL(top).href}/`;
  return {
    environment: { OFFSHOOT_TEST_MODULES: file, NODE_OPTIONS: `--import ${pathToFileURL(program).href}` },
    processes: () => {
      const found = new Map<number, { entry: string; sent: string[]; modules: Map<string, readonly string[]> }>();
      for (const text of existsSync(file) ? readFileSync(file, 'utf8').split('\n') : []) {
        if (text === '') continue;
        const { pid, entry, module, sent } = JSON.parse(text) as Line;
        const known = found.get(pid) ?? { entry: pathToFileURL(entry).href.replace(prefix, ''), sent: [], modules: new Map<string, readonly string[]>() };
        found.set(pid, known);
        if (sent !== undefined) known.sent.push(sent);
        const path = module?.replace(prefix, '');
        if (path !== undefined && !known.modules.has(path)) known.modules.set(path, [...known.sent]);
      }
      return [...found].map(([pid, { entry, modules }]) => ({ pid, entry, modules: [...modules].map(([path, after]) => ({ path, after })) }));
    },
  };
}
