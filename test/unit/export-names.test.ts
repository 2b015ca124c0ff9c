/**
 * Names that want to be more than names, by the thousand: what our checks let through means to Samba's own parser (testparm) what it says, and nothing else; and no name of
 * the store or of a client becomes a parameter of tgt, or an argument that nbdkit would read another way.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';

import { checkedClients } from '../../daemon/presenter/clients.js';
import { createIscsiPresenter, lunParameters, targetName } from '../../daemon/presenter/iscsi/iscsi.js';
import { createNbdPresenter } from '../../daemon/presenter/nbd/nbd.js';
import { createSmbPresenter } from '../../daemon/presenter/smb/smb.js';
import { isShareName, shareNameOf, smbConf, type SmbShare } from '../../daemon/presenter/smb/smb-conf.js';
import { exportOf } from '../support/exports-fixture.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const AT = { address: '127.0.0.1', port: 4450 };
const place = { directory: '/run/x/exports', mountDir: '/mnt', address: '127.0.0.1', logger: { info: () => undefined, warn: () => undefined } };
const cleanup = createCleanup();
afterAll(async () => { await cleanup.run(); });

/** Texts of pieces that mean something to somebody. */
const pieces = [
  '\n', '\r', '\r\n', '\t', '\0', '\u0085', '\u2028', '\u00a0', '\ud800', 'ü', '[global]', '[', ']', ']\n[global]', '%', '%u', '%%', '%$(HOME)', '"', '\'', '\\', '\\\n', '$(id)', '`id`', ';', '#', '=', ' = ', ',', ' ',
  '  ', '/', '//', '..', '/../', '-', '--', '@', '+', '&', '*', '0', 'a', 'B', 'guest ok = yes', 'include = /etc/passwd', 'root preexec = id', 'root', 'ALL', 'EXCEPT', 'lun=2', 'readonly=0', 'bstype=null', '127.0.0.1', '0.0.0.0/0', 'iqn.2004-10.com.example:a',
] as const;
const nasty = fc.oneof({ weight: 4, arbitrary: fc.array(fc.constantFrom(...pieces), { maxLength: 6 }).map((parts) => parts.join('')) }, { weight: 1, arbitrary: fc.string({ unit: 'binary', maxLength: 24 }) });
const shareOf = fc.record<SmbShare>({
  name: fc.oneof(fc.constant('vms'), nasty, nasty.map(shareNameOf)), path: nasty.map((text) => `/mnt/${text}`), users: fc.array(fc.oneof(fc.constant('alice'), nasty), { maxLength: 3 }),
  hosts: fc.array(fc.oneof(fc.constant('192.0.2.0/24'), nasty), { maxLength: 3 }), readOnly: fc.boolean(), encryption: fc.constantFrom('required', 'desired'),
});

function taken(body: () => string): string | null {
  try {
    return body();
  } catch (error) {
    expect(error).toMatchObject({ kind: 'invalid-argument' });
    return null;
  }
}

/** What testparm understands: by section, each setting that is not Samba's own. */
function understood(file: string): ReadonlyMap<string, ReadonlyMap<string, string>> {
  const { status, stdout, stderr } = spawnSync('testparm', ['--suppress-prompt', file], { encoding: 'utf8', timeout: 60_000, maxBuffer: 64 * 1024 ** 2 });
  expect([status, stderr.split('\n').filter((line) => /unknown parameter|ignoring|invalid|error:/iu.test(line))]).toEqual([0, []]);
  const sections = new Map<string, Map<string, string>>();
  let current = new Map<string, string>();
  for (const line of stdout.split('\n')) {
    const section = /^\[(.*)\]$/u.exec(line)?.[1];
    if (section !== undefined) sections.set(section, current = new Map<string, string>());
    const [, name, value] = /^\t([^=]+?) = ([^]*)$/u.exec(line) ?? [];
    if (name !== undefined) current.set(name, value!);
  }
  return sections;
}

describe.skipIf(lacks('testparm'))('a share of any name, for anybody', () => {
  it('is refused, or is to Samba exactly that share: its section and no other, its path, its users, and no guest', () => {
    const directory = makeTempDir('smb-names', cleanup);
    for (const name of ['private', 'state', 'cache', 'rpc']) mkdirSync(join(directory, name));
    let checked = 0;
    for (let round = 0; round < 6; round += 1) {
      const accepted = fc.sample(shareOf, 3000).flatMap((share) => {
        const text = taken(() => smbConf(AT, directory, [share]));
        if (text === null) return [];
        // No more lines than those of any other share.
        expect(text.split('\n').length).toBe(smbConf(AT, directory, [{ ...share, name: 'x', path: '/x', users: ['x'] }]).split('\n').length);
        return [share];
      });
      const shares = accepted.map((share, index) => ({ ...share, name: `${share.name.slice(0, 40)}x${index}` }));
      const file = join(directory, `${round}.conf`);
      writeFileSync(file, smbConf(AT, directory, shares));
      const sections = understood(file);
      expect([...sections.keys()].toSorted()).toEqual(['global', ...shares.map(({ name }) => name)].toSorted());
      expect([...sections].filter(([, settings]) => settings.has('include') || settings.has('root preexec') || settings.get('guest ok') === 'Yes')).toEqual([]);
      for (const { name, path, users, hosts, readOnly } of shares) {
        const settings = sections.get(name);
        expect({ path: settings?.get('path'), users: settings?.get('valid users'), hosts: settings?.get('hosts allow'), deny: settings?.get('hosts deny'), isWritable: settings?.get('read only') === 'No' })
          .toEqual({ path, users: users.join(' '), hosts: hosts.join(' '), deny: 'ALL', isWritable: !readOnly });
      }
      checked += shares.length;
    }
    expect(checked).toBeGreaterThan(100);
  });

  it('has, whatever lies in the store, a name that Samba takes; and no path that a check lets through is refused later', () => {
    fc.assert(fc.property(nasty, nasty, (path, mountPath) => {
      expect(isShareName(shareNameOf(path))).toBe(true);
      const wanted = exportOf(place, path, { mountPath: `/mnt/${mountPath}`, kind: 'directory', sizeBytes: null, clients: ['alice'], options: { 'password-file': '/etc/passwords' } });
      const isTaken = taken(() => { createSmbPresenter(place).check(wanted); return ''; }) !== null;
      const share: SmbShare = { name: shareNameOf(path), path: wanted.mountPath, users: ['alice'], hosts: ['127.0.0.1'], readOnly: false, encryption: 'required' };
      expect(taken(() => smbConf(AT, '/run/x', [share])) !== null).toBe(isTaken);
    }), { numRuns: 3000 });
  });
});

describe('what tgt is told', () => {
  it('has nothing of a name of the store, and clients are names without anything that parts a list or a line', () => {
    fc.assert(fc.property(nasty, nasty, nasty, (path, mountPath, client) => {
      const disk = exportOf(place, path, { mountPath: `/mnt/${mountPath}` });
      const plain = { ...disk, path: 'vms/a.img', mountPath: '/mnt/vms/a.img' };
      expect([targetName(disk), lunParameters(disk)]).toEqual([targetName(plain), lunParameters(plain)]);
      expect(targetName(disk)).toMatch(/^iqn\.2026-11\.offshoot:[0-9a-f-]{36}$/u);
      const names = taken(() => checkedClients([client], 'iscsi', 'initiators').join('\n'));
      if (names !== null) {
        expect(names).toMatch(/^[a-z0-9._:-]{5,223}$/u);
        expect(names).not.toMatch(/^-/u);
      }
      // The presenter itself, to whoever does not ask clients.ts first.
      if (taken(() => { createIscsiPresenter(place).check({ ...disk, clients: [client] }); return client; }) !== null) expect(client).toMatch(/^(?:iqn|eui|naa)\.[a-z0-9._:-]+$/u);
    }), { numRuns: 3000 });
  });

  it.each(['alice\n', 'a,password=x', 'a b', '-x y', '', 'a'.repeat(65), '%', 'ä'])('has no account %j', (account) => {
    const disk = exportOf(place, 'vms/a.img', { clients: ['iqn.2004-10.com.example:a'], options: { account, 'password-file': '/x' } });
    expect(() => { createIscsiPresenter(place).check(disk); }).toThrow(expect.objectContaining({ kind: 'invalid-argument' }) as Error);
  });
});

describe('a user of a share', () => {
  it('is a name, and never a list, a group, a variable or root', () => {
    fc.assert(fc.property(nasty, (user) => {
      const names = taken(() => checkedClients([user], 'smb', 'users').join('\n'));
      if (names !== null) expect(names).toMatch(/^[A-Za-z_][A-Za-z0-9._-]*$/u);
      const wanted = exportOf(place, 'vms', { kind: 'directory', sizeBytes: null, clients: [user], options: { 'password-file': '/etc/passwords' } });
      if (taken(() => { createSmbPresenter(place).check(wanted); return ''; }) !== null) expect(user).toMatch(/^(?!root$)[A-Za-z_][A-Za-z0-9._-]*$/u);
    }), { numRuns: 3000 });
  });
});

describe('the name of an NBD export', () => {
  it('has no control characters, which end an argument or a line of a log', () => {
    fc.assert(fc.property(nasty, (name) => {
      const wanted = exportOf(place, 'vms/a.img', { clients: ['127.0.0.1'], options: { name } });
      if (taken(() => { createNbdPresenter(place).check(wanted); return ''; }) !== null) expect(name).not.toMatch(/\p{Cc}/u);
    }), { numRuns: 3000 });
  });
});
