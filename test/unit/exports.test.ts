/** What exports promise whatever presents them: over a presenter of the test's that shows what it is told, or refuses. */
import { afterEach, describe, expect, it, vi } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { Exports, type ExportRequest } from '../../daemon/presenter/exports.js';
import type { Export, ExportAddress, Presenter, PresenterAbilities } from '../../daemon/presenter/presenter.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { controlParts } from '../support/control-parts.js';

const CONTENT = patterned(1, 64 * 1024);
const REQUEST: ExportRequest = { path: 'vms/a.img', kind: 'nbd', clients: ['127.0.0.1'], readOnly: false, options: {} };
const opened: Exports[] = [];

class ScriptedPresenter implements Presenter {
  readonly id = 'nbd';
  readonly abilities: PresenterAbilities = { directories: false, disks: true, clients: 'addresses', encryption: null, knowsClients: true };
  readonly told: (readonly Export[])[] = [];
  refusal: OffshootError | null = null;
  lostReason: string | null = null;
  users: readonly string[] = [];
  ended = 0;
  usable = true;
  port = 100;

  probe(): ReturnType<Presenter['probe']> { return Promise.resolve(this.usable ? { usable: true, version: '1' } : { usable: false, reason: 'it is not installed' }); }
  check({ options }: Export): void { if (options['wrong'] !== undefined) throw new OffshootError('invalid-argument', 'wrong option'); }
  settle({ options }: Export): Promise<Readonly<Record<string, string>>> {
    this.port += 1;
    return Promise.resolve({ port: String(this.port), ...options });
  }
  apply(wanted: readonly Export[]): Promise<readonly ExportAddress[]> {
    this.told.push(wanted);
    if (this.refusal !== null) return Promise.reject(this.refusal);
    this.lostReason = null;
    return Promise.resolve(wanted.map(({ id, options }) => ({ id, addresses: [`test:${options['port'] ?? ''}`] })));
  }
  clientsOf(): Promise<readonly string[]> { return Promise.resolve(this.users); }
  lost(): Promise<string | null> { return Promise.resolve(this.lostReason); }
  end(): Promise<void> {
    this.ended += 1;
    return Promise.resolve();
  }
  names(): (readonly string[] | undefined) { return this.told.at(-1)?.map(({ path }) => path); }
}

function bed(test = new TestStore()): { readonly test: TestStore; readonly presenter: ScriptedPresenter; readonly warned: string[]; readonly open: () => Promise<Exports> } {
  const presenter = new ScriptedPresenter();
  const warned: string[] = [];
  const { references } = controlParts(test.store);
  const open = async (): Promise<Exports> => {
    const exports = new Exports({
      meta: test.store.meta, references, presenters: [presenter], mountDir: '/mnt/x', lookMs: 5, onFatal: (error) => { throw error; },
      logger: { info: () => undefined, warn: (_context, message) => { warned.push(message); } },
    });
    opened.push(exports);
    await exports.start();
    return exports;
  };
  return { test, presenter, warned, open };
}

/** A container with a disk, and a snapshot of it. */
async function filled(): Promise<ReturnType<typeof bed>> {
  const made = bed();
  const { fileSystem, snapshots } = controlParts(made.test.store);
  const vms = fileSystem.mkdir(1, 'vms', 0o755, { uid: 0, gid: 0, pid: 1 }).nodeId;
  for (const name of ['a.img', 'b.img']) {
    const image = made.test.image(name, CONTENT);
    made.test.store.meta.nodes.move(image.id, vms, name);
  }
  await snapshots.create({ reference: 'vms@s1', quiesce: null });
  return made;
}

afterEach(async () => { for (const exports of opened.splice(0)) await exports.close({ mountIsGone: false }); });

describe('exports', () => {
  it('are told as the whole list, kept with what was settled, and shown again by the next server', async () => {
    const { presenter, open, test } = await filled();
    const exports = await open();
    expect(presenter.told).toEqual([[]]);
    const first = await exports.present(REQUEST);
    await exports.present({ ...REQUEST, path: 'vms/b.img', readOnly: true });
    expect(presenter.names()).toEqual(['vms/a.img', 'vms/b.img']);
    expect(presenter.told.at(-1)?.[1]).toMatchObject({ mountPath: '/mnt/x/vms/b.img', kind: 'disk', sizeBytes: CONTENT.length, readOnly: true, options: { port: '102' } });
    await exports.close({ mountIsGone: false });
    expect(presenter.ended).toBe(0);
    const next = await open();
    expect(presenter.names()).toEqual(['vms/a.img', 'vms/b.img']);
    expect((await next.list())[0]).toMatchObject({ row: { id: first.row.id, uuid: first.row.uuid, options: { port: '101' } }, addresses: ['test:101'], failure: null });
    await next.withdraw({ id: first.row.id }, { force: false });
    expect(presenter.names()).toEqual(['vms/b.img']);
    expect(test.store.meta.exports.all()).toHaveLength(1);
  });

  it('that are refused leave no row, and a withdrawal that is refused leaves it', async () => {
    const { presenter, open, test } = await filled();
    const exports = await open();
    presenter.refusal = new OffshootError('in-use', 'no');
    await expect(exports.present(REQUEST)).rejects.toMatchObject({ kind: 'in-use' });
    expect(test.store.meta.exports.all()).toEqual([]);
    presenter.refusal = null;
    const { row } = await exports.present(REQUEST);
    presenter.refusal = new OffshootError('io-error', 'no');
    await expect(exports.withdraw({ path: 'vms/a.img', kind: 'nbd' }, { force: false })).rejects.toMatchObject({ kind: 'io-error' });
    expect(test.store.meta.exports.all()).toEqual([row]);
  });

  it('are checked before anything is done', async () => {
    const { presenter, open, test } = await filled();
    const exports = await open();
    const cases: readonly (readonly [Partial<ExportRequest>, string])[] = [
      [{ path: 'vms' }, 'not-supported'], [{ path: 'none' }, 'not-found'], [{ kind: 'smb' }, 'not-supported'], [{ clients: [] }, 'invalid-argument'], [{ clients: ['*'] }, 'invalid-argument'],
      [{ path: 'vms/a.img@s1' }, 'invalid-argument'], [{ options: { wrong: 'x' } }, 'invalid-argument'],
    ];
    for (const [change, kind] of cases) await expect(exports.present({ ...REQUEST, ...change }), JSON.stringify(change)).rejects.toMatchObject({ kind });
    presenter.usable = false;
    await expect(exports.present(REQUEST)).rejects.toMatchObject({ kind: 'not-supported', message: expect.stringContaining('not installed') as string });
    presenter.usable = true;
    const attachment = test.store.meta.attachments.insert({ nodeId: test.store.meta.nodes.byPath('vms/a.img')!.id, purpose: 'block', jobId: null });
    await expect(exports.present(REQUEST)).rejects.toMatchObject({ kind: 'in-use' });
    test.store.meta.attachments.remove(attachment);
    expect(presenter.told).toEqual([[]]);
    await exports.present({ ...REQUEST, path: 'vms/a.img@s1', readOnly: true });
    await exports.present(REQUEST);
    await expect(exports.present(REQUEST)).rejects.toMatchObject({ kind: 'already-exists' });
    await expect(exports.withdraw({ path: 'vms/b.img', kind: null }, { force: false })).rejects.toMatchObject({ kind: 'not-found' });
  });

  it('in use are neither withdrawn nor ended unless forced; ended ones are in the table, and begun again', async () => {
    const { presenter, open, test } = await filled();
    const exports = await open();
    await exports.present(REQUEST);
    presenter.users = ['192.0.2.9'];
    await expect(exports.withdraw({ path: 'vms/a.img', kind: null }, { force: false })).rejects.toMatchObject({ kind: 'in-use', message: expect.stringContaining('192.0.2.9') as string });
    await expect(exports.suspend({ force: false })).rejects.toMatchObject({ kind: 'in-use' });
    expect(presenter.ended).toBe(0);
    await exports.suspend({ force: true });
    expect(presenter.ended).toBe(1);
    await expect(exports.present({ ...REQUEST, path: 'vms/b.img' })).rejects.toMatchObject({ kind: 'busy' });
    expect(test.store.meta.exports.all()).toHaveLength(1);
    const toldBefore = presenter.told.length;
    presenter.lostReason = 'ended, as it should be';
    await new Promise((resolve) => { setTimeout(resolve, 50); });
    expect(presenter.told).toHaveLength(toldBefore);
    await exports.resume();
    expect(presenter.names()).toEqual(['vms/a.img']);
    await exports.withdraw({ path: 'vms/a.img', kind: null }, { force: true });
    expect(presenter.names()).toEqual([]);
  });

  it('that are lost are shown again, ever later when that does not help, and that is said once', async () => {
    const { presenter, open, warned } = await filled();
    const exports = await open();
    await exports.present(REQUEST);
    presenter.lostReason = 'the server died';
    await vi.waitFor(() => { expect(presenter.told).toHaveLength(3); }, 60_000);
    expect((await exports.list())[0]).toMatchObject({ losses: 1, failure: null });
    presenter.refusal = new OffshootError('io-error', 'the port is taken');
    presenter.lostReason = 'it died again';
    await vi.waitFor(async () => { expect((await exports.list())[0]).toMatchObject({ losses: 2, failure: 'the port is taken' }); }, 60_000);
    const tries = presenter.told.length;
    await new Promise((resolve) => { setTimeout(resolve, 200); });
    expect(presenter.told.length - tries, 'dozens of looks in that time').toBeLessThan(5);
    presenter.refusal = null;
    await vi.waitFor(async () => { expect((await exports.list())[0]).toMatchObject({ failure: null, addresses: ['test:101'] }); }, 60_000);
    expect(warned.filter((message) => message.includes('lost'))).toHaveLength(2);
    expect(warned.filter((message) => message.includes('cannot be shown'))).toHaveLength(1);
  });

  it('end with the mount, and not with the server', async () => {
    const { presenter, open } = await filled();
    const exports = await open();
    await exports.present(REQUEST);
    await exports.close({ mountIsGone: true });
    expect(presenter.ended).toBe(1);
  });

  it('keep their names', async () => {
    const { open, test } = await filled();
    const exports = await open();
    const { fileSystem: { namespace } } = controlParts(test.store);
    const vms = test.store.meta.nodes.byPath('vms')!.id;
    await exports.present(REQUEST);
    const plain = { noReplace: false, exchange: false };
    const attempts: readonly (() => void)[] = [
      () => { namespace.unlink(vms, 'a.img'); }, () => { namespace.rename(vms, 'a.img', vms, 'c.img', plain); }, () => { namespace.rename(vms, 'b.img', vms, 'a.img', plain); },
      () => { namespace.rename(vms, 'a.img', vms, 'b.img', { noReplace: false, exchange: true }); }, () => { namespace.rename(1, 'vms', 1, 'other', plain); },
    ];
    for (const attempt of attempts) expect(attempt).toThrow(/offshoot withdraw vms\/a\.img --as nbd/u);
    await exports.withdraw({ path: 'vms/a.img', kind: 'nbd' }, { force: false });
    namespace.unlink(vms, 'a.img');
  });
});
