/**
 * vSphere behind the seam to hypervisors: machines of an ESXi host or a vCenter, by SOAP.
 *
 * The adapter keeps nothing but a session and where things are in the inventory, and both can be made anew. A machine's external id is
 * `MOREF/UUID`: vSphere's own id of the machine, and the UUID that vSphere had read from its configuration. A host that was restarted may give
 * an id that is free again to another machine; with another UUID that one is not ours, and ours is missing.
 *
 * Every call can be made again. `register` first looks whether its own .vmx is registered already; a state that is reached
 * already is no error. So an answer that was lost costs a second look and nothing else.
 *
 * What vSphere cannot see through this adapter: whether the datastore's name is really this host's mount. The settings say so.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { DatastoreAbilities, NfsExport } from '../datastores.js';
import type { CallOptions, Hypervisor, HypervisorAbilities, MachineState, MachineToRegister } from '../hypervisor.js';
import { faultError, VsphereFault } from './faults.js';
import { entityName, findChild, findDatastores, findPlace, type Place } from './inventory.js';
import { mountNas, refreshStorage } from './nas-datastores.js';
import { retrieveOne } from './properties.js';
import { Session } from './session.js';
import { datastorePath, type VsphereSettings } from './settings.js';
import { poll, waitForTask } from './tasks.js';
import { asObject, childOf, childrenOf, objectElement, textAt, textElement, type ManagedObject, type XmlElement } from './xml.js';

const ABILITIES: HypervisorAbilities = {
  formats: ['vmx'],
  shutdown: true,
  // VMware Tools.
  guestAgent: true,
  // vSphere makes a machine quiet only as a part of a snapshot of its own.
  quiesce: false,
  isRemote: true,
};

const UUID = 'summary.config.uuid';
const POWER = 'runtime.powerState';
const QUESTION = 'runtime.question';
const TOOLS = 'guest.toolsRunningStatus';
const NAME = 'summary.config.name';
const VMX = 'summary.config.vmPathName';
const EXTERNAL_ID = /^([A-Za-z0-9._-]+)\/([0-9a-f-]{36})$/u;

export class Vsphere implements Hypervisor, DatastoreAbilities {
  readonly id = 'vsphere';
  readonly abilities = ABILITIES;
  readonly #settings: VsphereSettings;
  readonly #session: Session;
  #place: Place | null = null;

  constructor(settings: VsphereSettings) {
    this.#settings = settings;
    this.#session = new Session(settings);
  }

  /** Logs out. What is called afterwards logs in again. */
  async close(): Promise<void> {
    await this.#session.close();
  }

  async probe(options: CallOptions): Promise<{ readonly usable: true; readonly version: string } | { readonly usable: false; readonly reason: string }> {
    try {
      const { fullName, version } = await this.#session.content(options);
      const place = await this.#findPlace(options);
      const known = await findDatastores(this.#session, place, options);
      const lacking = this.#settings.datastores.find(({ datastore }) => !known.has(datastore));
      if (lacking !== undefined) {
        return { usable: false, reason: `${fullName} has no datastore '${lacking.datastore}' for ${lacking.directory}: mount the export of it there` };
      }
      return { usable: true, version };
    } catch (thrown) {
      const error = faultError(thrown, 'say where machines belong');
      if (!(error instanceof OffshootError) || error.kind === 'cancelled' || error.kind === 'internal') throw error;
      return { usable: false, reason: error.message };
    }
  }

  async register(machine: MachineToRegister, options: CallOptions): Promise<{ readonly externalId: string }> {
    const path = datastorePath(this.#settings.datastores, machine.directory, machine.configuration);
    try {
      return await this.#register(machine, path, options);
    } catch (error) {
      // The folder or the pool may be gone: looked for again next time.
      this.#place = null;
      throw faultError(error, `register machine '${machine.name}' from ${path}`);
    }
  }

  async find(machine: MachineToRegister, options: CallOptions): Promise<string | null> {
    const path = datastorePath(this.#settings.datastores, machine.directory, machine.configuration);
    try {
      const found = await this.#findAt(await this.#findPlace(options), path, options);
      if (found === null) return null;
      const { uuid } = await this.#identify(found, options);
      return uuid === machine.uuid ? `${found.id}/${uuid}` : null;
    } catch (error) {
      this.#place = null;
      throw faultError(error, `look for machine '${machine.name}' at ${path}`);
    }
  }

  async #register(machine: MachineToRegister, path: string, options: CallOptions): Promise<{ readonly externalId: string }> {
    const place = await this.#findPlace(options);
    const registered = await this.#findAt(place, path, options);
    if (registered !== null) return this.#ownFromBefore(registered, machine, path, options);
    await this.#refuseTaken(place, machine, options);
    let made: ManagedObject | null;
    try {
      made = await this.#runTask(place.folder, 'RegisterVM_Task', [
        textElement('path', path), textElement('name', entityName(machine.name)), textElement('asTemplate', false), objectElement('pool', place.pool),
      ], options);
    } catch (error) {
      // An equal call, whose answer nobody waited for, was faster.
      if (!(error instanceof VsphereFault) || error.type !== 'AlreadyExists') throw error;
      const other = await this.#findAt(place, path, options);
      if (other === null) throw error;
      return this.#ownFromBefore(other, machine, path, options);
    }
    const vm = made ?? (await this.#findAt(place, path, options));
    if (vm === null) throw new OffshootError('io-error', `vSphere registered ${path} and does not know it`);
    const { uuid } = await this.#identify(vm, options);
    if (uuid === machine.uuid) return { externalId: `${vm.id}/${uuid}` };
    // What is registered is not what the store has written down: better nothing than a machine that is taken for another one.
    await this.#session.call(vm, 'UnregisterVM', [], options);
    throw new OffshootError('conflict', `vSphere reads UUID ${uuid} from ${path}, and the machine's is ${machine.uuid}: uuid.bios of the configuration must be it`,
      { found: uuid, expected: machine.uuid });
  }

  /** What is registered at our path is ours from an earlier call, unless it was left there by a machine that is no more. */
  async #ownFromBefore(vm: ManagedObject, machine: MachineToRegister, path: string, options: CallOptions): Promise<{ readonly externalId: string }> {
    const { name, uuid } = await this.#identify(vm, options);
    if (uuid === machine.uuid) return { externalId: `${vm.id}/${uuid}` };
    throw new OffshootError('already-exists', `vSphere has ${path} registered as machine '${name}' with UUID ${uuid}, not ${machine.uuid}: unregister that one first`, { found: uuid });
  }

  async #refuseTaken(place: Place, machine: MachineToRegister, options: CallOptions): Promise<void> {
    const { searchIndex } = await this.#session.content(options);
    const answer = await this.#session.call(searchIndex, 'FindByUuid', [textElement('uuid', machine.uuid), textElement('vmSearch', true), textElement('instanceUuid', false)], options);
    const sameUuid = asObject(childOf(answer, 'returnval'));
    if (sameUuid !== null) {
      const { name, path } = await this.#identify(sameUuid, options);
      throw new OffshootError('already-exists', `UUID ${machine.uuid} is taken in vSphere: machine '${name}', ${path}`, { uuid: machine.uuid });
    }
    // A host by itself would take a second machine of the same name; a vCenter refuses it.
    const sameName = await findChild(this.#session, place.folder, machine.name, options);
    if (sameName !== null) {
      throw new OffshootError('already-exists', `the name '${machine.name}' is taken in vSphere: ${sameName.type} ${sameName.id} in the same folder`, { name: machine.name });
    }
  }

  async unregister(externalId: string, options: CallOptions): Promise<void> {
    await this.#act(externalId, 'unregister', options, async (vm, state) => {
      if (state === null) return;
      if (state.power === 'poweredOn') throw isRunning(externalId);
      try {
        await this.#session.call(vm, 'UnregisterVM', [], options);
      } catch (error) {
        if (isFault(error, 'ManagedObjectNotFound')) return;
        throw isFault(error, 'InvalidPowerState') ? isRunning(externalId) : error;
      }
    });
  }

  async start(externalId: string, options: CallOptions): Promise<void> {
    await this.#act(externalId, 'start', options, async (vm, state) => {
      if (state === null) throw isMissing(externalId);
      if (state.power === 'poweredOn') return;
      try {
        // A machine that was moved or copied is not started before somebody has said which: the task waits for the answer, and so would we.
        await this.#runTask(vm, 'PowerOnVM_Task', [], options, async () => {
          const question = (await retrieveOne(this.#session, vm, [QUESTION], options)).get(QUESTION);
          if (question !== undefined) throw isAsking(externalId, question);
        });
      } catch (error) {
        if (!isFault(error, 'InvalidPowerState', 'poweredOn')) throw error;
      }
    });
  }

  async stop(externalId: string, options: CallOptions & { readonly force: boolean; readonly timeoutMs: number }): Promise<void> {
    await this.#act(externalId, options.force ? 'take the power of' : 'shut down', options, async (vm, state) => {
      if (state === null) throw isMissing(externalId);
      if (state.power === 'poweredOff') return;
      try {
        if (options.force) {
          await this.#runTask(vm, 'PowerOffVM_Task', [], options);
          return;
        }
        await this.#session.call(vm, 'ShutdownGuest', [], options);
      } catch (error) {
        if (isFault(error, 'InvalidPowerState', 'poweredOff')) return;
        throw error;
      }
      const isOff = await poll(async () => {
        const now = await this.#look(vm, null, options);
        return now === null || now.power === 'poweredOff' ? true : undefined;
      }, options);
      if (isOff === undefined) {
        throw new OffshootError('busy', `machine ${externalId} was asked to shut down and is not off after ${options.timeoutMs} ms; force takes its power`, { externalId });
      }
    });
  }

  async status(externalId: string, options: CallOptions): Promise<MachineState> {
    return this.#act(externalId, 'say the state of', options, async (_vm, state) => {
      switch (state?.power) {
        case undefined: return 'missing';
        case 'poweredOn': return 'running';
        case 'suspended': return 'paused';
        case 'poweredOff': return 'shut-off';
        default: throw new OffshootError('io-error', `vSphere says that machine ${externalId} is '${state?.power ?? ''}'`, { externalId });
      }
    });
  }

  async pingAgent(externalId: string, options: CallOptions): Promise<boolean> {
    return this.#act(externalId, 'look at the Tools of', options, async (vm, state) => {
      if (state === null) throw isMissing(externalId);
      const status = (await retrieveOne(this.#session, vm, [TOOLS], options)).get(TOOLS)?.text;
      return status === 'guestToolsRunning' || status === 'guestToolsExecutingScripts';
    });
  }

  async freeze(_externalId: string, _options: CallOptions): Promise<void> {
    throw cannotQuiesce();
  }

  async thaw(_externalId: string, _options: CallOptions): Promise<void> {
    throw cannotQuiesce();
  }

  async mountDatastore(nfs: NfsExport, options: CallOptions): Promise<readonly string[]> {
    return this.#withPlace('mount a datastore', options, (place) => mountNas(this.#session, place, nfs, options));
  }

  async refresh(options: CallOptions): Promise<void> {
    await this.#withPlace('look at its storage', options, (place) => refreshStorage(this.#session, place, this.#settings.datastores, options));
  }

  async #withPlace<T>(doing: string, options: CallOptions, act: (place: Place) => Promise<T>): Promise<T> {
    try {
      return await act(await this.#findPlace(options));
    } catch (error) {
      this.#place = null;
      throw faultError(error, doing);
    }
  }

  async #findPlace(options: CallOptions): Promise<Place> {
    this.#place ??= await findPlace(this.#session, this.#settings, options);
    return this.#place;
  }

  /** Something done with a machine that was registered; `state` is null when it is not there any more. */
  async #act<T>(externalId: string, doing: string, options: CallOptions, act: (vm: ManagedObject, state: { readonly power: string } | null) => Promise<T>): Promise<T> {
    const [, id, uuid] = EXTERNAL_ID.exec(externalId) ?? [];
    try {
      // An id that was never one of ours is a machine that is not known.
      if (id === undefined || uuid === undefined) return await act({ type: 'VirtualMachine', id: externalId }, null);
      const vm: ManagedObject = { type: 'VirtualMachine', id };
      return await act(vm, await this.#look(vm, uuid, options));
    } catch (error) {
      throw faultError(error, `${doing} machine ${externalId}`);
    }
  }

  /** The machine's power; null when it is gone, or is another machine by now. */
  async #look(vm: ManagedObject, uuid: string | null, options: CallOptions): Promise<{ readonly power: string } | null> {
    try {
      const values = await retrieveOne(this.#session, vm, [UUID, POWER], options);
      const now = values.get(UUID)?.text.toLowerCase();
      // A machine whose files cannot be reached has no UUID for the moment.
      if (uuid !== null && now !== undefined && now !== '' && now !== uuid) return null;
      return { power: values.get(POWER)?.text ?? '' };
    } catch (error) {
      if (isFault(error, 'ManagedObjectNotFound')) return null;
      throw error;
    }
  }

  async #identify(vm: ManagedObject, options: CallOptions): Promise<{ readonly name: string; readonly uuid: string; readonly path: string }> {
    const values = await retrieveOne(this.#session, vm, [NAME, UUID, VMX], options);
    return { name: values.get(NAME)?.text ?? vm.id, uuid: values.get(UUID)?.text.toLowerCase() ?? '', path: values.get(VMX)?.text ?? '' };
  }

  async #findAt(place: Place, path: string, options: CallOptions): Promise<ManagedObject | null> {
    const { searchIndex } = await this.#session.content(options);
    return asObject(childOf(await this.#session.call(searchIndex, 'FindByDatastorePath', [objectElement('datacenter', place.datacenter), textElement('path', path)], options), 'returnval'));
  }

  async #runTask(object: ManagedObject, method: string, content: readonly string[], options: CallOptions, meanwhile?: () => Promise<void>): Promise<ManagedObject | null> {
    const task = asObject(childOf(await this.#session.call(object, method, content, options), 'returnval'));
    if (task === null) throw new OffshootError('io-error', `vSphere answered ${method} without a task`);
    const { taskTimeoutMs: timeoutMs } = this.#settings;
    return waitForTask(this.#session, task, method, { signal: options.signal, timeoutMs, ...(meanwhile === undefined ? {} : { meanwhile }) });
  }
}

function isFault(error: unknown, type: string, existingState?: string): boolean {
  return error instanceof VsphereFault && error.type === type && (existingState === undefined || error.details.get('existingState') === existingState);
}

function isMissing(externalId: string): OffshootError {
  return new OffshootError('not-found', `vSphere knows no machine ${externalId} (any more): register it`, { externalId });
}

function isRunning(externalId: string): OffshootError {
  return new OffshootError('in-use', `machine ${externalId} runs in vSphere: stop it first`, { externalId });
}

function isAsking(externalId: string, question: XmlElement): OffshootError {
  const choices = childrenOf(childOf(question, 'choice'), 'choiceInfo').map((each) => textAt(each, 'label') ?? '').filter((label) => label !== '');
  return new OffshootError('busy', `machine ${externalId} is not started before vSphere has an answer: ${textAt(question, 'text')?.trim() ?? 'it asks something'}`
    + `${choices.length === 0 ? '' : ` (${choices.join(', ')})`}; answer it there`, { externalId });
}

function cannotQuiesce(): OffshootError {
  return new OffshootError('not-supported', 'vSphere makes the file systems of a machine quiet only for a snapshot of its own');
}
