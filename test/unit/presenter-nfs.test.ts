/** What an NFS export may be, the configuration that is written of it, and when a running server need not be started anew for it. */
import { describe, expect, it } from 'vitest';

import type { Export, Presenter } from '../../daemon/presenter/presenter.js';
import { isAmong } from '../../daemon/presenter/nfs/address-list.js';
import { canBeReread, configuration, fileSystemIdOf, type ServerSettings } from '../../daemon/presenter/nfs/configuration.js';
import { createNfsPresenter } from '../../daemon/presenter/nfs/nfs.js';
import { rulesOf } from '../../daemon/presenter/nfs/rules.js';
import { parseTcpTable } from '../../daemon/presenter/nfs/sockets.js';

const settings: ServerSettings = {
  address: '192.0.2.1', port: 2049, mountPort: 20048, leaseSeconds: 60, graceSeconds: 90, recoveryDir: '/run/x/recovery', credentialsDir: '/run/x/credentials',
};

function exported(id: number, more: Partial<Export> = {}): Export {
  return {
    id, uuid: 'ffffffff-ffff-4fff-bfff-ffffffffffff', path: `c${id}`, mountPath: `/mnt/o/c${id}`, kind: 'directory', sizeBytes: null, clients: ['192.0.2.7'], readOnly: false, options: {}, ...more,
  };
}

describe('an NFS export', () => {
  it.each<[string, Partial<Export>, RegExp]>([
    ['a disk', { kind: 'disk', path: 'vms/web001.img' }, /present vms, or present the disk as iscsi or nbd/u],
    ['an option that NFS does not have', { options: { async: 'yes' } }, /no option async/u],
    ['a squash that is none', { options: { squash: 'no' } }, /squash is root or none or all, not no/u],
    ['a version that is none', { options: { versions: '2' } }, /versions is 4 or 3,4/u],
    ['a security that is none', { options: { security: 'tls' } }, /security is sys or/u],
    ['a port that is none', { options: { port: '70000' } }, /port is a number/u],
    ['no clients', { clients: [] }, /needs clients/u],
    ['a name for a client', { clients: ['host.example'] }, /is no address/u],
    ['an IPv6 network', { clients: ['2001:db8::/64'] }, /IPv6 network/u],
    ['a quote in its name', { path: 'a"b' }, /quote/u],
    ['a backslash in its place', { mountPath: '/mnt/a\\b' }, /backslash/u],
    ['a newline in its place', { mountPath: '/mnt/a\nb' }, /quote/u],
    ['a number that is too large', { id: 65_536 }, /65535 exports/u],
  ])('that is %s is refused, and it is said what to do', (_what, more, message) => {
    expect(() => rulesOf(exported(1, more))).toThrow(message);
  });

  it('says nothing: version 4, root is nobody, no Kerberos', () => {
    expect(rulesOf(exported(1))).toEqual({ squash: 'root', security: 'sys', version3: false, port: null, clients: ['192.0.2.7'] });
    expect(rulesOf(exported(1, { clients: ['0.0.0.0/0', '::/0'] })).clients).toEqual(['*']);
    expect(rulesOf(exported(1, { clients: ['0.0.0.0/0'] })).clients).toEqual(['0.0.0.0/0']);
  });

  it('is refused where the mount gives no file handles, with what to do', async () => {
    const presenter = createNfsPresenter({ directory: '/nowhere', address: '127.0.0.1', nfs: false, logger: { warn: () => undefined } });
    expect(() => { presenter.check(exported(1)); }).toThrow(/start it with --nfs/u);
    expect(await presenter.probe({ signal: new AbortController().signal })).toMatchObject({ usable: false, reason: expect.stringContaining('--nfs') as string });
  });
});

describe('the presenter', () => {
  const at = (address: string): Presenter => createNfsPresenter({ directory: '/nowhere', address, nfs: true, logger: { warn: () => undefined } });
  const call = { signal: new AbortController().signal };

  it('refuses clients that cannot come where it listens, and an address of an export\'s own', () => {
    for (const clients of [['192.0.2.7'], ['127.0.0.1', '192.0.2.0/24'], ['0.0.0.0/0', '::/0']]) expect(() => { at('127.0.0.1').check(exported(1, { clients })); }).toThrow(/--export-address ADDRESS/u);
    expect(() => { at('::1').check(exported(1)); }).toThrow(/--export-address ADDRESS/u);
    at('127.0.0.1').check(exported(1, { clients: ['127.0.0.0/8', '::1'] }));
    at('192.0.2.1').check(exported(1));
    expect(() => { at('192.0.2.1').check(exported(1, { options: { listen: '192.0.2.1:2049' } })); }).toThrow(/leave --listen out; --option port=N/u);
  });

  it('settles one port for all, which the first export that says one decides', async () => {
    const settled = async (options: Export['options'], shown: readonly Export[]): Promise<Readonly<Record<string, string>> | undefined> => await at('192.0.2.1').settle?.(exported(9, { options }), shown, call);
    expect(await settled({ squash: 'none' }, [])).toEqual({ squash: 'none', port: '2049' });
    expect(await settled({}, [exported(1), exported(2, { options: { port: '12049' } })])).toEqual({ port: '12049' });
    expect(await settled({ port: '3000' }, [])).toEqual({ port: '3000' });
  });
});

describe('the configuration', () => {
  it('lets in whom the export names, and nobody else, and never says async', () => {
    const text = configuration([exported(1, { readOnly: true }), exported(2, { clients: ['192.0.2.0/24', '2001:db8::7'], options: { squash: 'none' } })], settings);
    expect(text).not.toMatch(/async/iu);
    expect(text.match(/EXPORT_DEFAULTS \{\n {2}Access_Type = None;/gu)).toHaveLength(1);
    const [, first = '', second = ''] = text.split('\nEXPORT {');
    expect([first, second].map((block) => block.indexOf('  Access_Type = None;') < block.indexOf('CLIENT'))).toEqual([true, true]);
    expect(first).toContain('Clients = 192.0.2.7;\n    Access_Type = RO;\n    Squash = root_squash;');
    expect(second).toContain('Clients = 192.0.2.0/24, 2001:db8::7;\n    Access_Type = RW;\n    Squash = no_root_squash;');
    expect(second).toContain('Path = "/mnt/o/c2";\n  Pseudo = "/c2";');
  });

  it('is the same text for the same exports, in whatever order', () => {
    expect(configuration([exported(2), exported(1)], settings)).toBe(configuration([exported(1), exported(2)], settings));
  });

  it('speaks version 3 and Kerberos when an export asks for it', () => {
    expect(configuration([exported(1)], settings)).toMatch(/Protocols = 4;[^]*Active_krb5 = false;/u);
    expect(configuration([exported(1), exported(2, { options: { versions: '3,4', security: 'krb5p' } })], settings)).toMatch(/Protocols = 3, 4;[^]*Active_krb5 = true;[^]*SecType = krb5p;/u);
  });

  it('gives each export a file system id of its uuid, of two numbers that the server takes', () => {
    expect(fileSystemIdOf('ffffffff-ffff-ffff-ffff-ffffffffffff')).toBe('9223372036854775807.9223372036854775807');
    expect(fileSystemIdOf('00000000-0000-0002-0000-000000000004')).toBe('1.2');
  });

  it('is reread by a running server, unless its own part or the place of an export changes', () => {
    const before = configuration([exported(1), exported(2)], settings);
    const reread = (after: readonly Export[], other: Partial<ServerSettings> = {}): boolean => canBeReread(before, configuration(after, { ...settings, ...other }));
    expect(reread([exported(1)])).toBe(true);
    expect(reread([exported(1), exported(2, { readOnly: true, clients: ['192.0.2.9'] }), exported(3)])).toBe(true);
    expect(reread([exported(1), exported(2, { mountPath: '/mnt/o/renamed', path: 'renamed' })])).toBe(false);
    expect(reread([exported(1), exported(2, { uuid: '00000000-0000-4000-8000-000000000000' })])).toBe(false);
    expect(reread([exported(1), exported(2)], { port: 12049 })).toBe(false);
    expect(reread([exported(1, { options: { versions: '3,4' } }), exported(2)])).toBe(false);
  });
});

describe('sockets of the server', () => {
  it('are read as the kernel writes them', () => {
    const table = [
      '  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode',
      '   0: 0000000000000000FFFF00000100007F:0801 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0',
      '   1: 00000000000000000000000000000000:0801 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0',
      '   2: 0000000000000000FFFF00000100007F:0801 0000000000000000FFFF0000070200C0:C001 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0',
      '   3: B80D0120000000000000000007000000:0801 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 14 1 0',
      '   4: 0100007F:0801 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 15 1 0',
    ].join('\n');
    expect(parseTcpTable(table, new Set(['11', '12', '13', '14', '15'])).map(({ localAddress, localPort, remoteAddress, isListening, isConnected }) => [localAddress, localPort, remoteAddress, isListening, isConnected])).toEqual([
      ['127.0.0.1', 2049, '::', true, false], ['::', 2049, '::', true, false], ['127.0.0.1', 2049, '192.0.2.7', false, true], ['2001:db8::7', 2049, '::', true, false], ['127.0.0.1', 2049, '0.0.0.0', true, false],
    ]);
    expect(parseTcpTable(table, new Set())).toEqual([]);
  });

  it('belong to a client when its address is on the list', () => {
    const list = ['192.0.2.7', '198.51.100.0/24', '2001:db8::7'];
    expect(['192.0.2.7', '192.0.2.8', '198.51.100.200', '2001:db8::7', '2001:db8::8'].map((address) => isAmong(address, list))).toEqual([true, false, true, true, false]);
    expect(isAmong('192.0.2.8', ['*'])).toBe(true);
  });
});
