/** Who an export is for: what is taken, in which spelling, and what is refused with what to write instead. */
import { describe, expect, it } from 'vitest';

import { checkedClients, isLoopbackAddress, reachesBeyondLoopback } from '../../daemon/presenter/clients.js';

describe('clients of an export', () => {
  it.each([
    ['192.0.2.7', '192.0.2.7'], ['192.0.2.0/24', '192.0.2.0/24'], ['192.0.2.7/32', '192.0.2.7'], ['0.0.0.0/0', '0.0.0.0/0'], ['::/0', '::/0'], ['::1', '::1'], ['2001:DB8:0:0:0::1', '2001:db8::1'],
    ['2001:db8::/32', '2001:db8::/32'], ['2001:db8::1/128', '2001:db8::1'], ['1:2:3:4:5:6:7:8', '1:2:3:4:5:6:7:8'], ['1:0:0:4:0:0:0:8', '1:0:0:4::8'], ['::ffff:192.0.2.1', '::ffff:c000:201'],
  ])('%s is %s', (text, spelled) => { expect(checkedClients([text], 'nbd', 'addresses')).toEqual([spelled]); });

  it.each([
    ['*', /0\.0\.0\.0\/0/u], ['', /neither/u], ['localhost', /neither/u], ['192.0.2.256', /neither/u], ['192.0.2.1/33', /up to 32/u], ['192.0.2.1/', /number/u], ['192.0.2.1/24', /192\.0\.2\.0\/24/u],
    ['192.0.2.0/24/1', /neither/u], ['fe80::1%eth0', /neither/u], ['2001:db8::1/64', /2001:db8::\/64/u], ['192.0.2.7,192.0.2.8', /neither/u], ['192.0.2.7 rw', /neither/u], ['192.0.2.7\n', /neither/u],
  ])('%j is refused', (text, words) => { expect(() => checkedClients([text], 'nbd', 'addresses')).toThrow(words); });

  it('are each there once; none is nobody, and never everybody', () => {
    expect(checkedClients(['::1', '0:0::1', '127.0.0.1'], 'nbd', 'addresses')).toEqual(['::1', '127.0.0.1']);
    expect(() => checkedClients([], 'nbd', 'addresses')).toThrow(/for whom/u);
    expect(() => checkedClients(Array.from({ length: 257 }, (_, i) => `10.0.${Math.floor(i / 256)}.${i % 256}`), 'nbd', 'addresses')).toThrow(/too many/u);
    expect(checkedClients([], 'block', 'host')).toEqual([]);
    expect(() => checkedClients(['127.0.0.1'], 'block', 'host')).toThrow(/this host alone/u);
  });

  it('are initiators and users by the rules of their names', () => {
    expect(checkedClients(['IQN.2004-10.com.Example:host-1', 'eui.0123456789ABCDEF'], 'iscsi', 'initiators')).toEqual(['iqn.2004-10.com.example:host-1', 'eui.0123456789abcdef']);
    for (const text of ['iqn.2004-13.com.example', 'host', 'iqn.2004-10.com.example host', 'eui.0123', '*']) expect(() => checkedClients([text], 'iscsi', 'initiators'), text).toThrow(/initiator name/u);
    expect(checkedClients(['anna', 'b.c-d'], 'smb', 'users')).toEqual(['anna', 'b.c-d']);
    for (const text of ['@group', '+all', 'a b', '%', '-x', '']) expect(() => checkedClients([text], 'smb', 'users'), text).toThrow(/user name/u);
  });

  it('reach beyond this host unless each lies in its loopback', () => {
    expect(reachesBeyondLoopback(['127.0.0.1', '127.0.0.0/8', '::1'])).toBe(false);
    for (const client of ['192.0.2.7', '127.0.0.0/7', '::/0', '0.0.0.0/0', '2001:db8::1']) expect(reachesBeyondLoopback([client]), client).toBe(true);
    expect([isLoopbackAddress('127.0.0.1'), isLoopbackAddress('::1'), isLoopbackAddress('0.0.0.0'), isLoopbackAddress('name')]).toEqual([true, true, false, false]);
  });
});
