/**
 * The options of `daemon start` that say who may use the daemon and when free space is little, as the policy that the
 * daemon is given. Groups are looked up here, where somebody reads the error.
 */
import { InvalidArgumentError, Option, type Command } from 'commander';
import { groupId } from '../daemon/control/groups.js';
import { DEFAULT_POLICY, type DaemonPolicy, type SpaceThreshold } from '../daemon/control/policy.js';
import { OffshootError } from '../blockstore/errors.js';
import { parseSize } from './sizes.js';

export interface PolicyOptions {
  readonly group?: string;
  readonly readOnlyGroup?: string;
  readonly spaceWarning?: SpaceThreshold;
  readonly spaceCritical?: SpaceThreshold;
}

export function addPolicyOptions(command: Command): Command {
  const threshold = (flag: string, what: string, preset: SpaceThreshold): Option =>
    new Option(`${flag} <free>`, `${what} when less than this is free in the store: a size, or a percentage (default: ${shown(preset)})`).argParser(parseThreshold);
  return command
    .addOption(new Option('--group <name>', 'a group whose members may use the control socket as root does (they can become root); name or number'))
    .addOption(new Option('--read-only-group <name>', 'a group whose members may look at everything and change nothing; name or number'))
    .addOption(threshold('--space-warning', 'warn', DEFAULT_POLICY.spaceWarning))
    .addOption(threshold('--space-critical', 'warn urgently', DEFAULT_POLICY.spaceCritical));
}

/** Nothing when no option was given: the daemon has the same defaults. */
export function policyFrom(options: PolicyOptions): { readonly policy?: DaemonPolicy } {
  const { group, readOnlyGroup, spaceWarning, spaceCritical } = options;
  if (group === undefined && readOnlyGroup === undefined && spaceWarning === undefined && spaceCritical === undefined) return {};
  const policy = {
    adminGid: group === undefined ? null : groupId(group),
    readOnlyGid: readOnlyGroup === undefined ? null : groupId(readOnlyGroup),
    spaceWarning: spaceWarning ?? DEFAULT_POLICY.spaceWarning,
    spaceCritical: spaceCritical ?? DEFAULT_POLICY.spaceCritical,
  };
  if (policy.adminGid !== null && policy.adminGid === policy.readOnlyGid) {
    throw new OffshootError('invalid-argument', '--group and --read-only-group name the same group: its members could do everything; leave one of them out');
  }
  return { policy };
}

function parseThreshold(text: string): SpaceThreshold {
  const percent = /^([0-9]+(?:\.[0-9]+)?)\s*%$/u.exec(text)?.[1];
  if (percent === undefined) return { unit: 'bytes', value: parseSize(text) };
  const value = Number(percent);
  if (value > 100) throw new InvalidArgumentError('It must be at most 100 %.');
  return { unit: 'percent', value };
}

function shown({ unit, value }: SpaceThreshold): string {
  return unit === 'percent' ? `${value}%` : String(value);
}
