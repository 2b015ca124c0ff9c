/**
 * `offshoot ls [CONTAINER]`: the containers, or what lies in one.
 */
import type { Command } from 'commander';
import { checkStorePath } from '../../daemon/control/paths.js';
import type { NodeInfo } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import type { CliIo } from '../io.js';
import { renderTable } from '../output.js';
import { formatBytes, formatTime } from '../sizes.js';

export function addListCommand(program: Command, io: CliIo): void {
  program.command('ls')
    .description('List the containers or, with a container or directory, what lies in it.')
    .summary('list containers, or what is in one')
    .usage('[CONTAINER[/PATH][@NAME]] [OPTIONS]')
    .argument('[container]', 'a container, or a directory in one; @NAME: as in that snapshot')
    .addHelpText('after', `
OWNED is what a disk holds itself, OPEN how often it is open now, FILL how its
fill is. Names are given as the other commands take them: CONTAINER/PATH.

Examples:
  offshoot ls
  offshoot ls vms
  offshoot ls vms@monday
  offshoot ls vms --json | jq -r '.[] | select(.openCount > 0) | .path'
`)
    .action(async (path: string | undefined, _options: unknown, command: Command) => { await list(contextOf(io, command), path); });
}

async function list(context: CliContext, path: string | undefined): Promise<void> {
  const found = await context.client().list(path === undefined ? null : checkStorePath(path));
  context.output.result(found, () => {
    if (found.length === 0) return [path === undefined ? 'no containers yet: offshoot container create NAME makes one' : `${path} is empty`];
    return renderTable(
      [{ header: 'NAME' }, { header: 'KIND' }, { header: 'SIZE', right: true }, { header: 'OWNED', right: true }, { header: 'OPEN', right: true }, { header: 'FILL' }, { header: 'MODIFIED' }],
      found.map((node) => row(node, path === undefined)),
      context.output.bold,
    );
  });
}

function row(node: NodeInfo, top: boolean): string[] {
  const data = node.kind === 'disk' || node.kind === 'file';
  return [
    node.kind === 'directory' ? `${node.path}/` : node.path,
    top && node.kind === 'directory' ? 'container' : node.kind,
    data ? formatBytes(node.sizeBytes) : '-',
    data ? formatBytes(node.ownedBytes) : '-',
    data ? String(node.openCount) : '-',
    node.fillState ?? '-',
    formatTime(node.modifiedAt),
  ];
}
