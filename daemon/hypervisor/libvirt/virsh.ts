/**
 * virsh, one command at a time, and what its errors mean.
 *
 * Only commands that give one value, or nothing, are used; tables are never taken apart. Texts are those of the C locale. What cannot be
 * told by its words is passed on as it was said.
 */
import { OffshootError, type ErrorKind } from '../../../blockstore/errors.js';
import { runChild } from '../../programs/child.js';

export interface VirshOptions {
  readonly program: string;
  readonly uri: string;
}

export interface VirshCall {
  readonly signal: AbortSignal;
  readonly timeoutMs: number;
  readonly input?: string;
}

/** In the order in which they are looked for. */
const ERRORS: readonly (readonly [RegExp, ErrorKind])[] = [
  [/already exists with uuid|is already defined with uuid|already exists/iu, 'already-exists'],
  [/Domain not found|failed to get domain|no domain with matching|Storage pool not found|failed to get pool/iu, 'not-found'],
  // Before the connection's: an agent that is gone is not a hypervisor that is gone.
  [/guest agent is not (?:configured|supported)|QEMU guest agent is not configured|No QEMU guest agent|CommandNotFound|The command \S+ has not been found/iu, 'not-supported'],
  [/guest agent is not (?:responding|connected|available)|Timed out during operation|agent.*(?:timed out|timeout)/iu, 'timed-out'],
  [/failed to connect to the hypervisor|Failed to connect socket|Cannot recv data|Connection refused|Connection reset|End of file while reading|client socket is closed|unable to connect to server|no connection driver available/iu, 'source-unreachable'],
  [/authentication (?:failed|unavailable|cancelled)|access denied|polkit/iu, 'permission-denied'],
  [/domain is (?:already active|already running)|already active/iu, 'in-use'],
  [/domain is not running|domain is not active|storage pool .* is not active/iu, 'conflict'],
  [/Failed to get ".*" lock|Cannot acquire state change lock|is locked/iu, 'in-use'],
  [/Permission denied/iu, 'permission-denied'],
  [/No space left on device|Cannot allocate memory|cannot set up guest memory/iu, 'no-space'],
  [/XML error|XML document|\(domain_definition\)|unsupported configuration|Parse|unknown OS type|invalid argument|no emulator/iu, 'invalid-argument'],
  [/No such file or directory/iu, 'not-found'],
  [/not supported|unsupported/iu, 'not-supported'],
];

/** Its standard output without the line end. Throws what virsh says, as an error of ours. */
export async function virsh({ program, uri }: VirshOptions, args: readonly string[], { signal, timeoutMs, input }: VirshCall): Promise<string> {
  const { code, endedBy, stdout, stderr } = await runChild(program, ['-q', '-c', uri, ...args], { signal, timeoutMs, ...(input === undefined ? {} : { input }) });
  if (code === 0) return stdout.replace(/\n+$/u, '');
  throw virshError(args[0] ?? '', uri, endedBy === null ? stderr : `virsh ended by ${endedBy}`);
}

export function virshError(command: string, uri: string, stderr: string): OffshootError {
  const said = stderr.split('\n').map((line) => line.replace(/^error: /u, '').trim()).filter((line) => line !== '').join('; ').slice(0, 2000);
  const kind = ERRORS.find(([words]) => words.test(said))?.[1] ?? 'io-error';
  const advice = kind === 'source-unreachable' ? `; is libvirtd running, and ${uri} its address?` : '';
  return new OffshootError(kind, `libvirt: ${command}: ${said === '' ? 'failed, and does not say why' : said}${advice}`, { command, uri });
}
