/**
 * What the administrator says of a vSphere: settings that are wrong are refused with what would be right, paths of this host become the
 * datastore's, and a credentials file that others may read is not used.
 */
import { chmodSync, chownSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';

import { readCredentials, redact } from '../../daemon/hypervisor/vsphere/credentials.js';
import { datastorePath, parseVsphereSettings } from '../../daemon/hypervisor/vsphere/settings.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const GOOD = { url: 'https://esx.example', credentialsFile: '/etc/offshoot/vsphere', datastores: [{ directory: '/mnt/offshoot', datastore: 'offshoot' }] };
const THUMBPRINT = 'AB'.repeat(32).replace(/(..)(?=.)/gu, '$1:');

const parse = (changes: Readonly<Record<string, unknown>>): unknown => parseVsphereSettings(JSON.stringify({ ...GOOD, ...changes }));

describe('settings', () => {
  it('are read, with defaults for the rest', () => {
    expect(parse({ url: 'https://esx.example:8443/sdk', thumbprint: THUMBPRINT })).toMatchObject({
      host: 'esx.example', port: 8443, trust: { by: 'thumbprint', sha256: 'ab'.repeat(32) }, datacenter: null, resourcePool: null, callTimeoutMs: 30_000,
    });
    expect(parse({ url: 'https://[::1]' })).toMatchObject({ host: '::1', port: 443, trust: { by: 'system' } });
    expect(parse({ caFile: '/etc/ca.pem' })).toMatchObject({ trust: { by: 'file', caFile: '/etc/ca.pem' } });
  });

  it.each<[string, Readonly<Record<string, unknown>>, RegExp]>([
    ['plain HTTP', { url: 'http://esx.example' }, /must be https/u],
    ['a password in the URL', { url: 'https://root:geheim@esx.example' }, /credentialsFile/u],
    ['another path', { url: 'https://esx.example/other' }, /must be https/u],
    ['a SHA-1 thumbprint', { thumbprint: 'AB'.repeat(20) }, /SHA-256/u],
    ['two kinds of trust', { thumbprint: THUMBPRINT, caFile: '/etc/ca.pem' }, /exclude each other/u],
    ['a way to turn the check off', { insecure: true }, /insecure/u],
    ['no datastore', { datastores: [] }, /datastores/u],
    ['a relative directory', { datastores: [{ directory: 'mnt', datastore: 'x' }] }, /absolute/u],
    ['a bracket in a datastore', { datastores: [{ directory: '/mnt', datastore: 'x]' }] }, /brackets/u],
    ['a relative credentials file', { credentialsFile: 'secret' }, /absolute/u],
  ])('with %s are refused', (_name, changes, message) => {
    expect(() => parse(changes)).toThrow(expect.objectContaining({ kind: 'invalid-argument', message: expect.stringMatching(message) as string }));
  });

  it('never repeat a URL that holds a password', () => {
    for (const url of ['https://root:geheim@esx.example', 'ftp://root:geheim@esx.example', 'root:geheim@esx']) {
      expect(() => parse({ url })).not.toThrow(/geheim/u);
      expect(() => parse({ url })).toThrow();
    }
  });
});

describe('a path of this host', () => {
  const mappings = [{ directory: '/mnt/offshoot', datastore: 'all' }, { directory: '/mnt/offshoot/web', datastore: 'web farm' }];

  it('becomes the datastore\'s, by the longest directory that holds it', () => {
    expect(datastorePath(mappings, '/mnt/offshoot/db/one', 'one.vmx')).toBe('[all] db/one/one.vmx');
    expect(datastorePath(mappings, '/mnt/offshoot/web/a b/', 'a b.vmx')).toBe('[web farm] a b/a b.vmx');
    expect(datastorePath(mappings, '/mnt/offshoot/web', 'x.vmx')).toBe('[web farm] x.vmx');
    expect(datastorePath(mappings, '/mnt/offshoot/website', 'x.vmx')).toBe('[all] website/x.vmx');
    expect(datastorePath([{ directory: '/', datastore: 'root' }], '/a', 'a.vmx')).toBe('[root] a/a.vmx');
  });

  it('outside of all of them is refused, also when it climbs out', () => {
    for (const directory of ['/mnt/other', '/mnt', '/mnt/offshoot/../other', '/mnt/offshoots', 'mnt/offshoot/a']) {
      expect(() => datastorePath(mappings, directory, 'a.vmx')).toThrow(expect.objectContaining({ kind: 'invalid-argument' }));
    }
    for (const name of ['../a.vmx', 'b/a.vmx', '', '..']) expect(() => datastorePath(mappings, '/mnt/offshoot/a', name)).toThrow(/no file name/u);
  });
});

describe('the credentials file', () => {
  const cleanup = createCleanup();
  afterEach(() => cleanup.run());

  const write = (text: string, mode: number): string => {
    const file = join(makeTempDir('credentials', cleanup), 'secret');
    writeFileSync(file, text, { mode });
    chmodSync(file, mode);
    return file;
  };

  it('gives the user and the password', () => {
    expect(readCredentials(write('svc@vsphere.local\n p ä"<&>\n', 0o600))).toEqual({ user: 'svc@vsphere.local', password: ' p ä"<&>' });
    expect(readCredentials(write('root\r\nsecret', 0o400))).toEqual({ user: 'root', password: 'secret' });
  });

  it('is not used when others may reach it, is a link, or is somebody else\'s', () => {
    for (const mode of [0o640, 0o604, 0o620, 0o601, 0o644]) {
      expect(() => readCredentials(write('root\nsecret\n', mode))).toThrow(expect.objectContaining({ kind: 'permission-denied', message: expect.stringContaining('chmod 600') as string }));
    }
    const file = write('root\nsecret\n', 0o600);
    symlinkSync(file, `${file}.link`);
    expect(() => readCredentials(`${file}.link`)).toThrow(/cannot be opened/u);
    chownSync(file, 12345, 12345);
    expect(() => readCredentials(file)).toThrow(/belongs to user 12345/u);
    mkdirSync(`${file}.directory`, { mode: 0o700 });
    expect(() => readCredentials(`${file}.directory`)).toThrow(/no regular file/u);
    expect(() => readCredentials(`${file}.none`)).toThrow(expect.objectContaining({ kind: 'not-found' }));
  });

  it('must be two lines, and its words are never in an error', () => {
    for (const text of ['', 'geheim', 'geheim\n', '\ngeheim\n', 'geheim\ngeheim\nand more\n', `geheim\n${'x'.repeat(5000)}`]) {
      let thrown: unknown;
      try {
        readCredentials(write(text, 0o600));
      } catch (error) {
        thrown = error;
      }
      expect(thrown).toMatchObject({ kind: 'permission-denied' });
      expect(String((thrown as Error).stack)).not.toContain('geheim');
    }
  });

  it('is taken out of what a server says back', () => {
    expect(redact('login of root with pa$$ failed: pa%24%24', { user: 'root', password: 'pa$$' })).toBe('login of root with (redacted) failed: (redacted)');
  });
});
