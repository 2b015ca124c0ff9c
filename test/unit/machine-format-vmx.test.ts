import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { parseVmdkDescriptor, vmdkDescriptor } from '../../daemon/machines/formats/vmdk.js';
import { VMX_DROPPED, vmxFormat } from '../../daemon/machines/formats/vmx.js';
import { assertSoundOnAnything, CLONE_UUID, identity, mutated } from '../support/machine-texts.js';
import { sample, thrown } from './machine-format-support.js';

const esxi = sample('esxi8.vmx');
const workstation = sample('workstation.vmx');
const JUNK = ['"', '|', '|22', '|zz', '#', '=', '\n', '\r\n', '\0', '\u{1F600}', 'ethernet0.present = "TRUE"\n', 'uuid.bios = ""\n', ' '.repeat(500), '\uFEFF', '.encoding = "GBK"\n'];

describe('the facts of a .vmx file', () => {
  it('are read from one that ESXi wrote', () => {
    expect(vmxFormat.parse(esxi).facts()).toEqual({
      name: 'golden', uuid: '421a7c5e-0b2d-4f9a-8c3e-5d6f7a8b9c0d', memoryBytes: 8192 * 1024 ** 2, processors: 4,
      macs: ['00:50:56:9a:5e:0f', '00:50:56:01:02:03'],
      files: [
        { slot: 'scsi0:0', file: 'golden.vmdk', role: 'disk', diskFormat: 'vmdk' },
        { slot: 'scsi0:1', file: '/vmfs/volumes/6508fa3c-2a1b9c1e-9a0f-0050569a1b2c/golden/golden_1.vmdk', role: 'disk', diskFormat: 'vmdk' },
        { slot: 'sata0:0', file: '/vmfs/volumes/iso/debian-12.iso', role: 'cdrom', diskFormat: null },
        { slot: 'nvram', file: 'golden.nvram', role: 'nvram', diskFormat: null },
      ],
    });
  });

  it('are read from one that Workstation wrote: other case, no quotes, comments behind values, CRLF', () => {
    const document = vmxFormat.parse(workstation);
    expect(document.facts()).toMatchObject({
      name: 'Debian 12', uuid: '564dfb78-d1cd-e9a3-0e27-880007b70f3b', memoryBytes: 2 * 1024 ** 3, processors: 2, macs: ['00:0c:29:26:21:37'],
      files: [{ slot: 'nvme0:0', file: 'Debian 12.vmdk' }, { slot: 'nvram' }],
    });
    expect(document.get('MAINMEM.usenamedfile')).toBe('FALSE');
    expect(document.get('pcibridge0.present')).toBe('TRUE');
    expect(document.get('vmx.unknown.setting')).toBe('bare');
    expect(document.get('tools.syncTime'), 'the last of two').toBe('FALSE');
  });
});

describe('a clone of a .vmx file', () => {
  const place = '/vmfs/volumes/offshoot/lab/web-07/';

  it('has what is its own, nothing of the source, and every other line as it was', () => {
    const document = vmxFormat.parse(esxi);
    const changes = document.customise(identity(['00:50:56:00:00:01', '00:50:56:3f:ff:ff'], ({ role, slot }) => role === 'disk' ? `${place}${slot.replace(':', '-')}.vmdk` : null));
    const text = document.toText();
    expect(vmxFormat.parse(text).facts()).toMatchObject({
      name: 'web-07', uuid: CLONE_UUID, macs: ['00:50:56:00:00:01', '00:50:56:3f:ff:ff'],
      files: [{ file: `${place}scsi0-0.vmdk` }, { file: `${place}scsi0-1.vmdk` }, { file: '/vmfs/volumes/iso/debian-12.iso' }],
    });
    expect(text).toContain('uuid.bios = "56 4d 7b 10 22 be 4a 6c-8f 01 01 23 45 67 89 ab"\n');
    expect(text).toContain('ethernet0.addressType = "static"\n');
    const linesBefore = esxi.split('\n');
    const linesAfter = text.split('\n');
    const keyOf = (line: string): string => line.split(' ')[0]!;
    expect(linesBefore.filter((line) => !linesAfter.includes(line)).map(keyOf).sort()).toEqual([
      'cleanShutdown', 'displayName', 'ethernet0.addressType', 'ethernet0.generatedAddress', 'ethernet1.address', 'extendedConfigFile', 'migrate.hostLog', 'nvram',
      'scsi0:0.fileName', 'scsi0:1.fileName', 'sched.swap.derivedName', 'softPowerOff', 'uuid.bios', 'uuid.location', 'vc.uuid', 'vm.genid', 'vm.genidX', 'vmci0.id', 'vmxstats.filename',
    ].sort());
    expect(linesAfter.filter((line) => linesBefore.includes(line)), 'in their order').toEqual(linesBefore.filter((line) => linesAfter.includes(line)));
    expect(changes).toContainEqual({ key: 'displayName', action: 'set', before: 'golden', after: 'web-07' });
    expect(changes).toContainEqual({ key: 'vc.uuid', action: 'removed', before: '50 1a 3b 77 1e 2c 8d 4a-9b 11 22 33 44 55 66 77', after: null });
  });

  it('has none of the lines of the table, whatever their case', () => {
    const keys = VMX_DROPPED.map(({ key }) => key.replace('*', '0').toUpperCase());
    const document = vmxFormat.parse(`displayName = "x"\nethernet0.present = "TRUE"\n${keys.map((key) => `${key} = "1"\n`).join('')}last = "1"\n`);
    document.customise(identity(['00:50:56:00:00:01']));
    expect(document.keys().filter((key) => keys.includes(key))).toEqual([]);
    expect(document.get('last')).toBe('1');
  });

  it('keeps line ends and comments, gives doubled lines the same value, and keeps the UUID through its first start', () => {
    const document = vmxFormat.parse(`${workstation}\r\nDISPLAYNAME = "twice"`);
    document.customise(identity(['00:50:56:00:00:01']));
    const text = document.toText();
    expect(text.replaceAll('\r\n', '')).not.toContain('\n');
    expect(text).toContain('pciBridge0.present  =  "TRUE"   # two blanks, and a comment\r\n');
    expect(text.match(/^displayname = .*$/gim)).toEqual(['displayName = "web-07"', 'DISPLAYNAME = "web-07"']);
    expect(document.get('uuid.action')).toBe('keep');
    expect(document.get('ethernet0.address')).toBe('00:50:56:00:00:01');
    expect(vmxFormat.parse(text).toText()).toBe(text);
  });

  it('is refused where it would not start, or would write to a disk of the source', () => {
    expect(thrown(() => vmxFormat.parse(workstation).customise(identity(['52:54:00:00:00:01']))).message).toContain('00:50:56:00:00:00');
    expect(thrown(() => vmxFormat.parse(workstation).customise(identity(['00:50:56:40:00:01']))).kind).toBe('invalid-argument');
    expect(thrown(() => vmxFormat.parse(workstation).customise(identity([]))).message).toContain('1 network interfaces');
    expect(thrown(() => vmxFormat.parse(esxi).customise(identity(['00:50:56:00:00:01', '00:50:56:00:00:02']))).kind, 'an absolute disk that stays').toBe('not-supported');
    const raw = vmxFormat.parse('displayName = "x"\nscsi0:0.present = "TRUE"\nscsi0:0.fileName = "rdm.vmdk"\nscsi0:0.deviceType = "rawDisk"\n');
    expect(thrown(() => raw.customise(identity([]))).message).toContain('a disk of the host itself');
  });
});

describe('keys of a .vmx file', () => {
  it('are its own, without case, and the names that all formats share', () => {
    const document = vmxFormat.parse(esxi);
    expect(document.get('memsize')).toBe('8192');
    expect(document.get('memory')).toBe('8GiB');
    expect(document.get('interface.0.mac')).toBe('00:50:56:9a:5e:0f');
    expect(document.get('annotation')).toBe('Made by "the lab"\nSecond line: 50|50');
    document.set('memory', '4GiB');
    document.set('MEMSIZE', '4096');
    document.set('vcpu', '2');
    document.set('uuid', CLONE_UUID.toUpperCase());
    document.set('interface.0.mac', '00-50-56-01-00-01');
    document.set('annotation', 'a "b"\n|');
    document.set('new.key', 'ü');
    const text = document.toText();
    expect(text).toContain('memSize = "4096"\n');
    expect(text).toContain('annotation = "a |22b|22|0A|7C"\n');
    expect(text.endsWith('\nnew.key = "ü"\n')).toBe(true);
    const facts = vmxFormat.parse(text).facts();
    expect(facts).toMatchObject({ uuid: CLONE_UUID, processors: 2, macs: ['00:50:56:01:00:01', '00:50:56:01:02:03'] });
    expect(document.get('ethernet0.generatedAddress')).toBeNull();
    expect(vmxFormat.parse(text).get('annotation')).toBe('a "b"\n|');
  });

  it.each([
    ['memory', '4096'], ['memory', '4097MiB'], ['memSize', '3'], ['memory', '1PiB'], ['vcpu', '0'], ['vcpu', 'two'], ['uuid', 'x'], ['name', ''], ['name', 'a/b'],
    ['interface.0.mac', '00:0c:29:00:00:01'], ['interface.2.mac', '00:50:56:00:00:01'], ['scsi0.present', 'yes'], ['no blank', '1'], ['a"b', '1'], ['scsi0:0.fileName', 'a\nb'],
  ])('%s cannot be %j', (key, value) => {
    const document = vmxFormat.parse(esxi);
    expect(thrown(() => { document.set(key, value); }).kind).toBe('invalid-argument');
    expect(document.toText()).toBe(esxi);
  });

  it('hold only ASCII where the file is of another encoding', () => {
    expect(thrown(() => { vmxFormat.parse(workstation).set('annotation', 'ü'); }).message).toContain('windows-1252');
    expect(thrown(() => vmxFormat.parse(workstation.replace('golden', 'göldén'))).kind).toBe('not-supported');
  });
});

describe('what is no .vmx file', () => {
  it.each([
    ['config.version = "8"\ndisplayName = "open\n', 2], ['displayName = "x"\n\nsomething\n', 3], ['displayName = "x" y\n', 1], ['displayName = "x"\n= "y"\n', 2], ['# a\ndisplayName = a"b\n', 2],
  ])('%j is refused with its line', (text, line) => {
    const error = thrown(() => vmxFormat.parse(text));
    expect(error.kind).toBe('invalid-argument');
    expect(error.message).toContain(`line ${line} `);
  });

  it('is refused when it holds no machine, a NUL, or more than anybody writes', () => {
    for (const text of ['', '#\n', 'a = "b"\n', 'displayName = "a"\0\n', `displayName = "a"\n${'#'.repeat(1024 * 1024)}`]) expect(thrown(() => vmxFormat.parse(text)).kind).toBe('invalid-argument');
  });

  it('takes no longer for a text that is made to take long', { timeout: 180_000 }, () => {
    const blanks = ' '.repeat(400_000);
    expect(thrown(() => vmxFormat.parse(`displayName = a${blanks}"`)).kind).toBe('invalid-argument');
    expect(vmxFormat.parse(`displayName = a${blanks}b`).get('displayName')).toHaveLength(400_002);
    const many = vmxFormat.parse(`displayName = "a"\n${'uuid.location=""\n'.repeat(50_000)}`);
    many.customise(identity([]));
    expect(many.toText().split('\n')).toHaveLength(4);
  });
});

describe('any .vmx file', () => {
  it('is refused or comes out byte for byte', { timeout: 180_000 }, () => {
    fc.assert(fc.property(fc.oneof(mutated(esxi, JUNK), mutated(workstation, JUNK)), (text) => { assertSoundOnAnything(vmxFormat, text); }), { numRuns: 600 });
    fc.assert(fc.property(fc.string({ unit: 'binary', maxLength: 300 }), (text) => { assertSoundOnAnything(vmxFormat, `displayName = "a"\n${text}`); }), { numRuns: 600 });
  });

  it('gives back every value that was set', { timeout: 180_000 }, () => {
    fc.assert(fc.property(fc.string({ unit: 'grapheme', maxLength: 40 }), fc.constantFrom('annotation', 'tools.syncTime', 'a.new.key'), (value, key) => {
      const document = vmxFormat.parse(esxi);
      document.set(key, value);
      expect(vmxFormat.parse(document.toText()).get(key)).toBe(value);
    }), { numRuns: 400 });
  });
});

describe('files beside a .vmx', () => {
  it('are made anew by VMware, or belong to the machine', () => {
    const anew = ['vmware.log', 'vmware-3.log', 'golden.vmxf', 'golden.NVRAM', 'golden-1f2e3d4c.vswp', 'golden.vmx.lck', '.lck-3b00000000000000', 'golden.vmss', 'golden.vmsd', 'golden.hlog'];
    expect(anew.filter((name) => !vmxFormat.isRegenerated(name))).toEqual([]);
    expect(['golden.vmx', 'golden.vmdk', 'golden-flat.vmdk', 'notes.txt', '.log', 'log'].filter((name) => vmxFormat.isRegenerated(name))).toEqual([]);
    expect(vmxFormat.fileName('web-07')).toBe('web-07.vmx');
    expect(thrown(() => vmxFormat.fileName('../x')).kind).toBe('invalid-argument');
  });
});

describe('the descriptor of a disk', () => {
  it('names the flat file and its sectors, for ESXi and for Workstation', () => {
    const text = vmdkDescriptor(10 * 1024 ** 3, 'root-flat.vmdk', '1a2b3c4d');
    expect(text).toContain('\nCID=1a2b3c4d\nparentCID=ffffffff\ncreateType="vmfs"\n');
    expect(text).toContain('\nRW 20971520 VMFS "root-flat.vmdk"\n');
    expect(text).toContain('\nddb.geometry.cylinders = "1305"\n');
    expect(parseVmdkDescriptor(text)).toEqual({
      createType: 'vmfs', contentId: '1a2b3c4d', rawFile: 'root-flat.vmdk',
      extents: [{ access: 'RW', sizeBytes: 10 * 1024 ** 3, type: 'VMFS', file: 'root-flat.vmdk', offsetBytes: 0 }],
    });
    expect(parseVmdkDescriptor(vmdkDescriptor(512, 'r.raw', '00000001', { createType: 'monolithicFlat', adapterType: 'ide' })).extents[0]).toMatchObject({ type: 'FLAT', sizeBytes: 512 });
  });

  it('says what is no raw disk', () => {
    const base = vmdkDescriptor(1024 ** 3, 'a-flat.vmdk', '00000001');
    for (const other of [
      base.replace('parentCID=ffffffff', 'parentCID=00000002'), base.replace('VMFS "', 'SESPARSE "'), base.replace('createType="vmfs"', 'createType="vmfsRawDeviceMap"'),
      base.replace('"a-flat.vmdk"', '"a-flat.vmdk" 63'), base.replace('\n\n# The Disk', '\nRW 8 VMFS "b-flat.vmdk"\n\n# The Disk'),
    ]) {
      expect(other).not.toBe(base);
      expect(parseVmdkDescriptor(other).rawFile).toBeNull();
    }
    for (const text of ['', 'KDMV\u0001', '# Disk DescriptorFile\nRW x VMFS "a"\n', '# Disk DescriptorFile\njunk\n']) expect(thrown(() => parseVmdkDescriptor(text)).kind).toBe('foreign-format');
  });

  it.each([[0, 'a.vmdk', '00000001'], [513, 'a.vmdk', '00000001'], [512, '../a.vmdk', '00000001'], [512, 'a".vmdk', '00000001'], [512, 'a.vmdk', 'ffffffff'], [512, 'a.vmdk', 'xyz']])('is not written for %s %s %s', (size, file, cid) => {
    expect(thrown(() => vmdkDescriptor(size, file, cid)).kind).toBe('invalid-argument');
  });

  it('is one that QEMU, which knows the format too, reads', () => {
    const directory = mkdtempSync(join(tmpdir(), 'offshoot-vmdk-'));
    try {
      for (const createType of ['vmfs', 'monolithicFlat'] as const) {
        writeFileSync(join(directory, 'a-flat.vmdk'), '');
        truncateSync(join(directory, 'a-flat.vmdk'), 64 * 1024 ** 2);
        writeFileSync(join(directory, 'a.vmdk'), vmdkDescriptor(64 * 1024 ** 2, 'a-flat.vmdk', '00000001', { createType }));
        const info = JSON.parse(execFileSync('qemu-img', ['info', '-f', 'vmdk', '--output', 'json', join(directory, 'a.vmdk')], { encoding: 'utf8' })) as Record<string, unknown>;
        expect(info).toMatchObject({ 'format': 'vmdk', 'virtual-size': 64 * 1024 ** 2, 'format-specific': { data: { 'create-type': createType } } });
      }
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});
