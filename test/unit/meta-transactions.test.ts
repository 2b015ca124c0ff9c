import Database from 'better-sqlite3';
import { describe, expect, it } from 'vitest';
import { migrate, MIGRATIONS } from '../../blockstore/meta/migrations.js';
import { openDatabase } from '../../blockstore/meta/open-database.js';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { SqlConnection } from '../../blockstore/meta/sql-connection.js';
import { addLayer, addNode, databasePath, expectError, openStore } from '../support/meta-store-fixture.js';

describe('migrations', () => {
  it('are numbered from 1 without gaps', () => {
    expect(MIGRATIONS.map(({ version }) => version)).toEqual(MIGRATIONS.map((_, index) => index + 1));
  });

  it('stop at the last whole step when one fails, and go on from there', () => {
    const database = new Database(databasePath());
    const newest = MIGRATIONS.length;
    const steps = [
      ...MIGRATIONS,
      {
        version: newest + 1,
        apply: (target: Database.Database): void => {
          target.exec('CREATE TABLE half (x)');
          throw new Error('killed here');
        },
      },
    ];
    expect(() => { migrate(database, steps); }).toThrow('killed here');
    expect(database.pragma('user_version', { simple: true })).toBe(newest);
    const tables = (): unknown[] => database.prepare("SELECT name FROM sqlite_schema WHERE name = 'half'").all();
    expect(tables()).toEqual([]);
    migrate(database, [...MIGRATIONS, { version: newest + 1, apply: (target) => { target.exec('CREATE TABLE half (x)'); } }]);
    expect(database.pragma('user_version', { simple: true })).toBe(newest + 1);
    expect(tables()).toHaveLength(1);
    expectError('store-version', () => { migrate(database); });
    database.close();
  });
});

describe('transactions', () => {
  it('run everything that waits for the commit, also when some of it throws', () => {
    const store = openStore();
    const ran: number[] = [];
    expect(() => {
      store.transaction(() => {
        store.afterCommit(() => { throw new Error('first'); });
        store.afterCommit(() => ran.push(2));
        store.afterCommit(() => { throw new Error('third'); });
        store.afterCommit(() => ran.push(4));
        addNode(store, 'committed');
      });
    }).toThrow('first');
    expect(ran).toEqual([2, 4]);
    expect(store.nodes.child(ROOT_ID, 'committed')).toBeDefined();
    store.transaction(() => undefined);
    expect(ran).toEqual([2, 4]);
  });

  it('happen whole or not at all', () => {
    const store = openStore();
    expect(() =>
      store.transaction(() => {
        addNode(store, 'vms');
        throw new Error('stop');
      }),
    ).toThrow('stop');
    expect(store.nodes.childCount(ROOT_ID)).toBe(0);
    expect(store.transaction(() => addNode(store, 'vms').name)).toBe('vms');
    expect(store.nodes.childCount(ROOT_ID)).toBe(1);
  });

  it('join the one around them', () => {
    const store = openStore();
    expect(() =>
      store.transaction(() => {
        store.transaction(() => addNode(store, 'inner'));
        throw new Error('stop');
      }),
    ).toThrow('stop');
    expect(store.nodes.childCount(ROOT_ID)).toBe(0);
  });

  it('undo a nested one that failed, and go on if the body dealt with that', () => {
    const store = openStore();
    const seen: string[] = [];
    store.transaction(() => {
      addNode(store, 'before');
      expect(() =>
        store.transaction(() => {
          addNode(store, 'half');
          store.afterCommit(() => { seen.push('half'); });
          store.transaction(() => addNode(store, 'deeper'));
          throw new Error('nested');
        }),
      ).toThrow('nested');
      store.transaction(() => {
        addNode(store, 'after');
        store.afterCommit(() => { seen.push('after'); });
      });
    });
    expect(store.nodes.children(ROOT_ID, 0, 10).map((node) => node.name)).toEqual(['before', 'after']);
    expect(seen).toEqual(['after']);
  });

  it('go on after a taken name that the body dealt with', () => {
    const store = openStore();
    addNode(store, 'taken');
    store.transaction(() => {
      expectError('already-exists', () => addNode(store, 'taken'));
      addNode(store, 'free');
    });
    expect(store.nodes.childCount(ROOT_ID)).toBe(2);
  });

  it('run what was asked for after the commit only then, and only if there was one', () => {
    const store = openStore();
    const seen: string[] = [];
    const note = (text: string): void => {
      store.afterCommit(() => {
        seen.push(text);
        store.transaction(() => addNode(store, text));
      });
    };
    store.transaction(() => {
      store.transaction(() => { note('inner'); });
      note('outer');
      expect(seen).toEqual([]);
    });
    expect(seen).toEqual(['inner', 'outer']);
    expect(() =>
      store.transaction(() => {
        note('never');
        throw new Error('stop');
      }),
    ).toThrow('stop');
    note('outside');
    expect(seen).toEqual(['inner', 'outer', 'outside']);
    expect(store.nodes.childCount(ROOT_ID)).toBe(3);
  });

  it('fail whole when the store is full, and go on when there is room again', () => {
    const database = openDatabase(databasePath());
    const connection = new SqlConnection(database);
    const fill = connection.prepare('INSERT INTO jobs (kind, state, parameters, progress_done, progress_total, created_us, updated_us) VALUES (?, ?, ?, 0, 0, 0, 0)');
    const count = connection.prepare<{ readonly count: number }>('SELECT count(*) AS count FROM jobs');
    const addMany = (): void => {
      connection.transaction(() => {
        for (let index = 0; index < 100; index += 1) fill.run('fill', 'running', 'x'.repeat(1000));
      });
    };
    database.pragma('max_page_count = 30');
    expect(expectError('no-space', addMany).message).toContain('free some space');
    expect(count.get()?.count).toBe(0);
    database.pragma('max_page_count = 1000');
    addMany();
    expect(count.get()?.count).toBe(100);
    connection.close();
  });

  it('refuse an asynchronous body', () => {
    const store = openStore();
    expect(() => store.transaction(() => Promise.resolve(addNode(store, 'late')))).toThrow(/asynchronous/);
    expect(store.nodes.childCount(ROOT_ID)).toBe(0);
  });

  it('take no more changes after an error that leaves doubt, but still answer reads', () => {
    const store = openStore();
    addNode(store, 'vms');
    const statement = (): never => {
      throw new Database.SqliteError('disk I/O error', 'SQLITE_IOERR_FSYNC');
    };
    expectError('io-error', () => store.transaction(statement));
    expect(expectError('io-error', () => store.transaction(() => addNode(store, 'more'))).message).toContain('restart the daemon');
    expectError('io-error', () => addLayer(store));
    expect(store.nodes.childCount(ROOT_ID)).toBe(1);
  });
});
