/** Which paths are refused by their text alone, and that what is refused can be shown safely. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { OffshootError } from '../../blockstore/errors.js';
import { checkContainerName, checkPathInContainer, checkStorePath, visible } from '../../daemon/control/paths.js';

function refusalOf(check: () => unknown): [string, string] {
  try {
    check();
  } catch (error) {
    if (error instanceof OffshootError) return [error.kind, error.message];
    throw error;
  }
  return ['accepted', ''];
}

describe('paths in the store', () => {
  it.each(['vms', 'vms/a.img', 'vms/dir/a.img', 'vms/...', 'vms/.hidden', 'vms/ a b ', 'vms/-r', 'ü/日本', `vms/${'x'.repeat(255)}`, `vms/${'ü'.repeat(127)}`])('takes %j', (path) => {
    expect(checkStorePath(path)).toBe(path);
  });

  it.each<[string, string, RegExp]>([
    ['', 'invalid-name', /is empty/u],
    ['/vms/a.img', 'invalid-name', /begins with '\/': write CONTAINER\/PATH/u],
    ['vms/a.img/', 'invalid-name', /ends with '\/'/u],
    ['vms//a.img', 'invalid-name', /holds '\/\/'/u],
    ['/', 'invalid-name', /begins with/u],
    ['.', 'invalid-name', /holds '\.'/u],
    ['..', 'invalid-name', /holds '\.\.'/u],
    ['vms/../other/a.img', 'invalid-name', /holds '\.\.'/u],
    ['vms/./a.img', 'invalid-name', /holds '\.'/u],
    ['vms/a\0b', 'invalid-name', /^'vms\/a\\x00b' holds a NUL byte/u],
    ['vms/a\nb', 'invalid-name', /^'vms\/a\\nb' holds a control character/u],
    ['vms/a\u001b[31mb', 'invalid-name', /^'vms\/a\\x1b\[31mb' holds/u],
    ['vms/a\u009bb', 'invalid-name', /control character/u],
    ['vms/\ud800', 'invalid-name', /^'vms\/\\ud800' is not valid Unicode/u],
    [`vms/${'x'.repeat(256)}`, 'name-too-long', /has a name of 256 bytes in it: 255 bytes are the most/u],
    [`vms/${'ü'.repeat(128)}`, 'name-too-long', /256 bytes/u],
    [Array.from({ length: 17 }, () => 'x'.repeat(250)).join('/'), 'name-too-long', /has 4266 bytes: 4095 are the most/u],
  ])('refuses %j', (path, kind, message) => {
    expect(refusalOf(() => checkStorePath(path))).toEqual([kind, expect.stringMatching(message)]);
  });

  it('wants a disk to lie in a container, and a container to be one word', () => {
    expect(refusalOf(() => checkPathInContainer('a.img'))).toEqual(['invalid-name', "'a.img' names a container, or a disk outside any: write CONTAINER/PATH"]);
    expect(refusalOf(() => checkContainerName('a/b'))[0]).toBe('invalid-name');
    expect(refusalOf(() => checkContainerName(''))[0]).toBe('invalid-name');
    expect(refusalOf(() => checkContainerName('..'))[0]).toBe('invalid-name');
    expect(checkContainerName('vms')).toBe('vms');
  });

  it('takes exactly what can be a path under the mount, and never shows a control character', () => {
    fc.assert(fc.property(fc.string({ unit: fc.constantFrom('a', '.', '/', '\0', '\n', 'ü', '\u001b', '\ud800', ' ') , maxLength: 12 }), (path) => {
      const names = path.split('/');
      // eslint-disable-next-line no-control-regex -- control characters are what must not be there
      const sound = path !== '' && names.every((name) => name !== '' && name !== '.' && name !== '..') && !/[\0\n\u001b\ud800]/u.test(path);
      const [kind, message] = refusalOf(() => checkStorePath(path));
      expect(kind === 'accepted').toBe(sound);
      // eslint-disable-next-line no-control-regex -- control characters are what must not be there
      expect(message).not.toMatch(/[\u0000-\u001f\u007f-\u009f]/u);
    }));
  });

  it('shows long names cut short', () => {
    expect(refusalOf(() => checkStorePath(`/${'x'.repeat(5000)}`))[1].length).toBeLessThan(200);
    expect(visible('a\tb\u007f')).toBe('a\\tb\\x7f');
  });
});
