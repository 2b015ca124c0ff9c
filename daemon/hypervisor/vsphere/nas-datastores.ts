/**
 * The mount as a datastore: an NFS export of it made known to the hosts, and storage that is looked at again.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { NfsExport } from '../datastores.js';
import type { CallOptions } from '../hypervisor.js';
import { faultError, VsphereFault } from './faults.js';
import { findDatastores, findHosts, type Host, type Place } from './inventory.js';
import { retrieve } from './properties.js';
import type { Session } from './session.js';
import type { DatastoreMapping } from './settings.js';
import { childOf, childrenOf, element, textAt, textElement, type XmlElement } from './xml.js';

/** New logical units first (a disk that is presented by iSCSI), then what lies on them, then what the host says of its storage. */
const LOOK_AGAIN = ['RescanAllHba', 'RescanVmfs', 'RefreshStorageSystem'] as const;
const TAKEN: ReadonlySet<string> = new Set(['AlreadyExists', 'DuplicateName']);

/** One host after another: the first that refuses is named, and the call can be made again. */
export async function mountNas(session: Session, place: Place, nfs: NfsExport, options: CallOptions): Promise<readonly string[]> {
  const done: string[] = [];
  for (const host of await findHosts(session, place, options)) {
    if (!(await hasIt(session, host, nfs, options))) await create(session, place, host, nfs, options);
    done.push(host.name);
  }
  if (done.length === 0) throw new OffshootError('not-found', 'vSphere has no host that could mount a datastore');
  return done;
}

async function create(session: Session, place: Place, host: Host, nfs: NfsExport, options: CallOptions): Promise<void> {
  if (host.datastoreSystem === null) throw new OffshootError('not-supported', `host ${host.name} lets nobody add datastores`);
  const specification = element('spec',
    textElement('remoteHost', nfs.server),
    textElement('remotePath', nfs.path),
    textElement('localPath', nfs.datastore),
    textElement('accessMode', nfs.readOnly ? 'readOnly' : 'readWrite'),
    textElement('type', nfs.version === 4 ? 'NFS41' : 'NFS'),
    ...(nfs.version === 4 ? [textElement('remoteHostNames', nfs.server)] : []));
  try {
    await session.call(host.datastoreSystem, 'CreateNasDatastore', [specification], options);
  } catch (error) {
    // It came to be between the look and the call.
    if (error instanceof VsphereFault && TAKEN.has(error.type)) {
      const now = (await findHosts(session, place, options)).find(({ object }) => object.id === host.object.id);
      if (now !== undefined && (await hasIt(session, now, nfs, options))) return;
    }
    throw faultError(error, `mount ${nfs.server}:${nfs.path} as datastore '${nfs.datastore}' on host ${host.name}`);
  }
}

export async function refreshStorage(session: Session, place: Place, mappings: readonly DatastoreMapping[], options: CallOptions): Promise<void> {
  const datastores = await findDatastores(session, place, options);
  const wanted = [...new Set(mappings.map(({ datastore }) => datastore))].map((name) => {
    const datastore = datastores.get(name);
    if (datastore === undefined) throw new OffshootError('not-found', `vSphere has no datastore '${name}': mount it first`);
    return { name, datastore };
  });
  for (const host of await findHosts(session, place, options)) {
    if (host.storageSystem === null) continue;
    try {
      for (const call of LOOK_AGAIN) await session.call(host.storageSystem, call, [], options);
    } catch (error) {
      throw faultError(error, `look at the storage of host ${host.name}`);
    }
  }
  for (const { name, datastore } of wanted) {
    try {
      await session.call(datastore, 'RefreshDatastore', [], options);
    } catch (error) {
      throw faultError(error, `look at datastore '${name}'`);
    }
  }
}

/** Whether the host has the export under the datastore's name. Throws `already-exists` when the name is something else there. */
async function hasIt(session: Session, host: Host, nfs: NfsExport, options: CallOptions): Promise<boolean> {
  const datastores = await retrieve(session, { paths: { Datastore: ['name', 'info'] }, objects: host.datastores }, options);
  const info = datastores.find(({ values }) => values.get('name')?.text === nfs.datastore)?.values.get('info');
  if (info === undefined) return false;
  const nas = childOf(info, 'nas');
  if (nas !== undefined && serversOf(nas).includes(nfs.server) && textAt(nas, 'remotePath') === nfs.path) return true;
  const isNow = nas === undefined ? 'is no NFS export' : `is ${serversOf(nas).join(',')}:${textAt(nas, 'remotePath') ?? ''}`;
  throw new OffshootError('already-exists', `host ${host.name} has a datastore '${nfs.datastore}', and it ${isNow}: give another name, or remove that one`);
}

function serversOf(nas: XmlElement): readonly string[] {
  const names = childrenOf(nas, 'remoteHostNames').map(({ text }) => text);
  return [...new Set([textAt(nas, 'remoteHost') ?? '', ...names])].filter((name) => name !== '');
}
