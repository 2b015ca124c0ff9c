/** This host's own initiator (open-iscsi) made to look again: what targets a portal has for it, and what disks its sessions have. Main thread of the server. */
import { OffshootError } from '../../../blockstore/errors.js';
import { runChild, type ChildResult } from '../../programs/child.js';

export interface InitiatorCall {
  readonly signal: AbortSignal;
  readonly timeoutMs: number;
}

/** Exit codes of iscsiadm(8). */
const NO_DRIVER = 12;
const NO_DAEMON = 20;
const NO_OBJECTS = 21;
const SAID_CHARACTERS_MAX = 500;

/** `hasSessions`: there were some, and they have looked again. */
export async function rescanIscsi(portal: string, call: InitiatorCall): Promise<{ readonly targets: readonly string[]; readonly hasSessions: boolean }> {
  const found = await iscsiadm(['--mode', 'discovery', '--type', 'sendtargets', '--portal', portal], call);
  if (found.code === NO_DRIVER || found.code === NO_DAEMON) {
    const remedy = found.code === NO_DRIVER ? "this host's kernel has no iSCSI driver (modprobe iscsi_tcp)" : 'iscsid does not run on this host (systemctl start iscsid)';
    throw new OffshootError('not-supported', `${remedy}: mend that, or discover on the host where the disks are to be used; ${said(found)}`, { portal });
  }
  if (found.code !== 0) throw new OffshootError('source-unreachable', said(found), { portal });
  const rescan = await iscsiadm(['--mode', 'session', '--rescan'], call);
  if (rescan.code !== 0 && rescan.code !== NO_OBJECTS) throw new OffshootError('io-error', said(rescan), { portal });
  return { targets: targetsIn(found.stdout), hasSessions: rescan.code === 0 };
}

/** Lines `192.0.2.1:3260,1 iqn.…`. */
export function targetsIn(stdout: string): readonly string[] {
  return [...new Set(stdout.split('\n').flatMap((line) => /^\S+,\d+\s+(\S+)\s*$/u.exec(line.trim())?.[1] ?? []))];
}

async function iscsiadm(args: readonly string[], call: InitiatorCall): Promise<ChildResult> {
  try {
    return await runChild('iscsiadm', args, call);
  } catch (thrown) {
    if (thrown instanceof OffshootError && thrown.kind === 'tool-missing') throw new OffshootError('tool-missing', 'iscsiadm is not on this host: install open-iscsi where the disks are to be used, and discover there', {}, thrown);
    throw thrown;
  }
}

/** What it says last, and not its whole story, is the reason. */
function said({ stderr, code }: ChildResult): string {
  const lines = stderr.split('\n').map((line) => line.trim()).filter((line) => line !== '');
  return (lines.at(-1) ?? `iscsiadm: exit code ${code ?? 'none'}`).slice(0, SAID_CHARACTERS_MAX);
}
