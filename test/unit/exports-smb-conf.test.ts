/**
 * What is said to Samba and to tgt: names that would say more than a name are refused, and what smb.conf, tgtadm's output and passwords hold is read as it is meant.
 */
import { chmodSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, describe, expect, it } from 'vitest';

import { createIscsiPresenter, lunParameters } from '../../daemon/presenter/iscsi/iscsi.js';
import { accountRequest, parseTargets } from '../../daemon/presenter/iscsi/tgtd.js';
import { listeningOf, settledListen } from '../../daemon/presenter/listen.js';
import type { Export } from '../../daemon/presenter/presenter.js';
import { digestOf, isDigestOf, readSecretLines } from '../../daemon/presenter/secrets.js';
import { createSmbPresenter } from '../../daemon/presenter/smb/smb.js';
import { isShareName, shareNameOf, smbConf, type SmbShare } from '../../daemon/presenter/smb/smb-conf.js';
import { exportOf } from '../support/exports-fixture.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const AT = { address: '127.0.0.1', port: 4450 };
const SHARE: SmbShare = { name: 'vms', path: '/mnt/vms', users: ['alice'], hosts: ['192.0.2.0/24', '2001:db8::1'], readOnly: true, encryption: 'required' };
const place = { directory: '/run/x/exports', mountDir: '/mnt', address: '127.0.0.1', logger: { info: () => undefined, warn: () => undefined } };
const cleanup = createCleanup();
afterAll(async () => { await cleanup.run(); });

describe('the text of smb.conf', () => {
  it('has one section for each share, with all that keeps others out', () => {
    const lines = smbConf(AT, '/run/x', [SHARE, { ...SHARE, name: 'b', readOnly: false }]).split('\n');
    expect(lines.filter((line) => line.startsWith('['))).toEqual(['[global]', '[vms]', '[b]']);
    expect(lines.slice(lines.indexOf('[vms]'), lines.indexOf('[b]'))).toEqual([
      '[vms]', '\tpath = /mnt/vms', '\tvalid users = alice', '\thosts allow = 192.0.2.0/24 2001:db8::1', '\thosts deny = ALL', '\tguest ok = no', '\tbrowseable = no',
      '\tread only = yes', '\tsmb encrypt = required', '',
    ]);
    for (const line of ['server min protocol = SMB3', 'map to guest = Never', 'follow symlinks = no', 'wide links = no', 'strict sync = yes', 'oplocks = no', 'interfaces = 127.0.0.1', 'bind interfaces only = yes', 'smb ports = 4450']) {
      expect(lines).toContain(`\t${line}`);
    }
  });

  it.each(['/mnt/a\nguest ok = yes', '/mnt/a\r', '/mnt/%u', '/mnt/$(x)%', '/mnt/a"b', '/mnt/a\\', '/mnt/a ', ' /mnt', '/mnt/a  b', '/mnt/\ud800', '/mnt/\u0000', ''])('does not take the path %j', (path) => {
    expect(() => smbConf(AT, '/run/x', [{ ...SHARE, path }])).toThrow(/cannot be said to Samba/u);
    expect(() => { createSmbPresenter(place).check(wantedShare({ mountPath: path })); }).toThrow(/cannot be said to Samba/u);
  });

  it.each([
    ['name', 'a]\n[global'], ['name', 'global'], ['name', 'homes'], ['name', 'print$'], ['name', 'IPC$'], ['name', '../x'], ['name', ''],
    ['users', ['@admins']], ['users', ['a, root']], ['users', ['%U']], ['users', ['a\nguest ok = yes']], ['users', []],
    ['hosts', ['ALL']], ['hosts', ['EXCEPT']], ['hosts', []],
  ] as const)('does not take %s %j', (key, value) => {
    expect(() => smbConf(AT, '/run/x', [{ ...SHARE, [key]: value }])).toThrow();
  });

  it('is given names that Samba takes, whatever the path', () => {
    expect(['vms', 'vms/Web Servers, 2', 'global', 'x/homes', 'ä', '[]', 'a/..b..', `x/${'long'.repeat(40)}`].map(shareNameOf))
      .toEqual(['vms', 'web-servers-2', 'share-global', 'share-homes', 'share', 'share', 'b', 'long'.repeat(12)]);
    for (const name of ['share-global', 'web-servers-2']) expect(isShareName(name)).toBe(true);
  });
});

function wantedShare(given: Partial<Export> = {}): Export {
  const { options, ...rest } = given;
  return exportOf(place, 'vms', { kind: 'directory', sizeBytes: null, clients: ['alice'], options: { 'password-file': '/etc/passwords', ...options }, ...rest });
}

describe('an export that', () => {
  it.each([
    ['is a disk', { kind: 'disk' }], ['is for root', { clients: ['root'] }], ['is for a group', { clients: ['@all'] }], ['is for nobody', { clients: [] }],
    ['is for everywhere', { options: { hosts: 'ALL' } }], ['is for a name', { options: { hosts: '192.0.2.1,example.com' } }], ['is for too much of a network', { options: { hosts: '192.0.2.0/33' } }],
    ['has a relative password file', { options: { 'password-file': 'x' } }], ['has its passwords under the mount', { options: { 'password-file': `${place.mountDir}/vms/p` } }],
    ['has them there by a detour', { options: { 'password-file': `/x/../${place.mountDir}//vms/p` } }], ['has no encryption', { options: { encryption: 'off' } }], ['has an option of nobody', { options: { guest: 'ok' } }],
    ['has a share of Samba\'s own', { options: { share: 'homes' } }], ['listens nowhere', { options: { listen: 'localhost:445' } }], ['listens at no port', { options: { listen: '127.0.0.1:0' } }],
  ] as const)('%s is refused by SMB', (_what, given) => {
    expect(() => { createSmbPresenter(place).check(wantedShare()); }).not.toThrow();
    expect(() => { createSmbPresenter(place).check(wantedShare(given)); }).toThrow(expect.objectContaining({ kind: 'invalid-argument' }) as Error);
  });

  it.each([
    ['is a directory', { kind: 'directory', sizeBytes: null }], ['is for everybody', { clients: ['ALL'] }], ['is for an address', { clients: ['192.0.2.1'] }], ['is for two in one', { clients: ['iqn.2004-10.com.example:a,b'] }],
    ['is for nobody', { clients: [] }], ['has an account without a password', { options: { account: 'a' } }], ['has a password without an account', { options: { 'password-file': '/x' } }],
    ['has its password under the mount', { options: { account: 'a', 'password-file': `${place.mountDir}/vms/p` } }],
    ['has an account with a comma', { options: { account: 'a,password=b', 'password-file': '/x' } }], ['has an option of nobody', { options: { lun: '2' } }], ['has a UUID of another kind', { uuid: 'x,readonly=0' }],
  ] as const)('%s is refused by iSCSI', (_what, given) => {
    const disk = (more: Partial<Export> = {}): Export => exportOf(place, 'vms/a.img', { clients: ['iqn.2004-10.com.example:a'], ...more });
    expect(() => { createIscsiPresenter(place).check(disk()); }).not.toThrow();
    expect(() => { createIscsiPresenter(place).check(disk(given)); }).toThrow(expect.objectContaining({ kind: 'invalid-argument' }) as Error);
  });

  it('has no share or port yet is given one, once, which no other has', async () => {
    const presenter = createSmbPresenter(place);
    const signal = new AbortController().signal;
    const first = { ...wantedShare(), options: await presenter.settle?.(wantedShare(), [], { signal }) ?? {} };
    expect(first.options).toMatchObject({ listen: '127.0.0.1:445', share: 'vms' });
    expect(await presenter.settle?.(wantedShare(), [first], { signal })).toMatchObject({ share: 'vms-2' });
    await expect(presenter.settle?.(wantedShare({ options: { share: 'vms' } }), [first], { signal })).rejects.toMatchObject({ kind: 'already-exists' });
    expect(() => settledListen({ options: { listen: '192.0.2.1:445' } }, [first], AT)).toThrow(expect.objectContaining({ kind: 'conflict' }) as Error);
    expect(['[::1]:99', ':99', '::1', '192.0.2.1'].map((listen) => listeningOf({ options: { listen } }, AT))).toEqual([
      { address: '::1', port: 99 }, { address: '127.0.0.1', port: 99 }, { address: '::1', port: 4450 }, { address: '192.0.2.1', port: 4450 },
    ]);
  });
});

describe('tgt', () => {
  it('is understood in what it shows', () => {
    const text = [
      'Target 7: iqn.2026-11.offshoot:x', '    System information:', '        Driver: iscsi', '    I_T nexus information:', '        I_T nexus: 3', '            Initiator: iqn.a:b alias: host: x',
      '            Connection: 0', '                IP Address: 192.0.2.1', '    LUN information:', '        LUN: 0', '            Readonly: No', '            Backing store path: None',
      '        LUN: 1', '            Readonly: Yes', '            Backing store path: /run/x/disks/u', '    Account information:', '        alice', '    ACL information:', '        iqn.a:b', '        iqn.a:c',
      'Target 8: iqn.2026-11.offshoot:y', '    ACL information:', '',
    ].join('\n');
    expect(parseTargets(text)).toEqual([
      {
        tid: 7, name: 'iqn.2026-11.offshoot:x', accounts: ['alice'], clients: ['iqn.a:b', 'iqn.a:c'], sessions: [{ sid: 3, cids: [0], initiator: 'iqn.a:b', addresses: ['192.0.2.1'] }],
        luns: [{ lun: 0, path: 'None', readOnly: false }, { lun: 1, path: '/run/x/disks/u', readOnly: true }],
      },
      { tid: 8, name: 'iqn.2026-11.offshoot:y', accounts: [], clients: [], sessions: [], luns: [] },
    ]);
    expect(parseTargets('')).toEqual([]);
  });

  it.each([
    ['a part of its own', ['    ACL information:', '        iqn.evil:x']], ['all the parts', ['    LUN information:', '    Account information:', '    ACL information:', '        iqn.evil:x']],
    ['an unknown part', ['    Other information:']], ['another target', ['Target 8: iqn.2026-11.offshoot:z', '    I_T nexus information:']], ['another by its name', ['Target 9: iqn.2026-11.offshoot:y', '    I_T nexus information:']],
    ['the target itself', ['Target 7: iqn.2026-11.offshoot:x', '    I_T nexus information:']], ['the same session', ['        I_T nexus: 3', '            Initiator: iqn.evil:x']],
    ['a LUN, and hides the heading', ['    LUN information:', '        LUN: 1', '            Backing store path: /etc/shadow', 'hidden']],
  ] as const)('is not believed where a client\'s alias pretends %s', (_what, alias) => {
    const hides = alias.at(-1) === 'hidden';
    const text = [
      'Target 7: iqn.2026-11.offshoot:x', '    System information:', '    I_T nexus information:', '        I_T nexus: 3', '            Initiator: iqn.a:b alias: host', ...alias.slice(0, hides ? -1 : undefined),
      ...(hides ? ['cut off here    LUN information:'] : ['            Connection: 0', '                IP Address: 192.0.2.1', '    LUN information:']),
      '        LUN: 0', '            Backing store path: None', '        LUN: 1', '            Backing store path: /run/x/disks/u', '    Account information:', '    ACL information:', '        iqn.a:b',
      'Target 8: iqn.2026-11.offshoot:y', '    System information:', '    I_T nexus information:', '    LUN information:', '    Account information:', '    ACL information:', '        iqn.a:c', '',
    ];
    expect(() => parseTargets(text.join('\n'))).toThrow(/alias with lines/u);
  });

  it('is told an account as tgtadm 1.0.85 tells it, captured', () => {
    const captured = `0700000000000000${Buffer.from('iscsi').toString('hex')}${'00'.repeat(59)}99000000ffffffff0000000000000000ffffffffffffffff`;
    const request = accountRequest('alice', 'sekritsekrit');
    expect(request.toString('hex').startsWith(captured)).toBe(true);
    expect(request.subarray(captured.length / 2, 120).every((byte) => byte === 0)).toBe(true);
    expect(request.subarray(120).toString('latin1')).toBe('user=alice,password=sekritsekrit\0');
    expect(() => accountRequest('a', 'x'.repeat(1000))).toThrow('too long');
  });

  it('is given an identity that follows from the UUID, in as many bytes as it keeps', () => {
    const disk = exportOf(place, 'vms/a.img', {});
    expect(lunParameters(disk)).toBe(lunParameters({ ...disk, id: 99, path: 'b', mountPath: '/x' }));
    expect(lunParameters(disk)).not.toBe(lunParameters(exportOf(place, 'vms/a.img', {})));
    expect([true, false].map((readOnly) => /readonly=[01]/u.exec(lunParameters({ ...disk, readOnly }))?.[0])).toEqual(['readonly=1', 'readonly=0']);
    expect(/scsi_sn=([^,]*),scsi_id=([^,]*)/u.exec(lunParameters(disk))?.slice(1).map((text) => text.length)).toEqual([36, 24]);
  });
});

describe('a password file', () => {
  it('is read when it is ours alone, and known again by a digest that does not show it', async () => {
    const directory = makeTempDir('secret', cleanup);
    const file = join(directory, 'password');
    writeFileSync(file, 'one\r\n\ntwo\n', { mode: 0o600 });
    expect(await readSecretLines(file)).toEqual(['one', 'two']);
    chmodSync(file, 0o604);
    await expect(readSecretLines(file)).rejects.toThrow('chmod 0600');
    chmodSync(file, 0o600);
    symlinkSync(file, join(directory, 'link'));
    for (const other of [join(directory, 'link'), join(directory, 'none'), directory]) await expect(readSecretLines(other), other).rejects.toThrow();
    const digest = digestOf('one');
    expect([digest.includes('one'), isDigestOf(digest, 'one'), isDigestOf(digest, 'two'), isDigestOf('', 'one'), digest === digestOf('one')]).toEqual([false, true, false, false, false]);
  });
});
