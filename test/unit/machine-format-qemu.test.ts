import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { MachineAdapters } from '../../daemon/machines/adapters.js';
import { MACHINE_FORMATS } from '../../daemon/machines/formats.js';
import { qemuCommand } from '../../daemon/machines/formats/qemu-arguments.js';
import { parseQemuMachine, qemuFormat } from '../../daemon/machines/formats/qemu.js';
import { assertSoundOnAnything, CLONE_UUID, identity, mutated } from '../support/machine-texts.js';
import { sample, SAMPLES, thrown } from './machine-format-support.js';

const text = sample('machine.json');
const JUNK = ['{', '}', '[', ']', '"', ',', ':', 'null', '1e999', '"mac": "x"', '"__proto__": {}', '\\u0000', '\u{1F600}', '"disks": []', '-drive'];
const options = { directory: '/srv/machines/golden', qmpSocket: '/run/a/qmp', agentSocket: '/run/a/agent' };

function changed(change: (machine: Record<string, unknown>) => void): string {
  const machine = JSON.parse(text) as Record<string, unknown>;
  change(machine);
  return JSON.stringify(machine);
}

describe('the facts of a description', () => {
  it('are read', () => {
    expect(qemuFormat.parse(text).facts()).toEqual({
      name: 'golden', uuid: '0c1f3a52-7b5d-4e0a-9c7e-2f6a1b9d8e10', memoryBytes: 1024 ** 3, processors: 2, macs: ['52:54:00:12:34:56', null],
      files: [
        { slot: 'disk0', file: 'root.raw', role: 'disk', diskFormat: 'raw' },
        { slot: 'disk1', file: 'data, more.raw', role: 'disk', diskFormat: 'raw' },
        { slot: 'disk2', file: 'tools.raw', role: 'disk', diskFormat: 'raw' },
      { slot: 'disk3', file: 'old.raw', role: 'disk', diskFormat: 'raw' },
        { slot: 'firmware', file: '/usr/share/OVMF/OVMF_CODE.fd', role: 'firmware', diskFormat: null },
        { slot: 'nvram', file: 'OVMF_VARS.fd', role: 'nvram', diskFormat: null },
        { slot: 'consoleLog', file: 'console.log', role: 'other', diskFormat: null },
      ],
    });
  });
});

describe('a clone of a description', () => {
  it('has what is its own, and the rest as it was, in its order and indentation', () => {
    const document = qemuFormat.parse(text);
    const changes = document.customise(identity(['52:54:00:00:00:01', '52:54:00:00:00:02'], ({ slot, role }) => role === 'firmware' ? null : `/mnt/lab/web-07/${slot}${role === 'other' ? '.log' : ''}`));
    const after = JSON.parse(document.toText()) as Record<string, unknown>;
    const before = JSON.parse(text) as Record<string, unknown>;
    expect(Object.keys(after)).toEqual(Object.keys(before));
    expect(after).toMatchObject({
      name: 'web-07', uuid: CLONE_UUID, firmware: '/usr/share/OVMF/OVMF_CODE.fd', nvram: '/mnt/lab/web-07/nvram', consoleLog: '/mnt/lab/web-07/consoleLog.log',
      disks: [{ file: '/mnt/lab/web-07/disk0', serial: 'ROOT0001' }, { file: '/mnt/lab/web-07/disk1' }, { file: '/mnt/lab/web-07/disk2' }, { file: '/mnt/lab/web-07/disk3' }],
      networkInterfaces: [{ mac: '52:54:00:00:00:01' }, { mac: '52:54:00:00:00:02' }], annotations: before['annotations'],
    });
    expect(document.toText()).toContain('\n    "name": "web-07",\n');
    expect(changes.map(({ key }) => key)).toEqual(['name', 'uuid', 'networkInterfaces.0.mac', 'networkInterfaces.1.mac', 'disks.0.file', 'disks.1.file', 'disks.2.file', 'disks.3.file', 'nvram', 'consoleLog']);
  });

  it('is refused where it would write to the same disk', () => {
    const outside = changed((machine) => { machine['disks'] = [{ file: '/srv/shared.raw' }]; });
    expect(thrown(() => qemuFormat.parse(outside).customise(identity(['52:54:00:00:00:01', '52:54:00:00:00:02']))).kind).toBe('not-supported');
    expect(thrown(() => qemuFormat.parse(text).customise(identity(['52:54:00:00:00:01', '52:54:00:00:00:01']))).message).toContain('same MAC address');
  });
});

describe('keys of a description', () => {
  it('are dotted paths, and the names that all formats share', () => {
    const document = qemuFormat.parse(text);
    expect(document.keys()).toContain('disks.1.cache');
    expect(document.keys()).not.toContain('annotations.owner');
    expect(document.get('disks.1.cache')).toBe('writethrough');
    expect(document.get('vcpu')).toBe('2');
    expect(document.get('interface.0.mac')).toBe('52:54:00:12:34:56');
    expect(document.get('extraArguments')).toBe('["-device","virtio-rng-pci","-rtc","base=utc"]');
    expect(document.get('no.such')).toBeNull();
    for (const [key, value] of [['memory', '2GiB'], ['vcpu', '4'], ['guestAgent', 'false'], ['disks.0.cache', 'directsync'], ['interface.1.mac', '52-54-00-AA-00-01'], ['disks.0.serial', '1234'], ['name', '007']] as const) document.set(key, value);
    expect(JSON.parse(document.toText())).toMatchObject({
      name: '007', memory: '2GiB', processors: 4, guestAgent: false, disks: [{ cache: 'directsync', serial: '1234' }, {}, {}, {}], networkInterfaces: [{}, { mac: '52:54:00:aa:00:01' }],
    });
  });

  it.each([
    ['memory', '2'], ['processors', 'many'], ['processors', '2.5'], ['disks.4.file', 'x.raw'], ['disks.0.cache', 'unsafe'], ['disks.0.format', 'qcow2'], ['disks.0', '{}'], ['nosuch', '1'], ['', '1'], ['a.b.c', '1'],
    ['__proto__', '{}'], ['__proto__.polluted', '1'], ['disks.length', '0'], ['format', 'x'], ['name', 'a\nb'], ['extraArguments', '["-drive","file=x"]'], ['disks.1.file', 'root.raw'],
  ])('%s cannot be %j', (key, value) => {
    const document = qemuFormat.parse(text);
    expect(thrown(() => { document.set(key, value); }).kind).toBe('invalid-argument');
    expect(document.toText()).toBe(text);
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
  });
});

describe('what is no description', () => {
  it.each([
    ['{\n"format": "offshoot-machine/1",\n}', 'line 3'], ['', 'line 1'], ['{"format": "offshoot-machine/1"', 'line 1'], ['[]', 'the whole'],
    [changed((machine) => { machine['format'] = 'offshoot-machine/2'; }), 'format'], [changed((machine) => { machine['disk'] = []; }), 'disk '],
    [changed((machine) => { machine['disks'] = [{ file: '' }]; }), 'disks.0.file'], [changed((machine) => { machine['disks'] = [{ file: 'a', driver: 'qcow2' }]; }), 'disks.0.driver'],
    [changed((machine) => { delete machine['processors']; }), 'processors'], [changed((machine) => { machine['networkInterfaces'] = [{ mac: '01:00:00:00:00:01', backend: { type: 'user' } }]; }), 'networkInterfaces.0.mac'],
    [changed((machine) => { machine['networkInterfaces'] = [{ backend: { type: 'bridge', bridge: 'br0,script=/x' } }]; }), 'networkInterfaces.0'],
    [changed((machine) => { machine['machineType'] = 'q35,dumpdtb=/x'; }), 'machineType'], [changed((machine) => { delete machine['firmware']; }), 'nvram needs firmware'], [changed((machine) => { machine['initrd'] = 'x'; }), 'initrd needs kernel'],
    [changed((machine) => { machine['consoleLog'] = 'console'; }), 'consoleLog'], [changed((machine) => { machine['nvram'] = 'root.raw'; }), 'one file'],
    [changed((machine) => { machine['disks'] = [{ file: 'a.raw', interface: 'ide', readOnly: true }]; }), 'cannot be read-only'],
  ])('%j is refused: %s', (json, message) => {
    const error = thrown(() => qemuFormat.parse(json));
    expect(error.kind).toBe('invalid-argument');
    expect(error.message).toContain(message);
  });

  it('is refused when it is nested without end', () => {
    for (const deep of [`${'['.repeat(200_000)}${']'.repeat(200_000)}`, changed((machine) => { machine['annotations'] = '@'; }).replace('"@"', `${'['.repeat(100_000)}${']'.repeat(100_000)}`)]) {
      expect(thrown(() => qemuFormat.parse(deep)).message).toContain('nested');
    }
  });

  it.each([
    [['-drive', 'file=/x'], 'disks are given'], [['--drive', 'file=/x'], 'disks are given'], [['-blockdev', '{}'], 'disks'], [['-hda', 'x'], 'disks'], [['-qmp', 'stdio'], 'daemon alone'], [['-daemonize'], 'starts and ends'],
    [['-S'], 'starts and ends'], [['-snapshot'], 'disks'], [['evil.img'], 'would open it as a disk'], [['-no-reboot', 'evil.img'], 'would open it as a disk'], [['-rtc', 'base=utc', 'evil.img'], 'would open it as a disk'],
    [['-rtc'], 'needs a value'], [['-rtc', '-device'], 'needs a value'], [['-newoption', 'x'], 'none of the options'], [['-'], 'would open it'], [['-constructor', 'x'], 'none of the options'], [['-netdev', 'user'], 'networkInterfaces'],
    [['-rtc', 'base=utc', '-monitor', 'stdio'], 'extraArguments.2'],
  ])('%j is no extra argument: %s', (list, message) => {
    const error = thrown(() => qemuFormat.parse(changed((machine) => { machine['extraArguments'] = list; })));
    expect(error.kind).toBe('invalid-argument');
    expect(error.message).toContain(message);
  });
});

describe('any description', () => {
  it('is refused or comes out byte for byte', { timeout: 180_000 }, () => {
    fc.assert(fc.property(mutated(text, JUNK), (json) => { assertSoundOnAnything(qemuFormat, json); }), { numRuns: 1000 });
    fc.assert(fc.property(fc.json(), (json) => { assertSoundOnAnything(qemuFormat, json); }), { numRuns: 300 });
    fc.assert(fc.property(fc.jsonValue(), fc.constantFrom('disks', 'name', 'networkInterfaces', 'annotations', 'memory', 'extraArguments'), (value, key) => {
      assertSoundOnAnything(qemuFormat, changed((machine) => { machine[key] = value; }));
    }), { numRuns: 500 });
  });
});

describe("QEMU's arguments", () => {
  const command = qemuCommand(parseQemuMachine(text), options);
  const valuesOf = (option: string): string[] => command.arguments.filter((_, index) => command.arguments[index - 1] === option);

  it('give every disk as raw, past the cache of the host, with discard', () => {
    expect(command.program).toBe('qemu-system-x86_64');
    expect(valuesOf('-blockdev').map((value) => JSON.parse(value) as unknown)).toEqual([
      { 'driver': 'raw', 'node-name': 'firmware', 'read-only': true, 'file': { 'driver': 'file', 'filename': '/usr/share/OVMF/OVMF_CODE.fd', 'read-only': true } },
      { 'driver': 'raw', 'node-name': 'nvram', 'read-only': false, 'file': { driver: 'file', filename: '/srv/machines/golden/OVMF_VARS.fd' } },
      ...[['root.raw', true, false], ['data, more.raw', false, false], ['tools.raw', true, true], ['old.raw', true, false]].map(([file, direct, readOnly], index) => ({
        'driver': 'raw', 'node-name': `disk${index}`, 'read-only': readOnly, 'discard': 'unmap', 'cache': { direct, 'no-flush': false },
        'file': { 'driver': 'file', 'filename': `/srv/machines/golden/${String(file)}`, 'aio': 'threads', 'discard': 'unmap', 'cache': { direct, 'no-flush': false }, 'read-only': readOnly },
      })),
    ]);
    expect(command.arguments).not.toContain('-drive');
  });

  it('name the machine, its sockets, its interfaces and what it adds', () => {
    expect(valuesOf('-name')).toEqual(['guest=golden,debug-threads=on']);
    expect(valuesOf('-machine')).toEqual(['type=q35,pflash0=firmware,pflash1=nvram']);
    expect(valuesOf('-accel')).toEqual(['kvm', 'tcg,thread=multi']);
    expect(valuesOf('-netdev')).toEqual(['user,id=netdev0,hostfwd=tcp:127.0.0.1:2222-:22', 'tap,id=netdev1,ifname=tap7,script=no,downscript=no']);
    expect(valuesOf('-device').map((value) => value.startsWith('{') ? (JSON.parse(value) as { driver: string }).driver : value))
      .toEqual(['virtio-scsi-pci', 'virtio-blk-pci', 'scsi-hd', 'virtio-blk-pci', 'ide-hd', 'virtio-net-pci', 'virtio-net-pci', 'virtio-serial-pci', 'virtserialport', 'virtio-rng-pci']);
    expect(valuesOf('-chardev')).toEqual(['file,id=console,path=/srv/machines/golden/console.log,append=on', 'socket,id=qmp,path=/run/a/qmp,server=on,wait=off', 'socket,id=agent,path=/run/a/agent,server=on,wait=off']);
    const odd = qemuCommand({ ...parseQemuMachine(text), name: 'a,b=c' }, { ...options, qmpSocket: '/run/a,b/qmp', agentSocket: null });
    expect(odd.arguments).toContain('guest=a,,b=c,debug-threads=on');
    expect(odd.arguments).toContain('socket,id=qmp,path=/run/a,,b/qmp,server=on,wait=off');
    expect(odd.arguments.join(' ')).not.toContain('guest_agent');
    expect(thrown(() => qemuCommand(parseQemuMachine(text), { ...options, qmpSocket: 'qmp' })).kind).toBe('invalid-argument');
  });

  it('start a real QEMU with every kind of disk and interface, which then says by its protocol what it has', { timeout: 180_000 }, () => {
    const directory = mkdtempSync(join(tmpdir(), 'offshoot-qemu-'));
    try {
      for (const name of ['root.raw', 'data, more.raw', 'tools.raw', 'old.raw', 'fast.raw']) {
        writeFileSync(join(directory, name), '');
        truncateSync(join(directory, name), 1024 ** 2);
      }
      const machine = parseQemuMachine(changed((each) => {
        each['memory'] = '64MiB';
        each['accelerator'] = 'tcg';
        delete each['firmware'];
        delete each['nvram'];
        (each['disks'] as unknown[]).push({ file: 'fast.raw', interface: 'nvme', cache: 'directsync' });
        each['networkInterfaces'] = ['virtio', 'e1000', 'e1000e', 'rtl8139', 'vmxnet3'].map((model, index) => ({ model, mac: `52:54:00:00:00:0${index}`, backend: { type: 'user', restrict: true } }));
      }));
      const started = qemuCommand(machine, { directory, qmpSocket: join(directory, 'qmp'), agentSocket: join(directory, 'agent') });
      // Its protocol on standard input besides; stopped, so that no guest runs.
      const run = spawnSync(started.program, [...started.arguments, '-S', '-qmp', 'stdio'], {
        encoding: 'utf8', timeout: 120_000,
        input: '{"execute":"qmp_capabilities"}{"execute":"query-block"}{"execute":"query-uuid"}{"execute":"query-name"}{"execute":"quit"}',
      });
      expect(run.stderr).toBe('');
      expect(run.status).toBe(0);
      const answers = run.stdout.trim().split('\n').map((line) => JSON.parse(line) as { return?: unknown });
      const blocks = answers.flatMap(({ return: value }) => Array.isArray(value) ? value as { inserted?: { file: string; drv: string; ro: boolean; cache: { direct: boolean; writeback: boolean } } }[] : []);
      expect(blocks.map(({ inserted }) => [inserted?.file, inserted?.drv, inserted?.ro, inserted?.cache.direct, inserted?.cache.writeback])).toEqual([
        [join(directory, 'root.raw'), 'raw', false, true, true], [join(directory, 'data, more.raw'), 'raw', false, false, false],
        [join(directory, 'tools.raw'), 'raw', true, true, true], [join(directory, 'old.raw'), 'raw', false, true, true], [join(directory, 'fast.raw'), 'raw', false, true, false],
      ]);
      expect(answers).toContainEqual({ return: { UUID: '0c1f3a52-7b5d-4e0a-9c7e-2f6a1b9d8e10' } });
      expect(answers).toContainEqual({ return: { name: 'golden' } });
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

describe('the formats', () => {
  const adapters = new MachineAdapters();
  for (const format of MACHINE_FORMATS) adapters.addFormat(format);
  const formatOf = (name: string, text: string): ReturnType<MachineAdapters['formatOf']> => adapters.formatOf(name, text);
  const expected: Record<string, string> = { 'esxi8.vmx': 'vmx', 'workstation.vmx': 'vmx', 'libvirt-inactive-ovmf.xml': 'libvirt', 'libvirt-running.xml': 'libvirt', 'machine.json': 'qemu' };

  it('tell a configuration by its name and its beginning', () => {
    expect(Object.keys(expected).sort()).toEqual(SAMPLES);
    for (const name of SAMPLES) expect(formatOf(name, sample(name).slice(0, 400))?.id, name).toBe(expected[name]);
    for (const name of ['golden.vmxf', 'machine.json~', 'package.json', 'root.raw', 'golden.vmdk', 'xml', '']) expect(formatOf(name, '<domain>'), name).toBeNull();
  });

  it('leave every sample byte for byte as it was', () => {
    for (const name of SAMPLES) {
      const format = formatOf(name, sample(name))!;
      const document = format.parse(sample(name));
      document.facts();
      for (const key of document.keys()) expect(document.get(key), `${name}: ${key}`).not.toBeNull();
      expect(document.toText(), name).toBe(sample(name));
      assertSoundOnAnything(format, sample(name));
    }
  });

  it('name the configuration of a machine so that they know it again, and regenerate no configuration and no disk', () => {
    for (const format of MACHINE_FORMATS) {
      expect(formatOf(format.fileName('web-07'), '<domain>')?.id).toBe(format.id);
      for (const name of [format.fileName('web-07'), 'root.raw', 'root.vmdk', 'root-flat.vmdk', 'seed.iso']) expect(format.isRegenerated(name), name).toBe(false);
      for (const name of ['', '..', 'a/b', 'a\0b']) expect(thrown(() => format.fileName(name)).kind, name).toBe('invalid-argument');
    }
  });
});
