/** The OpenAPI document: complete, consistent in itself, and the same with and without a daemon. */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { openApiDocument } from '../../daemon/control/http-app.js';
import { routes } from '../../daemon/control/routes.js';
import { namedSchemas } from '../../daemon/control/schemas.js';
import { startFixture } from '../support/control-fixture.js';

interface OpenApi {
  readonly openapi: string;
  readonly info: { readonly version: string };
  readonly paths: Record<string, Record<string, { operationId: string; summary: string; responses: Record<string, unknown>; parameters?: { name: string; in: string; required?: boolean }[] }>>;
  readonly components: { readonly schemas: Record<string, { properties?: Record<string, unknown> }> };
}

function referencesIn(value: unknown): string[] {
  if (Array.isArray(value)) return value.flatMap(referencesIn);
  if (typeof value !== 'object' || value === null) return [];
  return Object.entries(value).flatMap(([key, each]) => key === '$ref' && typeof each === 'string' ? [each] : referencesIn(each));
}

describe('the OpenAPI document', () => {
  it('has every route, with a summary, a good answer and the one shape of error', async () => {
    const document = await openApiDocument('9.9.9') as unknown as OpenApi;
    expect([document.openapi, document.info.version]).toEqual(['3.1.0', '9.9.9']);
    const listed = Object.entries(document.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => `${method.toUpperCase()} ${path} ${operation.operationId}`));
    expect(listed.sort()).toEqual(routes.map((route) => `${route.method} ${route.url.replace(':id', '{id}')} ${route.operationId}`).sort());
    for (const operation of Object.values(document.paths).flatMap((methods) => Object.values(methods))) {
      expect(operation.summary).not.toBe('');
      expect(Object.keys(operation.responses)).toEqual([expect.stringMatching(/^20[012]$/u), 'default']);
      expect(referencesIn(operation.responses['default'])).toEqual(['#/components/schemas/ErrorResponse']);
    }
  });

  it('is explained in API.md, route by route', () => {
    const text = readFileSync(new URL('../../daemon/control/API.md', import.meta.url), 'utf8');
    const listed = [...text.matchAll(/^\| `(?<route>(?:GET|POST|DELETE) [^`]+)` \|/gmu)].map((match) => match.groups?.['route'] ?? '');
    expect(listed.sort()).toEqual(routes.map((route) => `${route.method} ${route.url.replace(':id', 'ID')}`).sort());
  });

  it('names its schemas, and has what it refers to', async () => {
    const document = await openApiDocument('1') as unknown as OpenApi;
    expect(Object.keys(document.components.schemas).sort()).toEqual(namedSchemas.map((schema) => schema.$id).sort());
    const references = new Set(referencesIn(document));
    expect([...references].filter((each) => !Object.hasOwn(document.components.schemas, each.replace('#/components/schemas/', '')))).toEqual([]);
    expect(references.has('#/components/schemas/FillInfo')).toBe(true);
  });

  it('says which parameters are needed', async () => {
    const document = await openApiDocument('1') as unknown as OpenApi;
    expect(document.paths['/v1/nodes']?.['delete']?.parameters?.map((each) => [each.name, each.in, each.required])).toEqual([
      ['path', 'query', true], ['keepData', 'query', false], ['recursive', 'query', false],
    ]);
  });

  it('is what a daemon answers', async () => {
    const fixture = await startFixture();
    try {
      expect(await fixture.client.openApi()).toEqual(JSON.parse(JSON.stringify(await openApiDocument('1.2.3'))));
    } finally {
      await fixture.end();
    }
  });
});
