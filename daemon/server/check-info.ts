/** Checks and the scrub in the shapes of the control API. Pure. */
import type { CheckInfo, CheckResult, ScrubInfo } from '../control/schemas.js';
import type { CheckOutcome } from '../jobs/check-run.js';
import type { RunningCheck } from '../jobs/checks.js';
import type { ScrubState } from '../jobs/scrub.js';

export function checkInfo(check: RunningCheck): CheckInfo {
  return {
    checkId: check.id, state: check.state, target: check.target, data: check.data, repair: check.repair, phase: check.phase, doneBytes: check.doneBytes,
    totalBytes: check.totalBytes, result: check.outcome === null ? null : outcomeInfo(check.outcome),
    error: check.error === null ? null : { kind: check.error.kind, message: check.error.message },
    startedAt: check.startedAt.toISOString(), endedAt: check.endedAt?.toISOString() ?? null,
  };
}

export function outcomeInfo(outcome: CheckOutcome): CheckResult {
  return {
    verdict: outcome.verdict,
    findings: outcome.findings.map((finding) => ({
      kind: finding.kind, severity: finding.severity, message: finding.message, layerId: finding.layerId ?? null, nodeId: finding.nodeId ?? null,
      file: finding.file ?? null, offsetBytes: finding.offsetBytes ?? null, lengthBytes: finding.lengthBytes ?? null, disks: [...(finding.disks ?? [])],
      repaired: finding.repaired === true,
    })),
    faulted: outcome.faulted.map(({ path, reason }) => ({ path, reason })),
    lifted: outcome.lifted.map(({ path, lostBytes }) => ({ path, lostBytes })),
    notLifted: outcome.notLifted.map(({ path, reason }) => ({ path, reason })),
    layersChecked: outcome.layersChecked, layersWithoutChecksums: outcome.layersWithoutChecksums, bytesRead: outcome.bytesRead,
  };
}

export function scrubInfo(state: ScrubState): ScrubInfo {
  return {
    state: state.job?.state ?? null, doneBytes: state.doneBytes, totalBytes: state.totalBytes, rateBytesPerSecond: state.rateBytesPerSecond,
    startedAt: state.job === null ? null : isoTime(state.job.createdUs), lastCompletedAt: state.lastCompletedUs === null ? null : isoTime(state.lastCompletedUs),
    damagedExtents: state.damagedExtents, layersWithoutChecksums: state.layersWithoutChecksums, message: state.job?.message ?? null,
  };
}

function isoTime(timeUs: number): string {
  return new Date(timeUs / 1000).toISOString();
}
