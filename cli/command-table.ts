/**
 * The commands in the order in which help lists them, and where each is: a run loads the one that it is asked for and no other, for
 * reading all of them takes longer than most commands do.
 *
 * Only what commander itself would find may be left out by that: where the arguments do not begin with the name of a command (help, a
 * misspelt name, an unknown option), all are loaded, so that help and suggestions are whole.
 */
import type { Command } from 'commander';
import type { CliIo } from './io.js';

type AddCommand = (program: Command, io: CliIo) => void;

export interface CommandEntry {
  /** What the arguments begin with. A test holds them against what `load` adds. */
  readonly names: readonly string[];
  readonly load: () => Promise<AddCommand>;
}

export interface CommandGroup {
  readonly heading: string;
  readonly entries: readonly CommandEntry[];
}

export const commandGroups: readonly CommandGroup[] = [
  {
    heading: 'The daemon:',
    entries: [
      { names: ['daemon'], load: async () => (await import('./commands/daemon.js')).addDaemonCommands },
      { names: ['metrics'], load: async () => (await import('./commands/metrics.js')).addMetricsCommand },
    ],
  },
  {
    heading: 'Disks:',
    entries: [
      { names: ['container'], load: async () => (await import('./commands/container.js')).addContainerCommands },
      { names: ['import'], load: async () => (await import('./commands/import.js')).addImportCommand },
      { names: ['clone'], load: async () => (await import('./commands/clone.js')).addCloneCommand },
      { names: ['fill'], load: async () => (await import('./commands/fill.js')).addFillCommands },
      { names: ['snapshot'], load: loadSnapshotCommands },
      { names: ['flatten'], load: async () => (await import('./commands/flatten.js')).addFlattenCommand },
      { names: ['promote', 'rebase'], load: async () => (await import('./commands/promote.js')).addPromoteCommands },
    ],
  },
  {
    heading: 'Virtual machines:',
    entries: [
      { names: ['vm'], load: async () => (await import('./commands/vm.js')).addVmCommands },
      { names: ['stage', 'staged'], load: async () => (await import('./commands/vdisk.js')).addStageCommand },
      { names: ['deploy', 'deployed', 'decommission'], load: async () => (await import('./commands/vdisk.js')).addDeployCommands },
      { names: ['attach', 'detach', 'attached'], load: async () => (await import('./commands/vdisk.js')).addAttachCommands },
    ],
  },
  {
    heading: 'To other programs and hosts:',
    entries: [
      { names: ['present'], load: async () => (await import('./commands/present.js')).addPresentCommand },
      { names: ['withdraw'], load: async () => (await import('./commands/present.js')).addWithdrawCommand },
      { names: ['exports'], load: async () => (await import('./commands/present.js')).addExportsCommand },
      { names: ['discover'], load: async () => (await import('./commands/discover.js')).addDiscoverCommand },
    ],
  },
  {
    heading: 'To files and other hosts:',
    entries: [
      { names: ['export'], load: async () => (await import('./commands/export.js')).addExportCommand },
      { names: ['send'], load: async () => (await import('./commands/send.js')).addSendCommand },
      { names: ['receive'], load: async () => (await import('./commands/receive.js')).addReceiveCommand },
    ],
  },
  {
    heading: 'The store:',
    entries: [
      { names: ['ls'], load: async () => (await import('./commands/list.js')).addListCommand },
      { names: ['show'], load: async () => (await import('./commands/show.js')).addShowCommand },
      { names: ['df'], load: async () => (await import('./commands/df.js')).addSpaceCommand },
      { names: ['quota'], load: async () => (await import('./commands/quota.js')).addQuotaCommands },
      { names: ['rm'], load: async () => (await import('./commands/remove.js')).addRemoveCommand },
      { names: ['resize'], load: async () => (await import('./commands/resize.js')).addResizeCommand },
      { names: ['jobs'], load: async () => (await import('./commands/jobs.js')).addJobsCommand },
      { names: ['job'], load: async () => (await import('./commands/job.js')).addJobCommands },
      { names: ['check'], load: async () => (await import('./commands/check.js')).addCheckCommand },
      { names: ['scrub'], load: async () => (await import('./commands/scrub.js')).addScrubCommands },
    ],
  },
];

async function loadSnapshotCommands(): Promise<AddCommand> {
  const [{ addSnapshotCommands }, { addDiffCommand }] = await Promise.all([import('./commands/snapshot.js'), import('./commands/diff.js')]);
  return (program, io) => {
    addSnapshotCommands(program, io);
    addDiffCommand(program, io);
  };
}

/** Adds the command that the arguments ask for, or all of them when that cannot be told. */
export async function addCommands(program: Command, io: CliIo, args: readonly string[]): Promise<void> {
  const name = askedCommand(args);
  const isWanted = (entry: CommandEntry): boolean => name === null || entry.names.includes(name);
  const groups = await Promise.all(commandGroups.map(async ({ heading, entries }) => ({
    heading, adders: await Promise.all(entries.filter(isWanted).map(async (entry) => await entry.load())),
  })));
  for (const { heading, adders } of groups) {
    program.commandsGroup(heading);
    for (const add of adders) add(program, io);
  }
}

/** Global options may come before a command; anything else that does is commander's to judge. */
function askedCommand(args: readonly string[]): string | null {
  let at = 0;
  for (; at < args.length; at += 1) {
    const arg = args[at] ?? '';
    if (arg === '--socket') at += 1;
    else if (arg !== '--json' && !arg.startsWith('--socket=')) break;
  }
  const name = args[at];
  return name !== undefined && commandGroups.some(({ entries }) => entries.some(({ names }) => names.includes(name))) ? name : null;
}
