/** Commands that are loaded one by one: the table says where each is, and leaving the others out is never seen. */
import { Command } from 'commander';
import { describe, expect, it } from 'vitest';

import { addCommands, commandGroups } from '../../cli/command-table.js';
import { createWorld, run } from '../support/cli-fixture.js';

const io = createWorld({ socketPath: '/nowhere' }).io;

async function commandsFor(args: readonly string[]): Promise<string[]> {
  const program = new Command();
  await addCommands(program, io, args);
  return program.commands.map((command) => command.name());
}

describe('the table of commands', () => {
  it('names what each entry adds', async () => {
    for (const entry of commandGroups.flatMap(({ entries }) => entries)) {
      const program = new Command();
      (await entry.load())(program, io);
      expect(program.commands.map((command) => command.name())).toEqual(entry.names);
      expect(program.commands.flatMap((command) => command.aliases())).toEqual([]);
    }
  });

  it('loads one command when the arguments begin with it, whatever global options come first', async () => {
    for (const args of [['ls'], ['ls', 'vms'], ['--json', 'ls'], ['--socket', 'show', 'ls'], ['--socket=/a/b', '--json', 'ls', 'clone'], ['ls', '--help']]) {
      expect(await commandsFor(args)).toEqual(['ls']);
    }
    expect(await commandsFor(['rebase', 'vms/a', 'vms/b'])).toEqual(['promote', 'rebase']);
  });

  it('loads all of them when that cannot be told', async () => {
    const all = commandGroups.flatMap(({ entries }) => entries.flatMap(({ names }) => names));
    for (const args of [[], ['--help'], ['help', 'ls'], ['lss'], ['--help', 'ls'], ['--sock', 'x', 'ls'], ['-V'], ['--', 'ls'], ['--socket'], ['vms/a.img']]) {
      expect(await commandsFor(args)).toEqual(all);
    }
  });

  it('still says which command was meant, and helps with each', async () => {
    const misspelt = await run(['snapsot', 'ls'], { socketPath: '/nowhere' });
    expect(misspelt.code).toBe(2);
    expect(misspelt.err).toContain('Did you mean snapshot?');
    const help = await run(['help', 'clone'], { socketPath: '/nowhere' });
    expect(help.code).toBe(0);
    expect(help.out).toContain('offshoot clone');
    const overview = await run(['--help'], { socketPath: '/nowhere' });
    for (const { heading, entries } of commandGroups) {
      expect(overview.out).toContain(heading);
      for (const name of entries.flatMap(({ names }) => names)) expect(overview.out).toMatch(new RegExp(`^  ${name}\\b`, 'mu'));
    }
  });
});
