/**
 * The operations on machines that are jobs (see `jobs/operations.ts`): clones and imports, both undone in the same way. Main thread.
 */
import { Operations, type OperationKind, type OperationParts as CommonParts } from '../jobs/operations.js';
import { undoMachines, type UndoParts } from './machine-undo.js';

export const MACHINE_CLONE_JOB = 'machine-clone';
export const MACHINE_IMPORT_JOB = 'machine-import';

export type OperationParts = CommonParts & UndoParts;
export type MachineOperations = Operations;

export function machineOperations(parts: OperationParts): MachineOperations {
  const kind: OperationKind = {
    undo: async (jobId, end, signal) => { await undoMachines(parts, jobId, end, signal); },
    done: 'machines made', undone: 'machines were not made, and what there was of them is gone',
  };
  return new Operations(parts, new Map([MACHINE_CLONE_JOB, MACHINE_IMPORT_JOB].map((each) => [each, kind])));
}
