/**
 * Names in messages: how many are listed, and that a name is one word for a shell, whatever is in it.
 */
import { execFileSync } from 'node:child_process';

import { describe, expect, it } from 'vitest';

import { listedNames, listedWords, shellWord } from '../../blockstore/listed-names.js';

const self = (name: string): string => name;

describe('names in a message', () => {
  it('are all there when they are few, and the first five with a count when they are many', () => {
    expect(listedNames(['a'], self)).toBe('a');
    expect(listedNames(['a', 'b', 'c', 'd', 'e'], self)).toBe('a, b, c, d, e');
    expect(listedWords(['a', 'b', 'c', 'd', 'e'], self)).toBe('a b c d e');
    const many = Array.from({ length: 1005 }, (_, i) => `vm${i}`);
    expect(listedNames(many, self)).toBe('vm0, vm1, vm2, vm3, vm4 and 1000 more');
    expect(listedWords(many, self)).toBe('vm0 vm1 vm2 vm3 vm4 …');
  });

  it('are asked for only if they are listed', () => {
    let asked = 0;
    listedNames(Array.from({ length: 10_000 }, (_, i) => i), (i) => { asked += 1; return String(i); });
    expect(asked).toBe(5);
  });

  it('are one word for a shell, whatever is in them', () => {
    expect(shellWord('vms/web-1.img@monday')).toBe('vms/web-1.img@monday');
    for (const name of ['vms/a b', 'vms/a; touch x', "vms/it's", 'vms/$(id)', 'vms/`id`', 'vms/a\\b', '-rf', 'vms/*', "vms/'", 'vms/ü', '~', 'a#b', 'a\u2028b']) {
      expect(execFileSync('sh', ['-c', `printf %s ${shellWord(name)}`], { encoding: 'utf8' })).toBe(name);
    }
  });
});
