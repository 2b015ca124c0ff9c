/**
 * Put into a daemon by `NODE_OPTIONS=--import`: notes each program that works on block devices, in `programs` of the directory OFFSHOOT_TEST_PROGRAMS, and
 * does there what the file `order` says of the nth of them: the server is killed when the program has ended, before it is told so; or the program is another
 * one, which fails. What loop devices there are when one begins is noted in `devices`, as the kernel's own files say it.
 */
import childProcess from 'node:child_process';
import { appendFileSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { join } from 'node:path';

import type { ProgramOrder } from './vdisk-programs.js';

const directory = process.env['OFFSHOOT_TEST_PROGRAMS'] ?? '';
const original = childProcess.spawn;
let seen = 0;
/** Of the order that is counted for. */
let orderId = '';

function ordered(): ProgramOrder | null {
  try {
    const order = JSON.parse(readFileSync(join(directory, 'order'), 'utf8')) as ProgramOrder;
    if (order.id !== orderId) seen = 0;
    orderId = order.id;
    seen += 1;
    return order;
  } catch {
    seen = 0;
    return null;
  }
}

/** `losetup attach`, `mount`, and so on; null: it only looks. */
function nameOf(program: string, args: readonly string[]): string | null {
  const words = program === 'setpriv' ? args.slice(args.indexOf('--') + 1) : [program, ...args];
  if (words[0] === 'losetup') return words.includes('--detach') ? 'losetup detach' : words.includes('--find') ? 'losetup attach' : null;
  return ['sfdisk', 'mkfs.ext4', 'mkfs.xfs', 'mount', 'umount', 'rmdir', 'cp', 'mkdir', 'install', 'sync', 'flock'].includes(words[0] ?? '') ? words[0] ?? null : null;
}

/** Only reads what the kernel says, and no name of the mount. */
function noteDevices(name: string): void {
  for (const device of readdirSync('/sys/block').filter((each) => each.startsWith('loop'))) {
    try {
      const said = (what: string): string => readFileSync(`/sys/block/${device}/loop/${what}`, 'utf8').trim();
      appendFileSync(join(directory, 'devices'), `${JSON.stringify({ program: name, file: said('backing_file'), directIo: said('dio') === '1' })}\n`);
    } catch {
      // It shows nothing.
    }
  }
}

type Spawn = (program: string, args: readonly string[], options: childProcess.SpawnOptions) => childProcess.ChildProcess;

const spawn: Spawn = (program, args, options) => {
  const name = Array.isArray(args) ? nameOf(program, args) : null;
  if (name === null || name === 'flock') return (original as Spawn)(program, args, options);
  const order = ordered();
  appendFileSync(join(directory, 'programs'), `${name}\n`);
  noteDevices(name);
  if (order?.at !== seen) return (original as Spawn)(program, args, options);
  rmSync(join(directory, 'order'));
  if (order.what === 'fail') return (original as Spawn)('sh', ['-c', `echo '${name} was told to fail' >&2; exit 1`], options);
  const child = (original as Spawn)(program, args, options);
  child.on('exit', () => { process.kill(process.pid, 'SIGKILL'); });
  return child;
};
childProcess.spawn = spawn as typeof childProcess.spawn;
syncBuiltinESMExports();
