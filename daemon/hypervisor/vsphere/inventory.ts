/**
 * Where things are in a vSphere: the datacenter, the folder and the resource pool that machines are registered in, the hosts and the datastores.
 *
 * A single ESXi host has one of each, and nothing needs to be said. Where there is more than one, the administrator names it;
 * nothing is chosen for him.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { CallOptions } from '../hypervisor.js';
import { retrieve, retrieveOne, traversal, type PropertiesOf } from './properties.js';
import type { Session } from './session.js';
import type { VsphereSettings } from './settings.js';
import { asObject, childOf, childrenOf, objectElement, textElement, type ManagedObject } from './xml.js';

/** Where machines are registered. */
export interface Place {
  readonly datacenter: ManagedObject;
  readonly hostFolder: ManagedObject;
  readonly datastoreFolder: ManagedObject;
  readonly folder: ManagedObject;
  readonly pool: ManagedObject;
}

export interface Host {
  readonly name: string;
  readonly object: ManagedObject;
  readonly datastoreSystem: ManagedObject | null;
  readonly storageSystem: ManagedObject | null;
  readonly datastores: readonly ManagedObject[];
}

const FOLDERS = [traversal('folders', 'Folder', 'childEntity', ['folders'])];
const COMPUTE_PATHS = ['name', 'resourcePool', 'host'];
const COMPUTE_TYPES = { ComputeResource: COMPUTE_PATHS, ClusterComputeResource: COMPUTE_PATHS };

export async function findPlace(session: Session, settings: VsphereSettings, options: CallOptions): Promise<Place> {
  const datacenter = await findDatacenter(session, settings, options);
  const folders = await retrieveOne(session, datacenter, ['vmFolder', 'hostFolder', 'datastoreFolder'], options);
  const hostFolder = need(asObject(folders.get('hostFolder')), 'a folder for hosts');
  const datastoreFolder = need(asObject(folders.get('datastoreFolder')), 'a folder for datastores');
  const folder = settings.folder === null ? need(asObject(folders.get('vmFolder')), 'a folder for machines')
    : await findByPath(session, settings.folder, 'Folder', 'folder', options);
  const pool = settings.resourcePool === null ? await findPool(session, hostFolder, options)
    : await findByPath(session, settings.resourcePool, 'ResourcePool', 'resourcePool', options);
  return { datacenter, hostFolder, datastoreFolder, folder, pool };
}

async function findDatacenter(session: Session, settings: VsphereSettings, options: CallOptions): Promise<ManagedObject> {
  if (settings.datacenter !== null) return findByPath(session, settings.datacenter, 'Datacenter', 'datacenter', options);
  const { rootFolder } = await session.content(options);
  return onlyOne(await retrieve(session, { paths: { Datacenter: ['name'] }, objects: [rootFolder], traversals: FOLDERS }, options), 'datacenter');
}

async function findPool(session: Session, hostFolder: ManagedObject, options: CallOptions): Promise<ManagedObject> {
  const found = await computeResources(session, hostFolder, options);
  onlyOne(found, 'resourcePool');
  return need(asObject(found[0]?.values.get('resourcePool')), 'a resource pool');
}

/** The hosts of the place's datacenter, in the order of their names. */
export async function findHosts(session: Session, place: Place, options: CallOptions): Promise<readonly Host[]> {
  const objects = (await computeResources(session, place.hostFolder, options)).flatMap(({ values }) => objectsIn(values, 'host'));
  const paths = ['name', 'datastore', 'configManager.datastoreSystem', 'configManager.storageSystem'];
  const hosts = await retrieve(session, { paths: { HostSystem: paths }, objects }, options);
  return hosts.map(({ object, values }) => ({
    object,
    name: values.get('name')?.text ?? object.id,
    datastoreSystem: asObject(values.get('configManager.datastoreSystem')),
    storageSystem: asObject(values.get('configManager.storageSystem')),
    datastores: objectsIn(values, 'datastore'),
  })).sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** The datacenter's datastores by their names. */
export async function findDatastores(session: Session, place: Place, options: CallOptions): Promise<ReadonlyMap<string, ManagedObject>> {
  // By the folder, and not one by one: a single one that has just gone would spoil the whole answer.
  const found = await retrieve(session, { paths: { Datastore: ['name'] }, objects: [place.datastoreFolder], traversals: FOLDERS }, options);
  return new Map(found.map(({ object, values }) => [values.get('name')?.text ?? object.id, object]));
}

/** An object of a type at an inventory path: `DC0/vm/clones`. Throws `not-found`, naming the setting. */
async function findByPath(session: Session, path: string, type: string, setting: string, options: CallOptions): Promise<ManagedObject> {
  const { searchIndex } = await session.content(options);
  const found = asObject(childOf(await session.call(searchIndex, 'FindByInventoryPath', [textElement('inventoryPath', path)], options), 'returnval'));
  if (found === null) throw new OffshootError('not-found', `vSphere has nothing at the inventory path '${path}' that the settings give as ${setting}`);
  if (found.type !== type) throw new OffshootError('invalid-argument', `${setting} '${path}' of the settings for vSphere is a ${found.type}, not a ${type}`);
  return found;
}

/** A machine directly in a folder. */
export async function findChild(session: Session, folder: ManagedObject, name: string, options: CallOptions): Promise<ManagedObject | null> {
  const { searchIndex } = await session.content(options);
  return asObject(childOf(await session.call(searchIndex, 'FindChild', [objectElement('entity', folder), textElement('name', entityName(name))], options), 'returnval'));
}

/** In names of inventory objects, and nowhere else, vSphere has these three characters escaped. */
export function entityName(name: string): string {
  return name.replaceAll('%', '%25').replaceAll('/', '%2f').replaceAll('\\', '%5c');
}

async function computeResources(session: Session, hostFolder: ManagedObject, options: CallOptions): Promise<readonly PropertiesOf[]> {
  const found = await retrieve(session, { paths: COMPUTE_TYPES, objects: [hostFolder], traversals: FOLDERS }, options);
  // A cluster is of both types, and a server may report it for each.
  return [...new Map(found.map((each) => [each.object.id, each])).values()];
}

function onlyOne(found: readonly PropertiesOf[], setting: 'datacenter' | 'resourcePool'): ManagedObject {
  const [first] = found;
  if (first !== undefined && found.length === 1) return first.object;
  const names = found.map(({ object, values }) => values.get('name')?.text ?? object.id).sort();
  if (names.length === 0) throw new OffshootError('not-found', `vSphere has nothing that could be the ${setting}`);
  throw new OffshootError('invalid-argument', setting === 'datacenter'
    ? `vSphere has several datacenters: set datacenter to one of ${names.join(', ')}`
    : `vSphere has several hosts or clusters: set resourcePool to the inventory path of a pool, as DATACENTER/host/NAME/Resources with one of ${names.join(', ')}`);
}

function objectsIn(values: ReadonlyMap<string, Parameters<typeof childrenOf>[0]>, path: string): readonly ManagedObject[] {
  return childrenOf(values.get(path), 'ManagedObjectReference').map(asObject).filter((each) => each !== null);
}

function need(object: ManagedObject | null, what: string): ManagedObject {
  if (object === null) throw new OffshootError('io-error', `vSphere names no ${what.replace(/^a /u, '')}`);
  return object;
}
