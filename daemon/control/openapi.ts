/**
 * The OpenAPI document of the control API, made from the same schemas that validate: GET /v1/openapi.json. Named schemas
 * become components, so that generated clients have names for them.
 */
import swagger from '@fastify/swagger';
import type { FastifyInstance } from 'fastify';

/** Before the routes are added: the document lists what comes after. */
export async function addOpenApi(app: FastifyInstance, version: string): Promise<void> {
  await app.register(swagger, {
    openapi: {
      openapi: '3.1.0',
      info: {
        title: 'Offshoot control API',
        version,
        description: 'HTTP and JSON over the unix socket of the daemon. Sizes are bytes, times are ISO 8601 in UTC. API.md explains it.',
      },
      servers: [{ url: 'http://localhost', description: 'the unix socket; the host name is ignored' }],
    },
    refResolver: {
      buildLocalReference: (schema, _base, _fragment, index) => typeof schema['$id'] === 'string' ? schema['$id'] : `schema-${index}`,
    },
  });
}
