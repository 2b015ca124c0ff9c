/** Certificates for a test, made by openssl(1): authorities, and directories of the names that nbdkit, libnbd and QEMU look for. */
import { copyFileSync } from 'node:fs';
import { join } from 'node:path';

import { mustRun } from './model/command.js';
import { makeTempDir, type Cleanup } from './temp.js';

export interface Authority {
  /** Has ca-cert.pem, server-cert.pem and server-key.pem, for `localhost` and 127.0.0.1. */
  readonly server: string;
  /** Has ca-cert.pem, client-cert.pem and client-key.pem. */
  readonly client: string;
  /** Has ca-cert.pem alone: who has it knows the server, and cannot say who he is. */
  readonly stranger: string;
}

export async function makeAuthority(name: string, cleanup: Cleanup): Promise<Authority> {
  const ca = makeTempDir('ca', cleanup);
  await openssl(['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', `/CN=${name}`, '-keyout', join(ca, 'ca-key.pem'), '-out', join(ca, 'ca-cert.pem')]);
  const directoryOf = async (who: 'server' | 'client' | null): Promise<string> => {
    const directory = makeTempDir('tls', cleanup);
    copyFileSync(join(ca, 'ca-cert.pem'), join(directory, 'ca-cert.pem'));
    if (who === null) return directory;
    const request = join(ca, `${who}.pem`);
    const names = who === 'server' ? ['-addext', 'subjectAltName=IP:127.0.0.1,DNS:localhost'] : [];
    await openssl(['req', '-newkey', 'rsa:2048', '-nodes', '-subj', who === 'server' ? '/CN=localhost' : '/CN=a client', ...names, '-keyout', join(directory, `${who}-key.pem`), '-out', request]);
    await openssl([
      'x509', '-req', '-in', request, '-CA', join(ca, 'ca-cert.pem'), '-CAkey', join(ca, 'ca-key.pem'), '-CAcreateserial', '-days', '2', '-copy_extensions', 'copy',
      '-out', join(directory, `${who}-cert.pem`),
    ]);
    return directory;
  };
  return { server: await directoryOf('server'), client: await directoryOf('client'), stranger: await directoryOf(null) };
}

async function openssl(args: readonly string[]): Promise<void> { await mustRun('openssl', args, { timeoutMs: 120_000 }); }
