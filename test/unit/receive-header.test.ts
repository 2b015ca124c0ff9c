/** Headers of streams come from outside: what cannot be received is refused before anything is made. */
import { describe, expect, it } from 'vitest';

import { parseHeader } from '../../daemon/jobs/receive-header.js';

const NODE = { path: 'a.img', kind: 'disk', mode: 0o600, uid: 0, gid: 0, mtimeUs: 0, sizeBytes: 4096, linkTarget: null, delta: false };
const HEADER = {
  reference: 'golden@v1', baseReference: null, kind: 'container', uuid: '00000000-0000-8000-8000-000000000001', name: 'v1', consistency: 'crash', message: null, createdUs: 1,
  baseUuid: null, resume: null, nodes: [NODE],
};
const parse = (changes: object, node: object = {}): unknown => parseHeader(JSON.stringify({ ...HEADER, nodes: [{ ...NODE, ...node }], ...changes }));

describe('headers of streams', () => {
  it('refuse names that lead elsewhere, trees that are none, and sizes that no disk has', () => {
    expect(parse({})).toMatchObject({ name: 'v1' });
    for (const path of ['../a', '/etc/passwd', 'a//b', 'a/../b', '.', '', 'no-such-directory/a', '.snapshots/x', '.snapshots', 'a\nb', 'x'.repeat(256)]) {
      expect(() => parse({}, { path }), path).toThrow();
    }
    for (const node of [{ sizeBytes: 2 ** 60 }, { sizeBytes: -1 }, { sizeBytes: 100 }, { mode: 0o170000 }, { uid: -1 }, { kind: 'device' }, { linkTarget: '/etc' }, { delta: true }, { extra: 1 }]) {
      expect(() => parse({}, node), JSON.stringify(node)).toThrow(/cannot be received/u);
    }
    expect(() => parse({ nodes: [NODE, NODE] })).toThrow(/twice/u);
    expect(() => parse({ name: 'a/b' })).toThrow();
    expect(() => parse({ uuid: '../../x' })).toThrow(/uuid/u);
    expect(() => parse({ kind: 'disk', nodes: [NODE, { ...NODE, path: 'b' }] })).toThrow(/one disk or file/u);
    expect(() => parse({}, { kind: 'symlink', linkTarget: 'x'.repeat(5000) })).toThrow();
    expect(() => parseHeader('{')).toThrow(/no JSON/u);
    expect(() => parseHeader('[]')).toThrow(/cannot be received/u);
  });
});
