/**
 * Which files of the mount are block devices because they are exported: written down before losetup(8) is asked, so that whoever comes after an
 * accident knows which devices are ours. Reads sysfs only: names there are what the kernel remembers, and nothing below the mount is touched.
 */
import { readFileSync, readdirSync } from 'node:fs';
import path from 'node:path';

import { OffshootError } from '../../../blockstore/errors.js';
import { runChild } from '../../programs/child.js';
import { makeExportsDirectory, writeWhole } from '../export-process.js';

export interface LoopDevice {
  /** `/dev/loop7`. */
  readonly device: string;
  readonly file: string;
  readonly readOnly: boolean;
  readonly directIo: boolean;
}

const RECORD = 'attached.json';
const LOSETUP_TIMEOUT_MS = 30_000;
const REMOVED = ' (deleted)';

/** Every loop device of this host, whoever attached it. */
export function loopDevices(): LoopDevice[] {
  return listed('/sys/block').flatMap((name) => {
    const file = /^loop\d+$/u.test(name) ? read(`/sys/block/${name}/loop/backing_file`) : null;
    if (file === null) return [];
    return [{
      device: `/dev/${name}`, file: file.endsWith(REMOVED) ? file.slice(0, -REMOVED.length) : file,
      readOnly: read(`/sys/block/${name}/ro`) === '1', directIo: read(`/sys/block/${name}/loop/dio`) === '1',
    }];
  });
}

/** The files that are ours to have attached. */
export function recordedFiles(directory: string): readonly string[] {
  const text = read(path.join(directory, RECORD));
  if (text === null) return [];
  const files: unknown = JSON.parse(text);
  return Array.isArray(files) ? files.filter((file): file is string => typeof file === 'string') : [];
}

export function recordFiles(directory: string, files: readonly string[]): void {
  makeExportsDirectory(directory);
  writeWhole(path.join(directory, RECORD), JSON.stringify(files));
}

export async function losetup(args: readonly string[], signal: AbortSignal): Promise<string> {
  const { code, stdout, stderr } = await runChild('losetup', args, { signal, timeoutMs: LOSETUP_TIMEOUT_MS });
  if (code === 0) return stdout.trim();
  throw new OffshootError('io-error', `losetup: ${stderr.trim() === '' ? `failed with ${code ?? 'a signal'}` : stderr.trim()}`);
}

/** Gives back the devices of the record. What it gave back. Well without a record. */
export async function releaseLoops(directory: string): Promise<readonly string[]> {
  const files = new Set(recordedFiles(directory));
  if (files.size === 0) return [];
  const released: string[] = [];
  for (const { device, file } of loopDevices()) {
    if (!files.has(file)) continue;
    await losetup(['--detach', device], new AbortController().signal).then(() => { released.push(device); }, () => undefined);
  }
  recordFiles(directory, []);
  return released;
}

/** Empty where there is no such directory. */
export function listed(directory: string): readonly string[] {
  try {
    return readdirSync(directory);
  } catch {
    return [];
  }
}

/** A device may go while it is looked at. */
export function read(file: string): string | null {
  try {
    return readFileSync(file, 'utf8').replace(/\n$/u, '');
  } catch {
    return null;
  }
}
