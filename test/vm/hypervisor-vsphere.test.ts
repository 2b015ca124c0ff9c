/**
 * vSphere by real SOAP calls: against govmomi's simulator, as one ESXi host and as a vCenter, over TLS with its certificate pinned.
 *
 * What came of a call is asked of the simulator, which reads it with a client of its own; see test/support/vcsim. What a real ESXi does
 * beyond the simulator is in daemon/hypervisor/vsphere/VSPHERE.md.
 */
import { randomUUID } from 'node:crypto';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { MachineToRegister } from '../../daemon/hypervisor/hypervisor.js';
import type { VsphereSettings } from '../../daemon/hypervisor/vsphere/settings.js';
import { Vsphere } from '../../daemon/hypervisor/vsphere/vsphere.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { startVcsim, VCSIM_PACKAGES, VCSIM_PASSWORD, VCSIM_USER, type SimulatedMachine, type Vcsim } from '../support/vcsim.js';

const DATASTORE = 'offshoot';
const NFS = { datastore: DATASTORE, server: '192.0.2.7', path: '/export/offshoot', version: 3, readOnly: false } as const;
const LONG_MS = 120_000;
const options = { signal: new AbortController().signal };
const MODELS = [
  { model: 'esx', hosts: 1, place: {} },
  { model: 'vpx', hosts: 4, place: { datacenter: 'DC0', resourcePool: 'DC0/host/DC0_C0/Resources' } },
] as const;

describe.skipIf(lacks(...VCSIM_PACKAGES)).each(MODELS)('vSphere, the model $model', ({ model, hosts, place }) => {
  const cleanup = createCleanup();
  let simulator: Vcsim;
  let vsphere: Vsphere;
  let number = 0;

  beforeAll(async () => {
    simulator = await startVcsim(model, cleanup);
    mkdirSync(join(simulator.directory, DATASTORE));
    vsphere = adapter();
  });
  afterAll(() => cleanup.run());

  function adapter(changes: Partial<VsphereSettings> & { readonly password?: string } = {}, at: Vcsim = simulator): Vsphere {
    const { password = VCSIM_PASSWORD, ...settings } = changes;
    const credentialsFile = join(makeTempDir('vsphere', cleanup), 'credentials');
    writeFileSync(credentialsFile, `${VCSIM_USER}\n${password}\n`, { mode: 0o600 });
    const made = new Vsphere({
      host: at.host, port: at.port, trust: { by: 'thumbprint', sha256: at.thumbprint }, credentialsFile,
      datastores: [{ directory: join(at.directory, DATASTORE), datastore: DATASTORE }],
      datacenter: null, folder: null, resourcePool: null, callTimeoutMs: LONG_MS, taskTimeoutMs: LONG_MS, ...place, ...settings,
    });
    cleanup.add(() => made.close());
    return made;
  }

  /** A machine with its .vmx where the datastore has it. */
  function machine(changes: { readonly name?: string; readonly uuid?: string; readonly uuidInFile?: string; readonly directory?: string } = {}): MachineToRegister {
    number += 1;
    const name = changes.name ?? `machine ${number} & <co>`;
    const uuid = changes.uuid ?? randomUUID();
    const directory = changes.directory ?? join(simulator.directory, DATASTORE, 'farm', `m${number}`);
    const digits = (changes.uuidInFile ?? uuid).replaceAll('-', '').match(/../gu) ?? [];
    const text = `config.version = "8"\nuuid.bios = "${digits.slice(0, 8).join(' ')}-${digits.slice(8).join(' ')}"\ndisplayName = "${name}"\n`;
    mkdirSync(directory, { recursive: true });
    writeFileSync(join(directory, 'machine.vmx'), text);
    return { name, uuid, directory, configuration: 'machine.vmx', text, owner: { uid: 0, gid: 0 } };
  }
  const registered = async (uuid: string): Promise<readonly SimulatedMachine[]> => (await simulator.machines()).filter((each) => each.uuid === uuid);
  const failure = async (promise: Promise<unknown>): Promise<Error> => promise.then(
    (value) => { throw new Error(`it succeeded: ${JSON.stringify(value)}`); },
    (error: unknown) => error as Error,
  );

  it('is usable once the mount is a datastore of every host', async () => {
    expect(await vsphere.probe(options)).toMatchObject({ usable: false, reason: expect.stringContaining(`no datastore '${DATASTORE}'`) as string });
    expect(await failure(vsphere.refresh(options))).toMatchObject({ kind: 'not-found' });
    expect(await vsphere.mountDatastore(NFS, options)).toHaveLength(hosts);
    expect(await simulator.datastores()).toMatchObject([{ name: DATASTORE, server: NFS.server, path: NFS.path, type: 'NFS' }]);
    expect(await vsphere.probe(options)).toMatchObject({ usable: true, version: '6.5.0' });
  });

  it('leaves a datastore that is there already, and refuses one that is something else', async () => {
    const before = await simulator.calls('CreateNasDatastore');
    expect(await vsphere.mountDatastore(NFS, options)).toHaveLength(hosts);
    expect(await simulator.calls('CreateNasDatastore')).toBe(before);
    expect(await failure(vsphere.mountDatastore({ ...NFS, path: '/export/other' }, options))).toMatchObject({
      kind: 'already-exists', message: expect.stringContaining('192.0.2.7:/export/offshoot') as string,
    });
    expect(await failure(vsphere.mountDatastore({ ...NFS, datastore: 'LocalDS_0' }, options))).toMatchObject({ kind: 'already-exists' });
    expect(await simulator.datastores()).toHaveLength(1);
  });

  it('looks at its storage again', async () => {
    await vsphere.refresh(options);
    for (const call of ['RescanAllHba', 'RescanVmfs', 'RefreshStorageSystem']) expect(await simulator.calls(call), call).toBe(hosts);
    expect(await simulator.calls('RefreshDatastore')).toBe(1);
  });

  it('registers a machine from the datastore\'s path, and does not start it', async () => {
    const given = machine();
    const { externalId } = await vsphere.register(given, options);
    const [found, ...rest] = await registered(given.uuid);
    expect(rest).toEqual([]);
    expect(found).toMatchObject({ name: given.name, path: `[${DATASTORE}] farm/m${number}/machine.vmx`, power: 'poweredOff' });
    expect(externalId).toBe(`${found?.id ?? ''}/${given.uuid}`);
    expect(await vsphere.status(externalId, options)).toBe('shut-off');
  });

  it('gives the same id when it is registered again, by another server too', async () => {
    const given = machine();
    const first = await vsphere.register(given, options);
    const calls = await simulator.calls('RegisterVM_Task');
    expect(await vsphere.register(given, options)).toEqual(first);
    expect(await adapter().register(given, options)).toEqual(first);
    expect(await registered(given.uuid)).toHaveLength(1);
    expect(await simulator.calls('RegisterVM_Task')).toBe(calls);
  });

  it('finds what it has registered when nobody waited for the answer', async () => {
    const given = machine();
    const controller = new AbortController();
    const before = await simulator.calls('RegisterVM_Task');
    await simulator.delay('RegisterVM_Task', 300);
    const given1 = failure(adapter().register(given, { signal: controller.signal }));
    // The call has reached the server, which goes on without us.
    await expect.poll(() => simulator.calls('RegisterVM_Task'), { timeout: LONG_MS }).toBe(before + 1);
    controller.abort();
    expect(await given1).toMatchObject({ kind: 'cancelled' });
    // While it is going on still: whichever of the two is first, there is one machine.
    const { externalId } = await vsphere.register(given, options);
    await simulator.delay('RegisterVM_Task', 0);
    await expect.poll(async () => (await registered(given.uuid)).map(({ id }) => `${id}/${given.uuid}`), { timeout: LONG_MS }).toEqual([externalId]);
  });

  it('refuses a name, a UUID and a path that are taken, and registers nothing', async () => {
    const given = machine();
    await vsphere.register(given, options);
    const count = (await simulator.machines()).length;
    expect(await failure(vsphere.register(machine({ name: given.name }), options))).toMatchObject({ kind: 'already-exists', message: expect.stringMatching(/name .* is taken/u) as string });
    expect(await failure(vsphere.register(machine({ uuid: given.uuid }), options))).toMatchObject({
      kind: 'already-exists', message: expect.stringMatching(/UUID .* is taken.*farm/u) as string,
    });
    expect(await failure(vsphere.register({ ...given, uuid: randomUUID() }, options))).toMatchObject({
      kind: 'already-exists', message: expect.stringContaining('unregister that one first') as string,
    });
    expect(await simulator.machines()).toHaveLength(count);
  });

  it('refuses a machine whose file has another UUID than the store', async () => {
    const given = machine({ uuidInFile: randomUUID() });
    expect(await failure(vsphere.register(given, options))).toMatchObject({ kind: 'conflict', message: expect.stringContaining('uuid.bios') as string });
    expect((await simulator.machines()).filter(({ name }) => name === given.name)).toEqual([]);
  });

  it.each([
    ['FileFault', 'io-error', /FileFault, file \[offshoot\]/u],
    ['NoPermission', 'permission-denied', /VirtualMachine\.Inventory\.Register.*VSPHERE\.md/u],
    ['InsufficientMemoryResourcesFault', 'busy', /InsufficientMemoryResourcesFault/u],
    ['RestrictedVersion', 'not-permitted', /licence/u],
  ])('says why when the task ends with %s, and leaves nothing', async (fault, kind, message) => {
    const given = machine();
    await simulator.refuseNext('RegisterVM_Task', fault);
    expect(await failure(vsphere.register(given, options))).toMatchObject({ kind, message: expect.stringMatching(message) as string });
    expect(await registered(given.uuid)).toEqual([]);
    await vsphere.register(given, options);
  });

  it('says why when a call is refused at once', async () => {
    const { externalId } = await vsphere.register(machine(), options);
    await simulator.refuseNext('UnregisterVM', 'NoPermission');
    expect(await failure(vsphere.unregister(externalId, options))).toMatchObject({ kind: 'permission-denied' });
    expect(await vsphere.status(externalId, options)).toBe('shut-off');
  });

  it('starts and stops, and says so again when it is so already', async () => {
    const given = machine();
    const { externalId } = await vsphere.register(given, options);
    const power = async (): Promise<string | undefined> => (await registered(given.uuid))[0]?.power;
    for (let n = 0; n < 2; n += 1) {
      await vsphere.start(externalId, options);
      expect(await power()).toBe('poweredOn');
      expect(await vsphere.status(externalId, options)).toBe('running');
    }
    for (let n = 0; n < 2; n += 1) {
      await vsphere.stop(externalId, { ...options, force: true, timeoutMs: LONG_MS });
      expect(await power()).toBe('poweredOff');
      expect(await vsphere.status(externalId, options)).toBe('shut-off');
    }
  });

  it('asks a machine to shut down, and says when it cannot', async () => {
    const { externalId } = await vsphere.register(machine(), options);
    await vsphere.start(externalId, options);
    await simulator.refuseNext('ShutdownGuest', 'ToolsUnavailable');
    expect(await failure(vsphere.stop(externalId, { ...options, force: false, timeoutMs: LONG_MS }))).toMatchObject({ kind: 'not-supported', message: expect.stringContaining('VMware Tools') as string });
    expect(await vsphere.status(externalId, options)).toBe('running');
    await vsphere.stop(externalId, { ...options, force: false, timeoutMs: LONG_MS });
    expect(await vsphere.status(externalId, options)).toBe('shut-off');
    expect(await simulator.calls('ShutdownGuest')).toBe(2);
  });

  it('reaches VMware Tools where they run', async () => {
    const { externalId } = await vsphere.register(machine(), options);
    expect(await vsphere.pingAgent(externalId, options)).toBe(false);
    await simulator.runTools();
    expect(await vsphere.pingAgent(externalId, options)).toBe(true);
    expect(await failure(vsphere.freeze(externalId, options))).toMatchObject({ kind: 'not-supported' });
  });

  it('forgets a machine and none that runs, and one that is not known is no error', async () => {
    const given = machine();
    const { externalId } = await vsphere.register(given, options);
    await vsphere.start(externalId, options);
    expect(await failure(vsphere.unregister(externalId, options))).toMatchObject({ kind: 'in-use' });
    expect(await registered(given.uuid)).toHaveLength(1);
    await vsphere.stop(externalId, { ...options, force: true, timeoutMs: LONG_MS });
    await vsphere.unregister(externalId, options);
    expect(await registered(given.uuid)).toEqual([]);
    await vsphere.unregister(externalId, options);
    expect(await vsphere.status(externalId, options)).toBe('missing');
    expect(await failure(vsphere.start(externalId, options))).toMatchObject({ kind: 'not-found' });
    expect(await failure(vsphere.start('no id', options))).toMatchObject({ kind: 'not-found' });
  });

  it('leaves alone a machine that has got the id of one of ours', async () => {
    const given = machine();
    const { externalId } = await vsphere.register(given, options);
    const stale = `${externalId.split('/')[0] ?? ''}/${randomUUID()}`;
    expect(await vsphere.status(stale, options)).toBe('missing');
    await vsphere.unregister(stale, options);
    expect(await failure(vsphere.stop(stale, { ...options, force: true, timeoutMs: LONG_MS }))).toMatchObject({ kind: 'not-found' });
    expect(await registered(given.uuid)).toHaveLength(1);
  });

  it('goes on when its session has ended, and ends its session itself', async () => {
    const own = adapter();
    const { externalId } = await own.register(machine(), options);
    const logins = await simulator.calls('Login');
    expect(await simulator.expireSessions()).toBeGreaterThan(0);
    const given = machine();
    await own.register(given, options);
    expect(await registered(given.uuid)).toHaveLength(1);
    expect(await own.status(externalId, options)).toBe('shut-off');
    expect(await simulator.calls('Login')).toBe(logins + 1);
    const sessions = await simulator.sessions();
    await own.close();
    expect(await simulator.sessions()).toBe(sessions - 1);
  });

  it('registers twenty machines at once in one session', async () => {
    const own = adapter();
    const logins = await simulator.calls('Login');
    const many = Array.from({ length: 20 }, () => machine());
    const ids = await Promise.all(many.map((each) => own.register(each, options)));
    expect(new Set(ids.map(({ externalId }) => externalId)).size).toBe(many.length);
    const found = new Map((await simulator.machines()).map((each) => [each.uuid, each.name]));
    for (const each of many) expect(found.get(each.uuid)).toBe(each.name);
    expect(await simulator.calls('Login')).toBe(logins + 1);
  });

  it('refuses a wrong password without saying it', async () => {
    const wrong = adapter({ password: 'geheim' });
    const error = await failure(wrong.register(machine(), options));
    expect(error).toMatchObject({ kind: 'permission-denied', message: expect.stringContaining('InvalidLogin') as string });
    expect(JSON.stringify([error, error.message, error.stack])).not.toContain('geheim');
    expect(await wrong.probe(options)).toMatchObject({ usable: false, reason: expect.stringContaining('credentials file') as string });
  });

  it('gives up on an answer that does not come, and is not confused by it later', async () => {
    const { externalId } = await vsphere.register(machine(), options);
    await simulator.delay('RetrievePropertiesEx', 3000);
    expect(await failure(adapter({ callTimeoutMs: 1000 }).status(externalId, options))).toMatchObject({ kind: 'timed-out' });
    await simulator.delay('RetrievePropertiesEx', 0);
    expect(await vsphere.status(externalId, options)).toBe('shut-off');
  });

  it('says which names there are when it is to choose and may not', async () => {
    const free = adapter({ datacenter: null, resourcePool: null });
    if (model === 'esx') expect(await free.probe(options)).toMatchObject({ usable: true });
    else expect(await free.probe(options)).toMatchObject({ usable: false, reason: expect.stringMatching(/DC0_C0, DC0_H0/u) as string });
    expect(await adapter({ folder: 'nowhere/vm' }).probe(options)).toMatchObject({ usable: false, reason: expect.stringContaining('nowhere/vm') as string });
  });

  it('cannot be reached when the server is gone, in the middle too', async () => {
    const other = await startVcsim(model, cleanup);
    const own = adapter({}, other);
    expect(await own.probe(options)).toMatchObject({ usable: false, reason: expect.stringContaining('no datastore') as string });
    await other.delay('FindByDatastorePath', 60_000);
    const pending = failure(own.register({ ...machine(), directory: join(other.directory, DATASTORE, 'a') }, options));
    await expect.poll(() => other.calls('FindByDatastorePath'), { timeout: LONG_MS }).toBe(1);
    await other.kill();
    expect(await pending).toMatchObject({ kind: 'source-unreachable' });
    expect(await failure(own.status(`vm-1/${randomUUID()}`, options))).toMatchObject({ kind: 'source-unreachable' });
  });
});
