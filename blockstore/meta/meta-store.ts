/**
 * The metadata store: one SQLite database that says which nodes, layers, owned blocks and jobs there are.
 *
 * Main thread only, and the only writer of the database. Promises: a transaction that returned is durable (WAL,
 * synchronous FULL) and survives kill -9 and power loss whole; one that threw, or was under way when the process died,
 * never happened. Refuses to open what is newer than it is, damaged, or not its own. Data files, their order of
 * writes, and the lock that keeps a second daemon away are the business of others.
 */
import { AttachmentTable } from './attachment-table.js';
import { Audit } from './audit.js';
import { ChecksumTable } from './checksum-table.js';
import { DeploymentTable } from './deployment-table.js';
import { ExportTable } from './export-table.js';
import { JobTable } from './job-table.js';
import { LayerLinks } from './layer-links.js';
import { LayerTable } from './layer-table.js';
import { Listing } from './listing.js';
import { MachineTable } from './machine-table.js';
import { NodeTable } from './node-table.js';
import { reserveLogIndex } from './log-index.js';
import { openDatabase, sqliteVersionOf } from './open-database.js';
import { OwnershipTable } from './ownership-table.js';
import { QuotaTable } from './quota-table.js';
import { SharedExtentTable } from './shared-extent-table.js';
import { SnapshotTable } from './snapshot-table.js';
import { SpaceReader } from './space-reader.js';
import { SqlConnection } from './sql-connection.js';
import { VdiskTable } from './vdisk-table.js';

export class MetaStore {
  readonly nodes: NodeTable;
  readonly layers: LayerTable;
  readonly links: LayerLinks;
  readonly ownership: OwnershipTable;
  readonly sharedExtents: SharedExtentTable;
  readonly jobs: JobTable;
  readonly listing: Listing;
  readonly audit: Audit;
  readonly checksums: ChecksumTable;
  readonly snapshots: SnapshotTable;
  readonly quotas: QuotaTable;
  readonly machines: MachineTable;
  readonly exports: ExportTable;
  readonly vdisks: VdiskTable;
  readonly attachments: AttachmentTable;
  readonly deployments: DeploymentTable;
  readonly space: SpaceReader;
  readonly sqliteVersion: string;
  readonly #connection: SqlConnection;

  private constructor(connection: SqlConnection, sqliteVersion: string) {
    this.#connection = connection;
    this.sqliteVersion = sqliteVersion;
    this.nodes = new NodeTable(connection);
    this.layers = new LayerTable(connection);
    this.links = new LayerLinks(connection);
    this.ownership = new OwnershipTable(connection);
    this.sharedExtents = new SharedExtentTable(connection);
    this.jobs = new JobTable(connection);
    this.listing = new Listing(connection);
    this.audit = new Audit(connection);
    this.checksums = new ChecksumTable(connection);
    this.snapshots = new SnapshotTable(connection);
    this.quotas = new QuotaTable(connection);
    this.machines = new MachineTable(connection);
    this.exports = new ExportTable(connection);
    this.vdisks = new VdiskTable(connection);
    this.attachments = new AttachmentTable(connection);
    this.deployments = new DeploymentTable(connection, this.machines);
    this.space = new SpaceReader(connection);
  }

  /** Opens the database at `path`, or makes it. `store-damaged` and `store-version` change nothing on disk. */
  static open(path: string): MetaStore {
    const database = openDatabase(path);
    return new MetaStore(new SqlConnection(database, reserveLogIndex(path)), sqliteVersionOf(database));
  }

  /**
   * Runs `body` in one transaction: all of it is durable when this returns, none of it happened when this throws. A
   * call within another joins the outer one: it is undone when it throws, and durable with the outer one. Not asynchronous.
   */
  transaction<T>(body: () => T): T {
    return this.#connection.transaction(body);
  }

  /** Runs `callback` before each outermost transaction: the last moment to make room for it. */
  beforeTransaction(callback: () => void): void {
    this.#connection.beforeTransaction(callback);
  }

  /**
   * Runs `callback` once the transaction around this call is durable, and never if it fails; at once outside of any.
   * For what only a durable change allows: unlinking files, telling others. It may begin transactions of its own.
   */
  afterCommit(callback: () => void): void {
    this.#connection.afterCommit(callback);
  }

  /**
   * Moves committed changes from the write-ahead log into the database file, without waiting for anybody; called by a
   * timer, between commits. `idle`: nothing else is going on, so the log may be cut to nothing as well.
   */
  checkpoint(options: { readonly idle?: boolean } = {}): void {
    this.#connection.checkpoint(options.idle === true ? 'truncate' : 'passive');
  }

  /**
   * Checkpoints and closes; a second call does nothing. Not closing is safe, too: the next open recovers. After an
   * error that left doubt about what is on disk nothing is closed, nor written: end the process.
   */
  close(): void {
    this.#connection.close();
  }
}
