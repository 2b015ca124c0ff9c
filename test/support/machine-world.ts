/**
 * The world that tests of machine clones begin with.
 *
 * Not in `machines-fixture.ts`, because the programs that power tests record run without vitest and import that file; the
 * test store of this one tidies up after each test of vitest.
 */
import { TestStore } from './blockstore-fixture.js';
import { baseMachine, machinesOver, type MachinesFixture } from './machines-fixture.js';

/** A store with the machine `golden/base` and the empty container `lab`; the hypervisor's registrations are in `directory`. */
export interface MachineWorld {
  readonly test: TestStore;
  readonly directory: string;
  machines: MachinesFixture;
}

export function machineWorld(directory: string, content: Buffer): MachineWorld {
  const test = new TestStore();
  const machines = machinesOver(test, directory);
  baseMachine(test, machines, content);
  machines.fileSystem.namespace.mkdir(1, 'lab', 0o755, { uid: 0, gid: 0, pid: 0 });
  return { test, directory, machines };
}
