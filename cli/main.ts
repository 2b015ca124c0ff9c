#!/usr/bin/env node
/**
 * The executable. Everything is in `program.ts`; here the exit code is handed to the process, which ends by itself when
 * its output is written.
 */
import { processIo } from './process-io.js';
import { runCli } from './program.js';

process.exitCode = await runCli(process.argv.slice(2), processIo());
