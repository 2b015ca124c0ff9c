/**
 * Where systemd runs the host: each machine and each export program in a scope of its own, so that it is no part of the service that started it.
 *
 * systemd ends what is left in a service's control group at a stop, and before it starts the service again. For our servers that is wanted
 * (`KillMode=mixed`: no old one lives beside the next holder), for what outlives them it must not be. systemd-run(1) makes the scope, and then becomes what it
 * was given, so that the process that we started is the machine, also for whoever has to end it. It does that as root, so the machine's user comes in with
 * setpriv(1), before QEMU's first instruction all the same. A machine's scope lies where those of libvirt lie, with its own accounting and limits (`systemctl status`,
 * `systemctl set-property`), and ends before our service when the host goes down. Limits of resources, the bounding set of capabilities
 * and NoNewPrivileges are those of the service still: a process inherits them wherever it is.
 */
import { randomBytes } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';

import type { Command } from './launch.js';

export interface Scope {
  readonly slice: string;
  /** What makes its unit's name, with something that was never there. */
  readonly id: string;
  readonly description: string;
}

/** There if and only if systemd is the host's first process: sd_booted(3). */
const BOOTED_BY_SYSTEMD = '/run/systemd/system';
const SYSTEMD_RUN = 'systemd-run';

/** What exports lie in with what else serves. */
export const EXPORTS_SLICE = 'system.slice';

/** The program that makes scopes on this host, and may for us; null when there is none. */
export function scopeProgram(): string | null {
  return existsSync(BOOTED_BY_SYSTEMD) && process.geteuid?.() === 0 ? SYSTEMD_RUN : null;
}

export function inScope(scopes: string, { program, arguments: args, user }: Command, { slice, id, description }: Scope, service = ownService()): Command {
  // Never the same name twice: an ended scope may be there for a moment.
  const unit = `offshoot-${id}-${randomBytes(4).toString('hex')}.scope`;
  const asUser = user === undefined ? [] : ['setpriv', `--reuid=${user.uid}`, `--regid=${user.gid}`, '--clear-groups', '--'];
  return {
    program: scopes,
    arguments: [
      '--scope', '--quiet', '--collect', `--slice=${slice}`, `--unit=${unit}`, `--description=${description}`,
      ...(service === null ? [] : [`--property=After=${service}`]), '--', ...asUser, program, ...args,
    ],
  };
}

export function machineScope({ name, uuid }: { readonly name: string; readonly uuid: string }): Scope {
  return { slice: 'machine.slice', id: uuid, description: `Machine ${name} of Offshoot` };
}

/** The service that we are part of; null when we are part of none. */
export function ownService(controlGroups = readOrEmpty('/proc/self/cgroup')): string | null {
  return /^0::\/(?:.*\/)?([A-Za-z0-9:_.@\\-]+\.service)(?:\/.*)?$/mu.exec(controlGroups)?.[1] ?? null;
}

function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    // A kernel without control groups.
    return '';
  }
}
