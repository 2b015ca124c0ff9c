/** Whether an address is one of a list of addresses and networks. Pure. */
import { BlockList, isIPv6 } from 'node:net';

export function isAmong(address: string, list: readonly string[]): boolean {
  const among = new BlockList();
  for (const each of list) {
    if (each === '*') return true;
    const [network = '', prefix] = each.split('/');
    const family = isIPv6(network) ? 'ipv6' : 'ipv4';
    if (prefix === undefined) among.addAddress(network, family);
    else among.addSubnet(network, Number(prefix), family);
  }
  return among.check(address, isIPv6(address) ? 'ipv6' : 'ipv4');
}
