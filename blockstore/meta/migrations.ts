/**
 * The schema, as numbered steps. A released step is never edited: a change is a new step at the end.
 *
 * Each step runs in one transaction together with the `user_version` it leads to, so that a process killed at any
 * instruction leaves the store at one version or at the next, never between. FORMAT.md explains every column.
 */
import { randomInt } from 'node:crypto';
import type Database from 'better-sqlite3';
import { OffshootError } from '../errors.js';

/** 'Offs', in SQLite's header at offset 68: tells an Offshoot database from any other. */
export const APPLICATION_ID = 0x4f666673;

export interface Migration {
  /** The user_version that this step leads to; the steps are numbered from 1 without gaps. */
  readonly version: number;
  readonly apply: (database: Database.Database) => void;
}

/** Generation of a new node: random, so that an old NFS handle is not guessed; never 0, which some clients take for none. */
export function newGeneration(): number {
  return randomInt(1, 2 ** 32);
}

const SCHEMA_1 = `
CREATE TABLE layers (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL CHECK (kind IN ('store', 'external')),
  external_path TEXT,
  external_identity TEXT,
  backing_id INTEGER REFERENCES layers(id),
  backing_limit_bytes INTEGER CHECK (backing_limit_bytes >= 0),
  size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
  sealed INTEGER NOT NULL CHECK (sealed IN (0, 1)),
  complete INTEGER NOT NULL CHECK (complete IN (0, 1)),
  created_us INTEGER NOT NULL,
  written_by INTEGER,
  CHECK ((kind = 'external') = (external_path IS NOT NULL)),
  CHECK ((kind = 'external') = (external_identity IS NOT NULL)),
  CHECK (kind = 'store' OR sealed = 1),
  CHECK (backing_id <> id)
) STRICT;
CREATE INDEX layers_by_backing ON layers(backing_id);

CREATE TABLE nodes (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  parent_id INTEGER REFERENCES nodes(id),
  name TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('directory', 'file', 'disk', 'symlink')),
  mode INTEGER NOT NULL CHECK (mode BETWEEN 0 AND 4095),
  uid INTEGER NOT NULL CHECK (uid BETWEEN 0 AND 4294967295),
  gid INTEGER NOT NULL CHECK (gid BETWEEN 0 AND 4294967295),
  size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
  atime_us INTEGER NOT NULL,
  mtime_us INTEGER NOT NULL,
  ctime_us INTEGER NOT NULL,
  created_us INTEGER NOT NULL,
  generation INTEGER NOT NULL CHECK (generation BETWEEN 1 AND 4294967295),
  layer_id INTEGER REFERENCES layers(id),
  link_target TEXT,
  copy_on_read INTEGER NOT NULL CHECK (copy_on_read IN (0, 1)),
  fault TEXT,
  UNIQUE (parent_id, name),
  CHECK ((kind IN ('file', 'disk')) = (layer_id IS NOT NULL)),
  CHECK ((kind = 'symlink') = (link_target IS NOT NULL)),
  CHECK (parent_id IS NULL OR (length(CAST(name AS BLOB)) BETWEEN 1 AND 255 AND instr(name, '/') = 0)),
  CHECK (parent_id IS NOT NULL OR name = ''),
  CHECK (parent_id <> id),
  CHECK (id <> 1 OR (parent_id IS NULL AND kind = 'directory'))
) STRICT;
CREATE INDEX nodes_by_parent ON nodes(parent_id);
CREATE INDEX directories_by_parent ON nodes(parent_id) WHERE kind = 'directory';
CREATE UNIQUE INDEX nodes_by_layer ON nodes(layer_id);

CREATE TABLE ownership (
  layer_id INTEGER NOT NULL REFERENCES layers(id) ON DELETE CASCADE,
  first_page INTEGER NOT NULL CHECK (first_page >= 0),
  page_count INTEGER NOT NULL CHECK (page_count >= 1),
  owned_blocks INTEGER NOT NULL,
  bitmap BLOB,
  PRIMARY KEY (layer_id, first_page),
  CHECK (
    (bitmap IS NULL AND owned_blocks = page_count * 2048)
    OR (length(bitmap) = 256 AND page_count = 1 AND owned_blocks BETWEEN 1 AND 2047)
  )
) STRICT, WITHOUT ROWID;

CREATE TABLE jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL,
  node_id INTEGER,
  state TEXT NOT NULL CHECK (state IN ('running', 'paused', 'completed', 'failed', 'cancelled')),
  parameters TEXT NOT NULL,
  progress_done INTEGER NOT NULL CHECK (progress_done >= 0),
  progress_total INTEGER NOT NULL CHECK (progress_total >= 0),
  message TEXT,
  created_us INTEGER NOT NULL,
  updated_us INTEGER NOT NULL
) STRICT;
CREATE INDEX jobs_by_state ON jobs(state);
CREATE INDEX jobs_by_node ON jobs(node_id, kind);
`;

/** Checksums of sealed layers, and what a scrub found wrong with them. */
const SCHEMA_2 = `
CREATE TABLE layer_checksums (
  layer_id INTEGER PRIMARY KEY REFERENCES layers(id) ON DELETE CASCADE,
  algorithm TEXT NOT NULL,
  piece_bytes INTEGER NOT NULL CHECK (piece_bytes >= 4096),
  complete INTEGER NOT NULL CHECK (complete IN (0, 1)),
  computed_us INTEGER,
  verified_us INTEGER,
  CHECK ((complete = 1) = (computed_us IS NOT NULL))
) STRICT;

CREATE TABLE checksums (
  layer_id INTEGER NOT NULL REFERENCES layer_checksums(layer_id) ON DELETE CASCADE,
  first_piece INTEGER NOT NULL CHECK (first_piece >= 0 AND first_piece % 64 = 0),
  hashes BLOB NOT NULL CHECK (length(hashes) BETWEEN 32 AND 2048 AND length(hashes) % 32 = 0),
  PRIMARY KEY (layer_id, first_piece)
) STRICT, WITHOUT ROWID;

CREATE TABLE damages (
  layer_id INTEGER NOT NULL REFERENCES layers(id) ON DELETE CASCADE,
  offset_bytes INTEGER NOT NULL CHECK (offset_bytes >= 0),
  length_bytes INTEGER NOT NULL CHECK (length_bytes > 0),
  kind TEXT NOT NULL CHECK (kind IN ('damaged', 'unreadable')),
  found_us INTEGER NOT NULL,
  PRIMARY KEY (layer_id, offset_bytes)
) STRICT, WITHOUT ROWID;
`;

/** Snapshots (trees of frozen nodes), limits of containers, and blocks that a layer has from elsewhere than its backing. */
const SCHEMA_3 = `
ALTER TABLE nodes ADD COLUMN frozen INTEGER NOT NULL DEFAULT 0 CHECK (frozen IN (0, 1));

CREATE TABLE snapshots (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  container_id INTEGER NOT NULL REFERENCES nodes(id),
  name TEXT NOT NULL CHECK (length(CAST(name AS BLOB)) BETWEEN 1 AND 255),
  directory_id INTEGER NOT NULL UNIQUE REFERENCES nodes(id),
  path TEXT,
  uuid TEXT NOT NULL UNIQUE,
  consistency TEXT NOT NULL CHECK (consistency IN ('crash', 'application')),
  message TEXT,
  created_us INTEGER NOT NULL,
  UNIQUE (container_id, name)
) STRICT;

CREATE TABLE snapshot_clones (
  node_id INTEGER PRIMARY KEY REFERENCES nodes(id) ON DELETE CASCADE,
  source_id INTEGER NOT NULL REFERENCES nodes(id) ON DELETE CASCADE
) STRICT;
CREATE INDEX snapshot_clones_by_source ON snapshot_clones(source_id);

CREATE TABLE quotas (
  node_id INTEGER PRIMARY KEY REFERENCES nodes(id) ON DELETE CASCADE,
  limit_bytes INTEGER NOT NULL CHECK (limit_bytes > 0)
) STRICT;

CREATE TABLE shared_extents (
  layer_id INTEGER NOT NULL REFERENCES layers(id) ON DELETE CASCADE,
  first_block INTEGER NOT NULL CHECK (first_block >= 0),
  block_count INTEGER NOT NULL CHECK (block_count >= 1),
  source_layer_id INTEGER REFERENCES layers(id),
  source_block INTEGER NOT NULL CHECK (source_block >= 0),
  limit_bytes INTEGER,
  PRIMARY KEY (layer_id, first_block),
  CHECK (source_layer_id <> layer_id),
  CHECK (limit_bytes IS NULL OR (source_layer_id IS NOT NULL AND limit_bytes > (block_count - 1) * 4096 AND limit_bytes < block_count * 4096))
) STRICT, WITHOUT ROWID;
CREATE INDEX shared_extents_by_source ON shared_extents(source_layer_id);
`;

const SCHEMA_4 = `
CREATE TABLE machines (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  node_id INTEGER NOT NULL UNIQUE REFERENCES nodes(id) ON DELETE CASCADE,
  format TEXT NOT NULL,
  configuration TEXT NOT NULL,
  name TEXT NOT NULL UNIQUE,
  uuid TEXT NOT NULL UNIQUE,
  state TEXT NOT NULL CHECK (state IN ('making', 'ready')),
  job_id INTEGER,
  hypervisor TEXT,
  registration TEXT NOT NULL CHECK (registration IN ('none', 'asked', 'registered')),
  external_id TEXT,
  created_us INTEGER NOT NULL,
  CHECK (state = 'ready' OR job_id IS NOT NULL),
  CHECK ((registration = 'none') = (hypervisor IS NULL)),
  CHECK ((registration = 'registered') = (external_id IS NOT NULL))
) STRICT;
CREATE INDEX machines_by_job ON machines(job_id);

CREATE TABLE machine_macs (
  mac TEXT PRIMARY KEY,
  machine_id INTEGER NOT NULL REFERENCES machines(id) ON DELETE CASCADE,
  position INTEGER NOT NULL CHECK (position >= 0),
  UNIQUE (machine_id, position)
) STRICT, WITHOUT ROWID;
`;

/** What is shown to others, container files of staged machines, what is attached as a block device, and machines deployed from container files. */
const SCHEMA_5 = `
CREATE TABLE exports (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  uuid TEXT NOT NULL UNIQUE,
  node_id INTEGER NOT NULL REFERENCES nodes(id) ON DELETE CASCADE,
  kind TEXT NOT NULL CHECK (kind IN ('nfs', 'smb', 'iscsi', 'nbd', 'block')),
  clients TEXT NOT NULL CHECK (json_valid(clients)),
  read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
  options TEXT NOT NULL CHECK (json_valid(options)),
  created_us INTEGER NOT NULL,
  UNIQUE (node_id, kind)
) STRICT;

CREATE TABLE vdisks (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  uuid TEXT NOT NULL UNIQUE,
  node_id INTEGER NOT NULL UNIQUE REFERENCES nodes(id) ON DELETE CASCADE,
  format TEXT NOT NULL,
  configuration TEXT NOT NULL,
  name TEXT NOT NULL,
  description TEXT NOT NULL CHECK (json_valid(description)),
  state TEXT NOT NULL CHECK (state IN ('making', 'ready')),
  job_id INTEGER,
  created_us INTEGER NOT NULL,
  CHECK (state = 'ready' OR job_id IS NOT NULL)
) STRICT;
CREATE INDEX vdisks_by_job ON vdisks(job_id);

CREATE TABLE attachments (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  node_id INTEGER NOT NULL UNIQUE REFERENCES nodes(id) ON DELETE CASCADE,
  device TEXT,
  purpose TEXT NOT NULL CHECK (purpose IN ('stage', 'deploy', 'block')),
  job_id INTEGER,
  created_us INTEGER NOT NULL
) STRICT;
CREATE INDEX attachments_by_job ON attachments(job_id);

CREATE TABLE deployments (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  vdisk_id INTEGER REFERENCES vdisks(id) ON DELETE SET NULL,
  node_id INTEGER NOT NULL UNIQUE REFERENCES nodes(id) ON DELETE CASCADE,
  name TEXT NOT NULL UNIQUE,
  uuid TEXT NOT NULL UNIQUE,
  macs TEXT NOT NULL CHECK (json_valid(macs)),
  mount_point TEXT NOT NULL UNIQUE,
  state TEXT NOT NULL CHECK (state IN ('making', 'ready', 'ending')),
  job_id INTEGER,
  hypervisor TEXT,
  registration TEXT NOT NULL CHECK (registration IN ('none', 'asked', 'registered')),
  external_id TEXT,
  created_us INTEGER NOT NULL,
  CHECK (state = 'ready' OR job_id IS NOT NULL),
  CHECK ((registration = 'none') = (hypervisor IS NULL)),
  CHECK ((registration = 'registered') = (external_id IS NOT NULL))
) STRICT;
CREATE INDEX deployments_by_vdisk ON deployments(vdisk_id);
CREATE INDEX deployments_by_job ON deployments(job_id);
`;

function createSchema(database: Database.Database): void {
  database.pragma(`application_id = ${APPLICATION_ID}`);
  database.exec(SCHEMA_1);
  const nowUs = Date.now() * 1000;
  database
    .prepare(
      `INSERT INTO nodes (id, parent_id, name, kind, mode, uid, gid, size_bytes, atime_us, mtime_us, ctime_us, created_us, generation, copy_on_read)
       VALUES (1, NULL, '', 'directory', ?, 0, 0, 0, ?, ?, ?, ?, ?, 0)`,
    )
    .run(0o755, nowUs, nowUs, nowUs, nowUs, newGeneration());
}

export const MIGRATIONS: readonly Migration[] = [
  { version: 1, apply: createSchema },
  { version: 2, apply: (database) => { database.exec(SCHEMA_2); } },
  { version: 3, apply: (database) => { database.exec(SCHEMA_3); } },
  { version: 4, apply: (database) => { database.exec(SCHEMA_4); } },
  { version: 5, apply: (database) => { database.exec(SCHEMA_5); } },
];

/** The newest version that this program knows. */
export const SCHEMA_VERSION = MIGRATIONS.length;

/** Brings the database from its version to the last of `migrations`, one transaction a step. */
export function migrate(database: Database.Database, migrations: readonly Migration[] = MIGRATIONS): void {
  const current = schemaVersionOf(database);
  refuseNewer(current, migrations.length);
  for (const migration of migrations.slice(current)) {
    database
      .transaction(() => {
        migration.apply(database);
        database.pragma(`user_version = ${migration.version}`);
      })
      .immediate();
  }
}

/** Throws `store-version` when a store is of a format that this program does not know yet. */
export function refuseNewer(storeVersion: number, knownVersion: number = SCHEMA_VERSION): void {
  if (storeVersion <= knownVersion) return;
  throw new OffshootError(
    'store-version',
    `the store was written by a newer Offshoot (format ${storeVersion}; this one knows formats up to ${knownVersion}): start it with that version, or use another store`,
    { storeVersion, knownVersion },
  );
}

/** The user_version of an open database. */
export function schemaVersionOf(database: Database.Database): number {
  return database.pragma('user_version', { simple: true }) as number;
}
