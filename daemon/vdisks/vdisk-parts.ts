/** What operations on container files are made of, and what they have in common. */
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import { shown } from '../filesystem/names.js';
import type { OperationParts, Operations } from '../jobs/operations.js';
import type { CloneTrees } from '../machines/machine-clone.js';
import type { PlanParts } from '../machines/machine-plan.js';
import type { TakeAwayParts } from '../machines/machine-undo.js';
import type { Attachments } from './attachments.js';
import type { VdiskHost } from './vdisk-host.js';

export interface VdiskParts extends PlanParts, OperationParts, TakeAwayParts {
  readonly cloneTrees: CloneTrees;
  readonly host: VdiskHost;
  readonly attachments: Attachments;
  /** Where file systems of container files are mounted. Lies in no mount of ours, and goes with the machine's power. */
  readonly deployedDir: string;
  readonly operations: () => Operations;
}

export const STAGE_JOB = 'stage';
export const DEPLOY_JOB = 'deploy';
export const DECOMMISSION_JOB = 'decommission';

/** While a container file is made. No deployed machine has such a name. */
export function stagingMountPoint({ deployedDir }: Pick<VdiskParts, 'deployedDir'>, jobId: number): string {
  return path.join(deployedDir, `.stage-${jobId}`);
}

export function deployedMountPoint({ deployedDir }: Pick<VdiskParts, 'deployedDir'>, name: string): string {
  return path.join(deployedDir, name);
}

/** A name of a directory on this host, and of a machine with every hypervisor. */
export function checkDeployedName(name: string): string {
  if (/^[a-z0-9][a-z0-9_.-]{0,62}$/iu.test(name)) return name;
  throw new OffshootError('invalid-name', `${shown(name)} cannot be the name of a deployed machine: 1 to 63 letters, digits, "_", "." and "-", with a letter or digit first`);
}

export function stepText(step: number, of: number, what: string): string {
  return `step ${step} of ${of}: ${what}`;
}
