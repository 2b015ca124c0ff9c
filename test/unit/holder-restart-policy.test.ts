/** Back-off and crash loop, with a clock that the test moves. */
import { describe, expect, it } from 'vitest';

import { RESTART_LIMITS, RestartPolicy, restartLimits } from '../../daemon/holder/restart-policy.js';

function policyWithClock(limits = RESTART_LIMITS) {
  let nowMs = 1_000_000;
  const policy = new RestartPolicy(() => nowMs, limits);
  /** One server's life: it was ready, unless said otherwise. */
  const live = (lifeMs: number, wasReady = true) => {
    if (wasReady) policy.serverReady();
    nowMs += lifeMs;
    return policy.serverEnded();
  };
  const pass = (durationMs: number) => {
    nowMs += durationMs;
  };
  return { policy, live, pass };
}

const manyCrashesAllowed = { ...RESTART_LIMITS, crashesMax: 1_000 };

describe('restart policy', () => {
  it('lets the next follow at once when the last one was ready, however short it lived', () => {
    const { live } = policyWithClock(manyCrashesAllowed);
    for (let crash = 0; crash < 20; crash += 1) expect(live(1)).toEqual({ action: 'restart', delayMs: 0 });
  });

  it('waits when servers are never ready: 100 ms, then twice as long each time, and never longer than 5 s', () => {
    const { live } = policyWithClock(manyCrashesAllowed);
    const decisions = Array.from({ length: 10 }, () => live(10, false));
    expect(decisions.map((decision) => (decision.action === 'restart' ? decision.delayMs : decision.action))).toEqual([
      0, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000, 5_000,
    ]);
  });

  it('begins anew after a server that was ready', () => {
    const { live } = policyWithClock(manyCrashesAllowed);
    live(10, false);
    live(10, false);
    expect(live(10, false)).toEqual({ action: 'restart', delayMs: 200 });
    expect(live(10)).toEqual({ action: 'restart', delayMs: 0 });
    expect(live(10, false)).toEqual({ action: 'restart', delayMs: 100 });
  });

  it('stays down at the fifth crash within 60 s', () => {
    const { live } = policyWithClock();
    const actions = Array.from({ length: 5 }, () => live(14_999).action);
    expect(actions).toEqual(['restart', 'restart', 'restart', 'restart', 'stay-down']);
  });

  it('does not stay down when the crashes are spread over more than 60 s', () => {
    const { live } = policyWithClock();
    const actions = Array.from({ length: 50 }, () => live(15_000).action);
    expect(new Set(actions)).toEqual(new Set(['restart']));
  });

  it('counts the time between servers, not only their lives', () => {
    const { live, pass } = policyWithClock();
    const actions = Array.from({ length: 20 }, () => {
      pass(14_995);
      return live(5).action;
    });
    expect(new Set(actions)).toEqual(new Set(['restart']));
  });

  it('forgets what was when an operator asks for another try', () => {
    const { policy, live } = policyWithClock();
    for (let crash = 0; crash < 5; crash += 1) live(1, false);
    policy.forget();
    expect(live(1, false)).toEqual({ action: 'restart', delayMs: 0 });
  });

  it('takes another number of crashes from the environment, and only a number', () => {
    expect(restartLimits({})).toEqual(RESTART_LIMITS);
    expect(restartLimits({ OFFSHOOT_CRASHES_MAX: '1000' })).toEqual({ ...RESTART_LIMITS, crashesMax: 1_000 });
    for (const text of ['', '0', '-1', '2.5', 'many']) expect(restartLimits({ OFFSHOOT_CRASHES_MAX: text })).toEqual(RESTART_LIMITS);
  });
});
