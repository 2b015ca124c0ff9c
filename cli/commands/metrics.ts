/**
 * `offshoot metrics`: the daemon's figures, in the text format that Prometheus and its kin read.
 */
import type { Command } from 'commander';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';

export function addMetricsCommand(program: Command, io: CliIo): void {
  program.command('metrics')
    .description('Print the daemon\'s figures in the text format of Prometheus: room, disks, restarts, commits, journals, requests that wait.')
    .summary('print the daemon\'s figures for Prometheus')
    .usage('[OPTIONS]')
    .addHelpText('after', `
The socket serves the same at /metrics. For node_exporter, whose textfile collector
reads a directory, from a timer:
  offshoot metrics > /var/lib/node_exporter/offshoot.prom.new &&
    mv /var/lib/node_exporter/offshoot.prom.new /var/lib/node_exporter/offshoot.prom

Examples:
  offshoot metrics | grep store_
  offshoot metrics --json | jq '.[] | select(.name == "offshoot_store_full").values[0].value'
`)
    .action(async (_options: unknown, command: Command) => {
      const { output, client } = contextOf(io, command);
      if (command.optsWithGlobals<{ readonly json?: boolean }>().json === true) output.result(await client().metrics(), () => []);
      else io.stdout.write(await client().metricsText());
    });
}
