/**
 * Properties of objects, by the property collector: the only way that vSphere has to read anything.
 *
 * Only the properties that are named are asked for, and answers come in pages. A property that may not be read is an error, for
 * what is not there would otherwise look like what is not set.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { CallOptions } from '../hypervisor.js';
import { localizedFault } from './faults.js';
import type { Session } from './session.js';
import { asObject, childOf, childrenOf, element, objectElement, textAt, textElement, typedElement, type ManagedObject, type XmlElement } from './xml.js';

export interface PropertiesOf {
  readonly object: ManagedObject;
  /** By the path that was asked for; those that are not set are not in it. */
  readonly values: ReadonlyMap<string, XmlElement>;
}

export interface PropertyRequest {
  /** Paths of properties by the type of object. */
  readonly paths: Readonly<Record<string, readonly string[]>>;
  readonly objects: readonly ManagedObject[];
  /** How to go on from the objects to others: traversals, written. */
  readonly traversals?: readonly string[];
}

const PAGE_OBJECTS_MAX = 500;
/** A vCenter manages fewer hosts and folders than this; a server that never ends must not fill our memory. */
const OBJECTS_MAX = 50_000;

export async function retrieve(session: Session, request: PropertyRequest, options: CallOptions): Promise<readonly PropertiesOf[]> {
  if (request.objects.length === 0) return [];
  const { propertyCollector } = await session.content(options);
  const traversals = request.traversals ?? [];
  const specification = element('specSet',
    ...Object.entries(request.paths).map(([type, paths]) => element('propSet', textElement('type', type), textElement('all', false),
      ...paths.map((path) => textElement('pathSet', path)))),
    ...request.objects.map((object) => element('objectSet', objectElement('obj', object), textElement('skip', false), ...traversals)));
  const first = await session.call(propertyCollector, 'RetrievePropertiesEx',
    [specification, element('options', textElement('maxObjects', PAGE_OBJECTS_MAX))], options);
  const found: PropertiesOf[] = [];
  let page = childOf(first, 'returnval');
  while (page !== undefined) {
    for (const object of childrenOf(page, 'objects')) found.push(readObject(object));
    if (found.length > OBJECTS_MAX) throw new OffshootError('too-large', `vSphere has more than ${OBJECTS_MAX} objects to look through`);
    const token = textAt(page, 'token');
    if (token === null) break;
    page = childOf(await session.call(propertyCollector, 'ContinueRetrievePropertiesEx', [textElement('token', token)], options), 'returnval');
  }
  return found;
}

/** The properties of one object. Throws VsphereFault ManagedObjectNotFound when it is gone. */
export async function retrieveOne(session: Session, object: ManagedObject, paths: readonly string[], options: CallOptions): Promise<ReadonlyMap<string, XmlElement>> {
  const [found] = await retrieve(session, { paths: { [object.type]: paths }, objects: [object] }, options);
  if (found === undefined) throw new OffshootError('not-found', `vSphere has no ${object.type} ${object.id}`);
  return found.values;
}

/** From objects of a type by one of their properties, then on by the traversals that are named. */
export function traversal(name: string, type: string, path: string, then: readonly string[] = []): string {
  return typedElement('selectSet', 'TraversalSpec', textElement('name', name), textElement('type', type), textElement('path', path), textElement('skip', false),
    ...then.map((each) => element('selectSet', textElement('name', each))));
}

function readObject(content: XmlElement): PropertiesOf {
  const object = asObject(childOf(content, 'obj'));
  if (object === null) throw new OffshootError('io-error', 'vSphere answered with the properties of no object');
  for (const missing of childrenOf(content, 'missingSet')) {
    const fault = childOf(missing, 'fault');
    if (fault !== undefined) throw localizedFault('RetrievePropertiesEx', fault);
  }
  const values = new Map<string, XmlElement>();
  for (const property of childrenOf(content, 'propSet')) {
    const value = childOf(property, 'val');
    if (value !== undefined) values.set(textAt(property, 'name') ?? '', value);
  }
  return { object, values };
}
