/** Identities of machines: what they look like, that they follow from a seed, and what the table keeps unique. */
import { describe, expect, it } from 'vitest';

import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { newIdentity, normalMac, normalUuid, uuidFrom, type IdentityWish } from '../../daemon/machines/identities.js';
import { may } from '../../daemon/machines/permissions.js';
import { addNode, expectError, openStore } from '../support/meta-store-fixture.js';

const NOTHING_TAKEN: IdentityWish = { format: 'libvirt', macCount: 2, seed: null, path: 'lab/web1', isTaken: () => false };

describe('identities of machines', () => {
  it('are UUIDs of version 4 and MACs of the right makers, all different', () => {
    const made = Array.from({ length: 200 }, () => newIdentity(NOTHING_TAKEN));
    for (const { uuid, macs } of made) {
      expect(uuid).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/u);
      expect(macs).toHaveLength(2);
      for (const mac of macs) expect(mac).toMatch(/^52:54:00(?::[0-9a-f]{2}){3}$/u);
      expect(macs[0]).not.toBe(macs[1]);
    }
    expect(new Set(made.map(({ uuid }) => uuid)).size).toBe(200);
    for (let i = 0; i < 200; i += 1) expect(newIdentity({ ...NOTHING_TAKEN, format: 'vmx', macCount: 1 }).macs[0]).toMatch(/^00:50:56:[0-3][0-9a-f](?::[0-9a-f]{2}){2}$/u);
  });

  it('of version 5 are what RFC 9562 says', () => {
    expect(uuidFrom('www.example.com', Buffer.from('6ba7b8109dad11d180b400c04fd430c8', 'hex'))).toBe('2ed6657d-e927-568b-95e1-2665a8aea6a2');
  });

  it('follow from seed and path, and from nothing else', () => {
    const seeded = { ...NOTHING_TAKEN, seed: 'exercise' };
    const first = newIdentity(seeded);
    expect(newIdentity(seeded)).toEqual(first);
    expect(first.uuid).toMatch(/^[0-9a-f-]{14}5/u);
    for (const other of [{ seed: 'exercise2' }, { path: 'lab/web2' }]) {
      const { uuid, macs } = newIdentity({ ...seeded, ...other });
      expect(uuid).not.toBe(first.uuid);
      expect(macs).not.toEqual(first.macs);
    }
  });

  it('that are taken are drawn again, by the same rule', () => {
    const seeded = { ...NOTHING_TAKEN, seed: 'exercise' };
    const first = newIdentity(seeded);
    const taken = new Set([first.uuid, ...first.macs]);
    const wish = { ...seeded, isTaken: (_kind: string, value: string) => taken.has(value) };
    const second = newIdentity(wish);
    expect([second.uuid, ...second.macs].filter((value) => taken.has(value))).toEqual([]);
    expect(newIdentity(wish)).toEqual(second);
    expectError('already-exists', () => newIdentity({ ...seeded, isTaken: () => true }));
  });

  it('are written in one way, however they come', () => {
    expect(normalUuid('56 4D 11 22 33 44 55 66-77 88 99 AA BB CC DD EE')).toBe('564d1122-3344-5566-7788-99aabbccddee');
    expect(normalUuid('none')).toBeNull();
    expect(normalMac('52-54-00-AB-CD-EF')).toBe('52:54:00:ab:cd:ef');
    expect(normalMac('52:54:00:ab:cd')).toBeNull();
  });
});

describe('the table of machines', () => {
  function twoDirectories(): { readonly store: ReturnType<typeof openStore>; readonly ids: readonly [number, number] } {
    const store = openStore();
    return { store, ids: [addNode(store, 'a').id, addNode(store, 'b').id] };
  }
  const first = { format: 'libvirt', configuration: 'a.xml', name: 'a', uuid: 'uuid-a', macs: ['m1', 'm2'], state: 'ready', jobId: null } as const;

  it('keeps names, UUIDs and MACs unique, and says who has them', () => {
    const { store, ids } = twoDirectories();
    store.machines.insert({ ...first, nodeId: ids[0] });
    const other = { ...first, nodeId: ids[1], name: 'b', uuid: 'uuid-b', macs: ['m3'] };
    for (const clash of [{ name: 'a' }, { uuid: 'uuid-a' }, { macs: ['m3', 'm2'] }, { macs: ['m3', 'm3'] }]) {
      expect(expectError('already-exists', () => store.machines.insert({ ...other, ...clash })).message).toMatch(/"(?:a|b)"/u);
    }
    expect(store.machines.all()).toHaveLength(1);
    const made = store.machines.insert(other);
    expectError('already-exists', () => { store.machines.identify(made.id, { name: 'b', uuid: 'uuid-b', macs: ['m1'] }); });
    store.machines.identify(made.id, { name: 'c', uuid: 'uuid-b', macs: ['m4'] });
    expect(store.machines.byMac('m3')).toBeUndefined();
    expect(store.machines.byMac('m4')).toEqual({ ...made, name: 'c', macs: ['m4'] });
  });

  it('lets go of a machine with its directory, MACs and all', () => {
    const { store, ids } = twoDirectories();
    store.machines.insert({ ...first, nodeId: ids[0] });
    store.nodes.remove(ids[0]);
    expect(store.machines.all()).toEqual([]);
    store.machines.insert({ ...first, nodeId: ids[1] });
    expect(store.audit.unusualMachines()).toEqual([]);
    expect(store.nodes.childCount(ROOT_ID)).toBe(1);
  });

  it('knows each registration as not asked, asked, and registered, and a check sees what nobody finishes', () => {
    const { store, ids } = twoDirectories();
    const { id } = store.machines.insert({ ...first, nodeId: ids[0], state: 'making', jobId: 77 });
    store.machines.asked(id, 'libvirt');
    expect(store.machines.byId(id)).toMatchObject({ registration: 'asked', hypervisor: 'libvirt', externalId: null });
    store.machines.registered(id, 'libvirt', 'x');
    expect(store.machines.byId(id)).toMatchObject({ registration: 'registered', externalId: 'x' });
    expect(store.audit.unusualMachines()).toMatchObject([{ name: 'a', job_state: null }]);
    store.machines.ready(77);
    expect(store.audit.unusualMachines()).toEqual([]);
    store.machines.unregistered(id);
    expect(store.machines.byId(id)).toMatchObject({ registration: 'none', hypervisor: null, externalId: null, state: 'ready' });
  });
});

describe('permissions', () => {
  it('are those of the first class that fits: owner, group, others; root may everything', () => {
    const node = { uid: 10, gid: 20, mode: 0o046 };
    const user = (uid: number, gid: number, groups: readonly number[] = []) => ({ uid, gid, groups });
    expect(may(user(10, 20), node, 4)).toBe(false);
    expect(may(user(11, 20), node, 4)).toBe(true);
    expect(may(user(11, 1, [20]), node, 2)).toBe(false);
    expect(may(user(11, 1), node, 6)).toBe(true);
    expect(may(user(0, 0), { ...node, mode: 0 }, 7)).toBe(true);
  });
});
