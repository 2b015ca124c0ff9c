/** What a benchmark's figures were measured on. */
import { execFileSync } from 'node:child_process';
import { release } from 'node:os';

export function machine(directory: string): Record<string, string | number> {
  const first = (program: string, args: readonly string[]): string => {
    try {
      return execFileSync(program, args, { encoding: 'utf8' }).trim().split('\n')[0] ?? '';
    } catch (error) {
      // Not every benchmark needs every program.
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return 'not installed';
      throw error;
    }
  };
  return {
    kernel: release(), node: process.version, processors: Number(first('nproc', [])),
    fileSystem: first('stat', ['-f', '-c', '%T', directory]),
    qemuStorageDaemon: first('qemu-storage-daemon', ['--version']), fio: first('fio', ['--version']),
  };
}

/** One line below a result. */
export function machineLine(about: Record<string, string | number>): string {
  const of = (name: string): string => String(about[name] ?? '');
  return `Linux ${of('kernel')}, ${of('processors')} processors, Node.js ${of('node')}, ${of('qemuStorageDaemon')}, ${of('fio')}, on ${of('fileSystem')}.`;
}
