/** The TCP sockets of a process, as the kernel lists them: where it really listens, and who is connected. */
import { readFileSync, readdirSync, readlinkSync } from 'node:fs';

export interface TcpSocket {
  readonly isListening: boolean;
  readonly isConnected: boolean;
  /** IPv4 addresses as such, also where the socket is one of IPv6. */
  readonly localAddress: string;
  readonly localPort: number;
  readonly remoteAddress: string;
}

const ESTABLISHED = '01';
const LISTEN = '0A';
const MAPPED_IPV4 = '00000000000000000000FFFF';

/** Empty when the process has ended. */
export function tcpSocketsOf(pid: number): TcpSocket[] {
  try {
    const inodes = new Set(readdirSync(`/proc/${pid}/fd`).flatMap((fd) => {
      try {
        return /^socket:\[([0-9]+)\]$/u.exec(readlinkSync(`/proc/${pid}/fd/${fd}`))?.[1] ?? [];
      } catch {
        return [];
      }
    }));
    return ['tcp', 'tcp6'].flatMap((table) => parseTcpTable(readTable(`/proc/${pid}/net/${table}`), inodes));
  } catch {
    return [];
  }
}

export function parseTcpTable(text: string, inodes: ReadonlySet<string>): TcpSocket[] {
  return text.split('\n').slice(1).flatMap((line) => {
    const [, local = '', remote = '', state, , , , , , inode = ''] = line.trim().split(/\s+/u);
    if (!inodes.has(inode)) return [];
    return [{
      isListening: state === LISTEN, isConnected: state === ESTABLISHED, localAddress: addressIn(local), localPort: Number.parseInt(local.split(':')[1] ?? '', 16),
      remoteAddress: addressIn(remote),
    }];
  });
}

/** Each 32-bit word stands in the order of the machine, which is little-endian here. */
function addressIn(field: string): string {
  const [hex = ''] = field.split(':');
  const words = hex.match(/.{8}/gu) ?? [];
  const bytes = words.flatMap((word) => (word.match(/../gu) ?? []).reverse()).join('');
  const ipv4 = bytes.length === 8 ? bytes : bytes.startsWith(MAPPED_IPV4) ? bytes.slice(MAPPED_IPV4.length) : null;
  if (ipv4 !== null) return (ipv4.match(/../gu) ?? []).map((byte) => Number.parseInt(byte, 16)).join('.');
  return new URL(`http://[${(bytes.match(/.{4}/gu) ?? []).join(':')}]`).hostname.slice(1, -1);
}

/** A kernel without IPv6 has no table of it. */
function readTable(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}
