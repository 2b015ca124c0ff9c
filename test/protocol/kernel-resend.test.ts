/** When RESEND may be sent: KERNEL.md 1.9, test g. */
import { describe, expect, it } from 'vitest';

import { Resend } from '../../daemon/transport/kernel/resend.js';

describe('RESEND', () => {
  it('is one message of 16 bytes, sent before any thread reads', () => {
    const sent: Uint8Array[] = [];
    new Resend().send((message) => sent.push(message));
    expect(sent.map((message) => Buffer.from(message).toString('hex'))).toEqual(['10000000070000000000000000000000']);
  });

  it('sent late, or twice, is caught and reaches no kernel', () => {
    const sent: Uint8Array[] = [];
    const late = new Resend();
    late.readersStart();
    expect(() => { late.send((message) => sent.push(message)); }).toThrow('before any thread reads');
    const twice = new Resend();
    twice.send((message) => sent.push(message));
    expect(() => { twice.send((message) => sent.push(message)); }).toThrow('sent once');
    expect(sent).toHaveLength(1);
  });
});
