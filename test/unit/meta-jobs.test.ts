import { describe, expect, it } from 'vitest';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { JobRow, NewJob } from '../../blockstore/meta/rows.js';
import { ENDED_JOBS_MAX } from '../../blockstore/meta/job-table.js';
import { addNode, databasePath, expectError, openStore } from '../support/meta-store-fixture.js';

function addJob(store: MetaStore, fields: Partial<NewJob> = {}): JobRow {
  return store.jobs.insert({
    kind: 'fill',
    nodeId: 7,
    state: 'running',
    parameters: { rateBytesPerSecond: null, order: ['a', 1] },
    progressDone: 0,
    progressTotal: 16 * 1024 ** 4,
    message: null,
    createdUs: 1,
    updatedUs: 1,
    ...fields,
  });
}

describe('jobs', () => {
  it('come back as they were put in, across a restart', () => {
    const path = databasePath();
    const store = openStore(path);
    const job = addJob(store);
    const bare = addJob(store, { nodeId: null, parameters: null, message: 'é' });
    store.close();
    const again = openStore(path);
    expect(again.jobs.byId(job.id)).toEqual(job);
    expect(again.jobs.byId(bare.id)).toEqual(bare);
    expect(again.jobs.byId(99)).toBeUndefined();
  });

  it('change only what an update names', () => {
    const store = openStore();
    const job = addJob(store);
    store.jobs.update(job.id, { state: 'paused', progressDone: 4096, message: 'paused', updatedUs: 9 });
    expect(store.jobs.byId(job.id)).toEqual({ ...job, state: 'paused', progressDone: 4096, message: 'paused', updatedUs: 9 });
    store.jobs.update(job.id, { parameters: [1], message: null });
    expect(store.jobs.byId(job.id)).toMatchObject({ parameters: [1], message: null, state: 'paused' });
    expectError('not-found', () => { store.jobs.update(99, { state: 'failed' }); });
  });

  it('are listed by state, kind and node, and the latest is found', () => {
    const store = openStore();
    const first = addJob(store, { state: 'completed' });
    const second = addJob(store, { state: 'paused' });
    const other = addJob(store, { kind: 'import', nodeId: 8 });
    expect(store.jobs.list()).toEqual([first, second, other]);
    expect(store.jobs.list({ states: ['running', 'paused'] })).toEqual([second, other]);
    expect(store.jobs.list({ states: [] })).toEqual([]);
    expect(store.jobs.list({ kind: 'fill' })).toEqual([first, second]);
    expect(store.jobs.list({ nodeId: 8 })).toEqual([other]);
    expect(store.jobs.list({ nodeId: 7, states: ['completed'] })).toEqual([first]);
    expect(store.jobs.latestFor(7, 'fill')).toEqual(second);
    expect(store.jobs.latestFor(7, 'import')).toBeUndefined();
  });

  it('are forgotten when a thousand younger ones have ended, but not what is under way and not the last of a node that is there', () => {
    const store = openStore();
    const node = addNode(store, 'disk');
    const running = addJob(store, { state: 'running', nodeId: null });
    const ofNode = addJob(store, { state: 'completed', nodeId: node.id });
    const earlierOfNode = addJob(store, { state: 'failed', nodeId: node.id, kind: 'import' });
    const laterOfNode = addJob(store, { state: 'failed', nodeId: node.id, kind: 'import' });
    const gone = addJob(store, { state: 'completed', nodeId: node.id + 1000 });
    for (let i = 0; i < ENDED_JOBS_MAX + 150; i += 1) addJob(store, { state: 'completed', nodeId: null });
    store.jobs.trim();
    const kept = store.jobs.list();
    expect(kept.filter(({ nodeId, state }) => nodeId === null && state === 'completed')).toHaveLength(ENDED_JOBS_MAX);
    expect([running, ofNode, laterOfNode].map(({ id }) => store.jobs.byId(id)?.id)).toEqual([running.id, ofNode.id, laterOfNode.id]);
    expect([earlierOfNode, gone].map(({ id }) => store.jobs.byId(id))).toEqual([undefined, undefined]);
    // By itself as well, now and then.
    for (let i = 0; i < 300; i += 1) addJob(store, { state: 'completed', nodeId: null });
    expect(store.jobs.list().length).toBeLessThan(ENDED_JOBS_MAX + 110);
  });
});
