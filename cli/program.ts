/**
 * The command line as a commander program: global options, help, and how a run ends. The commands are in `command-table.ts`.
 *
 * `runCli` is the whole of it: arguments in, exit code out. It never ends the process itself. Commander's own errors are
 * wrong usage: exit code 2, and with --json one object like every other error.
 */
import { Command, CommanderError, Option, type Argument } from 'commander';
import { OffshootError } from '../blockstore/errors.js';
import { DEFAULT_SOCKET_PATH } from '../daemon/control/limits.js';
import { visible } from '../daemon/control/paths.js';
import { offshootVersion } from '../daemon/control/version.js';
import { addCommands } from './command-table.js';
import { exitCodeTable, reportError } from './errors.js';
import type { CliIo } from './io.js';

/** Help is this wide where there is no terminal. */
const HELP_COLUMNS = 100;

export async function runCli(args: readonly string[], io: CliIo): Promise<number> {
  const json = asksForJson(args);
  try {
    const program = await createProgram(io, args, json);
    await program.parseAsync([...args], { from: 'user' });
    return 0;
  } catch (error) {
    if (!(error instanceof CommanderError)) return reportError(io, json, error);
    if (error.exitCode === 0) return 0;
    // Commander has told people already; programs are told here.
    if (json) return reportError(io, true, new OffshootError('invalid-argument', usageMessage(error), { usage: error.code }, error));
    return 2;
  }
}

/** Known before the arguments are parsed, because errors of the parse must be JSON too. */
function asksForJson(args: readonly string[]): boolean {
  const end = args.indexOf('--');
  return args.slice(0, end < 0 ? args.length : end).includes('--json');
}

function usageMessage(error: CommanderError): string {
  if (error.code === 'commander.help') return 'a command is missing: offshoot --help lists them';
  return `${inOurWords(error.message).replace(/^error: /u, '').replace(/\.$/u, '')}: offshoot --help shows the usage`;
}

/** What commander says of values that its parsers refuse, without its own terms. */
function inOurWords(text: string): string {
  return text
    .replace(/^error: command-argument value '(.*)' is invalid for argument '(.*)'\. It must/u, "error: '$1' cannot be the argument '$2': it must")
    .replace(/^error: option '(--[\w-]+)[^']*' argument '(.*)' is invalid\. (?:It must|Allowed choices are)/u, (whole, option: string, value: string) =>
      `error: ${option} cannot be '${value}': ${whole.endsWith('It must') ? 'it must' : 'it must be one of'}`);
}

export async function createProgram(io: CliIo, args: readonly string[], json: boolean): Promise<Command> {
  const program = new Command('offshoot');
  program
    .description('Instant clone disks: whole, writable virtual disks in milliseconds, under a mount.')
    .usage('COMMAND [OPTIONS]')
    .version(offshootVersion(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print this help')
    .addOption(new Option('--json', 'print one JSON object or array and nothing else'))
    .addOption(new Option('--socket <path>', `control socket of the daemon (default: $OFFSHOOT_SOCKET, or ${DEFAULT_SOCKET_PATH})`))
    .configureHelp({ showGlobalOptions: true, subcommandTerm, optionDescription })
    .configureOutput({
      writeOut: (text) => { io.stdout.write(text); },
      writeErr: (text) => { if (!json) io.stderr.write(text); },
      outputError: (text, write) => { write(inOurWords(text).replace(/^error: /u, 'offshoot: ').split('\n').map(visible).join('\n')); },
      getOutHelpWidth: () => io.stdout.columns ?? HELP_COLUMNS,
      getErrHelpWidth: () => io.stderr.columns ?? HELP_COLUMNS,
      getOutHasColors: () => false,
      getErrHasColors: () => false,
    })
    .exitOverride()
    .addHelpText('after', programHelp());
  await addCommands(program, io, args);
  addHelpCommand(program);
  addUsageHint(program);
  return program;
}

/** commander's own looks at the first word alone. */
function addHelpCommand(program: Command): void {
  program.helpCommand(false);
  program.command('help').argument('[command...]').description('print the help of a command').usage('[COMMAND...]').helpGroup('Help:').action((words: readonly string[]) => {
    let found = program;
    for (const word of words) {
      const next = found.commands.find((command) => command.name() === word);
      if (next === undefined) found.error(`error: unknown command '${word}'`, { code: 'commander.unknownCommand' });
      else found = next;
    }
    found.help();
  });
}

/** A wrong option or argument ends with where to look, for the command that was meant. */
function addUsageHint(command: Command, path = 'offshoot'): void {
  command.showHelpAfterError(`(${path} --help shows the usage)`);
  for (const child of command.commands) addUsageHint(child, `${path} ${child.name()}`);
}

/** `daemon start|status|stop`, `clone <source> <target...>`: groups show what is in them. */
function subcommandTerm(command: Command): string {
  if (command.commands.length > 0) return `${command.name()} ${command.commands.map((child) => child.name()).join('|')}`;
  return [command.name(), ...command.registeredArguments.map(argumentTerm)].join(' ');
}

function argumentTerm(argument: Argument): string {
  const name = `${argument.name()}${argument.variadic ? '...' : ''}`;
  return argument.required ? `<${name}>` : `[${name}]`;
}

/** The choices of an option are written out in its own words. */
function optionDescription(option: Option): string {
  const given: unknown = option.defaultValueDescription ?? option.defaultValue;
  return typeof given === 'string' || typeof given === 'number' ? `${option.description} (default: ${given})` : option.description;
}

function programHelp(): string {
  const codes = exitCodeTable.map(([code, meaning]) => `  ${String(code).padStart(3)}  ${meaning}`);
  return `
Paths in the store are written CONTAINER/PATH: what is seen as MOUNT/vms/a.img
is called vms/a.img. Where a help says CONTAINER[/PATH][@NAME], @NAME means as it
was in that snapshot of the container: vms@monday, vms/a.img@monday.
Sizes are bytes, or take K, M, G, T for powers of 1024: 10G, 512M, 1.5T. Every
command has its own help, with examples.

A first disk:
  offshoot daemon start --store /srv/offshoot --mount /mnt/offshoot
  offshoot container create vms
  offshoot import debian.qcow2 vms/debian.img --format qcow2
  offshoot clone vms/debian.img vms/vm{001..100}.img

With --json the result is one JSON object or array on standard output. An error
is one JSON line on standard error, {"error": {"kind": ..., "message": ...,
"exitCode": ..., "hint": ..., "context": ...}}, and standard output stays empty.

Exit codes:
${codes.join('\n')}
`;
}
