/**
 * A fault that cannot be written down, because the database lies on the same dying device: the disk stays faulted, the server
 * goes on, and the server after a kill heeds it before it believes the journal.
 */
import fs from 'node:fs';

import { afterEach, describe, expect, it, vi } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';

afterEach(() => { vi.restoreAllMocks(); });

describe('a fault that cannot be recorded', () => {
  it('faults the disk all the same, and is recorded by the next server', async () => {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', patterned(1, 4 * BLOCK_BYTES)), 'clone');
    fixture.acquire(clone);
    fixture.write(clone, 0, Buffer.alloc(BLOCK_BYTES, 7));
    vi.spyOn(fs, 'fdatasync').mockImplementation((_fd, done) => { done(Object.assign(new Error('EIO: i/o error'), { code: 'EIO', errno: -5, syscall: 'fdatasync' })); });
    const update = vi.spyOn(fixture.store.meta.nodes, 'update').mockImplementation(() => { throw new OffshootError('io-error', 'disk I/O error'); });

    await expect(fixture.store.flush(clone.id)).rejects.toMatchObject({ kind: 'faulted' });
    await expect(fixture.store.flush(clone.id)).rejects.toMatchObject({ kind: 'faulted' });
    expect(update).toHaveBeenCalled();
    expect(fixture.store.meta.nodes.byId(clone.id)?.fault).toBeNull();
    vi.restoreAllMocks();

    fixture.kill();
    expect(fixture.store.meta.nodes.byId(clone.id)?.fault).toContain('i/o error');
    expect(fixture.store.meta.ownership.ownedBlocks(fixture.store.meta.nodes.byId(clone.id)?.layerId ?? 0)).toBe(0);
  });
});
