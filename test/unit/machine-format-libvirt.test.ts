import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import type { FileReference } from '../../daemon/machines/format.js';
import { libvirtFormat } from '../../daemon/machines/formats/libvirt.js';
import { assertSoundOnAnything, CLONE_UUID, identity, mutated } from '../support/machine-texts.js';
import { sample, thrown } from './machine-format-support.js';

const inactive = sample('libvirt-inactive-ovmf.xml');
const running = sample('libvirt-running.xml');
const JUNK = ['<', '>', '&', '&amp;', '&lol;', '<!--', '-->', "'", '"', ' x="1"', '<a/>', '</domain>', '<![CDATA[<name>]]>', '<!DOCTYPE a [<!ENTITY b "c">]>', '\u{1F600}', '<disk/>', '<interface/>', '\r\n', '<name>x</name>', '<?pi?>'];

const own = ({ slot, role }: FileReference): string | null => role === 'disk' || role === 'nvram' || role === 'other' ? `/mnt/lab/web-07/${slot}` : null;

/** Lines of one text that the other does not have. */
function missing(from: string, to: string): string[] {
  const there = new Set(to.split('\n'));
  return from.split('\n').filter((line) => !there.has(line)).map((line) => line.trim());
}

describe('the facts of a domain', () => {
  it('are read from what libvirt keeps: firmware, comments, an interface without an address', () => {
    expect(libvirtFormat.parse(inactive).facts()).toEqual({
      name: 'golden', uuid: '7a1c9a52-0f5b-4c52-9b3a-53b1d1d0c0de', memoryBytes: 4 * 1024 ** 3, processors: 4, macs: ['52:54:00:aa:bb:01', null],
      files: [
        { slot: 'loader', file: '/usr/share/OVMF/OVMF_CODE_4M.ms.fd', role: 'firmware', diskFormat: null },
        { slot: 'nvram', file: '/srv/machines/golden/golden_VARS.fd', role: 'nvram', diskFormat: null },
        { slot: 'vda', file: '/srv/machines/golden/root.raw', role: 'disk', diskFormat: 'qcow2' },
        { slot: 'vdb', file: 'data & more.raw', role: 'disk', diskFormat: null },
        { slot: 'sda', file: '/srv/iso/debian-12.iso', role: 'cdrom', diskFormat: 'raw' },
        { slot: 'serial0', file: '/srv/machines/golden/console.log', role: 'other', diskFormat: null },
      ],
    });
  });

  it('are read from what "virsh dumpxml" prints of a running one', () => {
    expect(libvirtFormat.parse(running).facts()).toMatchObject({
      name: 'web01', memoryBytes: 512 * 1024 ** 2, processors: 1, macs: ['52:54:00:6b:3c:58'],
      files: [{ slot: 'vda', file: '/mnt/offshoot/lab/web01/root.raw', diskFormat: 'raw' }],
    });
  });
});

describe('a clone of a domain', () => {
  it('has what is its own, and every other line as it was', () => {
    const document = libvirtFormat.parse(inactive);
    const changes = document.customise(identity(['52:54:00:00:00:01', '52:54:00:00:00:02'], own));
    const text = document.toText();
    expect(libvirtFormat.parse(text).facts()).toMatchObject({
      name: 'web-07', uuid: CLONE_UUID, macs: ['52:54:00:00:00:01', '52:54:00:00:00:02'],
      files: [{}, { slot: 'nvram', file: '/mnt/lab/web-07/nvram' }, { file: '/mnt/lab/web-07/vda', diskFormat: 'raw' }, { file: '/mnt/lab/web-07/vdb', diskFormat: 'raw' }, { file: '/srv/iso/debian-12.iso' }, { file: '/mnt/lab/web-07/serial0' }],
    });
    expect(missing(text, inactive)).toEqual([
      '<name>web-07</name>',
      `<uuid>${CLONE_UUID}</uuid>`,
      '<genid></genid>',
      `<entry name='uuid'>${CLONE_UUID}</entry>`,
      "<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/mnt/lab/web-07/nvram</nvram>",
      "<driver name='qemu' type='raw' cache='none' discard='unmap'/>",
      "<source file='/mnt/lab/web-07/vda'/>",
      `<disk type="file" device="disk"><driver type='raw'/><source file="/mnt/lab/web-07/vdb"/><target dev="vdb" bus="virtio"/></disk>`,
      "<driver type='raw'/>",
      "<mac address='52:54:00:00:00:01'/>",
      "<mac address='52:54:00:00:00:02'/>",
      '<parameters/>',
      '<target/>',
      "<source path='/mnt/lab/web-07/serial0'/>",
      "<graphics type='vnc' autoport='yes' listen='127.0.0.1'>",
      "<cid auto='yes'/>",
    ]);
    expect(changes).toContainEqual({ key: 'name', action: 'set', before: 'golden', after: 'web-07' });
    expect(changes).toContainEqual({ key: 'interface.1.mac', action: 'set', before: null, after: '52:54:00:00:00:02' });
    expect(changes).toContainEqual({ key: 'devices/interface/target@dev', action: 'removed', before: 'tap-golden', after: null });
  });

  it('of a running domain has nothing of the run: ids, aliases, terminals, ports, labels, the chain of files; addresses stay', () => {
    const document = libvirtFormat.parse(running);
    document.customise(identity(['52:54:00:00:00:01'], own));
    const text = document.toText();
    expect(missing(running, text)).toEqual([
      "<domain type='qemu' id='3'>", '<name>web01</name>', '<uuid>9f3c1a77-6d0e-4b8e-8a55-0c7a5d2b1e44</uuid>',
      "<source file='/mnt/offshoot/lab/web01/root.raw' index='1'/>",
      "<backingStore type='file'>", "<format type='raw'/>", "<source file='/mnt/offshoot/golden/root.raw'/>", '<backingStore/>', '</backingStore>',
      "<mirror type='file' file='/tmp/copy.raw' format='raw' job='copy' ready='yes'/>", "<alias name='virtio-disk0'/>", "<alias name='virtio-serial0'/>",
      "<mac address='52:54:00:6b:3c:58'/>", "<source network='default' portid='f6b1e5b1-2b1e-4a31-9b0e-4f7c3e2b6c11' bridge='virbr0'/>", "<target dev='vnet3'/>",
      "<source path='/dev/pts/1'/>", "<alias name='serial0'/>", "<console type='pty' tty='/dev/pts/1'>", "<source path='/dev/pts/1'/>", "<alias name='serial0'/>",
      "<source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-3-web01/org.qemu.guest_agent.0'/>",
      "<target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>", "<alias name='channel0'/>",
      "<graphics type='vnc' port='5900' autoport='yes' listen='127.0.0.1'>",
      '<label>libvirt-9f3c1a77-6d0e-4b8e-8a55-0c7a5d2b1e44</label>', '<imagelabel>libvirt-9f3c1a77-6d0e-4b8e-8a55-0c7a5d2b1e44</imagelabel>',
      '<label>+64055:+106</label>', '<imagelabel>+64055:+106</imagelabel>',
    ]);
    expect(text).toContain("<alias name='ua-uplink'/>");
    expect(text).not.toMatch(/\n\s*\n\s*</);
    expect(text).not.toContain('web01');
  });

  it('without variables of its own for the firmware gets new ones from the template, and not those of the source', () => {
    const document = libvirtFormat.parse(inactive);
    document.customise(identity(['52:54:00:00:00:01', '52:54:00:00:00:02'], (reference) => reference.role === 'nvram' ? null : own(reference)));
    expect(document.toText()).toContain("<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'></nvram>");
  });

  it('is refused where it would write to what the source writes to', () => {
    const two = ['52:54:00:00:00:01', '52:54:00:00:00:02'];
    const refusal = (text: string, fileOf = own): string => {
      const error = thrown(() => libvirtFormat.parse(text).customise(identity(two, fileOf)));
      expect(error.kind).toBe('not-supported');
      return error.message;
    };
    expect(refusal(inactive, () => null)).toContain('vda');
    expect(refusal(inactive.replace("<source file='/srv/machines/golden/root.raw'/>", "<source protocol='rbd' name='p/i'/>").replace("<disk type='file' device='disk'>", "<disk type='network' device='disk'>"))).toContain('line 54');
    expect(refusal(inactive.replace("value='-fw_cfg'", "value='file=/srv/machines/golden/root.raw'"))).toContain('argument for QEMU');
    expect(thrown(() => libvirtFormat.parse(inactive).customise(identity(['52:54:00:00:00:01'], own))).message).toContain('2 network interfaces');
  });

  it('takes a block device of the host for a file when it has one', () => {
    const document = libvirtFormat.parse("<domain><name>a</name><devices><disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/a'/><target dev='vda'/></disk></devices></domain>");
    document.customise(identity([], own));
    expect(document.toText()).toBe(`<domain><uuid>${CLONE_UUID}</uuid><name>web-07</name><devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/mnt/lab/web-07/vda'/><target dev='vda'/></disk></devices></domain>`);
  });
});

describe('keys of a domain', () => {
  it('are names that people guess, and paths for the rest, in the order of the text', () => {
    const document = libvirtFormat.parse(inactive);
    const keys = document.keys();
    expect(keys.slice(0, 4)).toEqual(['@type', 'name', 'uuid', 'genid']);
    for (const [key, value] of [
      ['name', 'golden'], ['title', 'Debian & friends <base>'], ['memory', '4GiB'], ['vcpu', '4'], ['vcpu/@current', '2'], ['machine', 'pc-q35-7.2'], ['interface.0.mac', '52:54:00:AA:BB:01'],
      ['interface.0.network', 'default'], ['interface.1.bridge', 'br0'], ['disk.vda.cache', 'none'], ['disk.vdb.file', 'data & more.raw'], ['disk.vda.serial', 'ROOT0001'],
      ['devices/disk[1]/address/@slot', '0x00'], ['cpu/topology/@cores', '2'], ['qemu:commandline/qemu:arg[2]/@value', 'name=opt/org.lab/role,string=web'], ['on_crash', 'destroy'],
    ] as const) {
      expect(document.get(key), key).toBe(value);
      expect(keys, key).toContain(key);
    }
    expect(keys.indexOf('memory')).toBeLessThan(keys.indexOf('disk.vda.cache'));
    expect(document.get('devices/disk[1]/driver/@cache')).toBe('none');
    expect(document.get('devices')).toBeNull();
    expect(document.get('no/such/thing')).toBeNull();
  });

  it('are set in place, and nothing else changes', () => {
    const document = libvirtFormat.parse(inactive);
    for (const [key, value] of [
      ['memory', '8GiB'], ['vcpu', '6'], ['title', 'a < b & "c"'], ['disk.vda.cache', 'writeback'], ['devices/disk[1]/driver/@io', 'threads'], ['interface.1.mac', '52-54-00-00-00-09'],
      ['uuid', CLONE_UUID], ['cmdline', 'quiet'], ['devices/disk[2]/target/@bus', 'sa"ta\'s'],
    ] as const) document.set(key, value);
    expect(missing(document.toText(), inactive)).toEqual([
      `<uuid>${CLONE_UUID}</uuid>`, '<title>a &lt; b &amp; "c"</title>', "<memory unit='KiB'>8388608</memory>", "<currentMemory unit='KiB'>8388608</currentMemory>", "<vcpu placement='static'>6</vcpu>",
      `<entry name='uuid'>${CLONE_UUID}</entry>`, '<cmdline>quiet</cmdline>', "<topology sockets='3' dies='1' cores='2' threads='1'/>",
      "<driver name='qemu' type='qcow2' cache='writeback' discard='unmap' io='threads'/>",
      `<disk type="file" device="disk"><source file="data &amp; more.raw"/><target dev="vdb" bus="sa&quot;ta's"/></disk>`,
      "<mac address='52:54:00:00:00:09'/>",
    ]);
    expect(document.get('devices/disk[2]/target/@bus')).toBe('sa"ta\'s');
  });

  it.each([
    ['memory', '8'], ['memory', '8QiB'], ['memory', '0.3KiB'], ['currentMemory', '5GiB'], ['vcpu', '5'], ['vcpu', '-1'], ['uuid', 'x'], ['name', 'a/b'], ['interface.0.mac', 'ff:ff:ff:ff:ff:ff'],
    ['devices/interface[1]/mac/@address', 'nonsense'], ['interface.7.mac', '52:54:00:00:00:01'], ['disk.vda.format', 'qcow2'], ['vcpus', '4'], ['devices', 'x'], ['devices/disk[9]/target/@dev', 'vdx'],
    ['title', 'a\u0000b'], ['title', '\uD800'], ['', 'x'], ['@@', 'x'], ['a b', 'x'], ['name/@bad name', 'x'],
  ])('%s cannot be %j', (key, value) => {
    const document = libvirtFormat.parse(inactive);
    expect(thrown(() => { document.set(key, value); }).kind).toBe('invalid-argument');
    expect(document.toText()).toBe(inactive);
  });

  it('hold any text that XML can hold', { timeout: 180_000 }, () => {
    fc.assert(fc.property(fc.string({ unit: 'grapheme', maxLength: 30 }), (value) => {
      const document = libvirtFormat.parse(inactive);
      const canHold = !/[^\t\n\r\u0020-\uFFFD\u{10000}-\u{10FFFF}]/u.test(value);
      for (const key of ['description', 'disk.vda.bus']) {
        if (canHold) document.set(key, value);
        else expect(thrown(() => { document.set(key, value); }).kind).toBe('invalid-argument');
        if (!canHold) continue;
        const read = libvirtFormat.parse(document.toText()).get(key);
        expect(read).toBe(key === 'description' ? value.trim() : value);
      }
    }), { numRuns: 300 });
  });
});

describe('what is no domain', () => {
  it.each([
    ['<domain>\n<name>a</nome>\n</domain>', 'line 2'], ['<domain>\n\n<name b=c/></domain>', 'line 3'], ['', 'line 1'], ['hello', 'line 1'], ['<domain>&b;</domain>', 'entity'],
    ['\n<network/>', 'line 2 of the domain\'s XML begins with <network>'], ['<domstatus><domain/></domstatus>', 'virsh dumpxml'],
    ['<!DOCTYPE domain [<!ENTITY a "b">]>\n<domain><name>a</name></domain>', 'document type'], ['<!DOCTYPE domain SYSTEM "file:///etc/passwd">\n<domain/>', 'document type'],
  ])('%j is refused with %s', (text, message) => {
    const error = thrown(() => libvirtFormat.parse(text));
    expect(error.kind).toBe('invalid-argument');
    expect(error.message).toContain(message);
  });

  it('is refused when it is too deep or too large', () => {
    for (const [text, message] of [
      [`${'<a>'.repeat(200)}${'</a>'.repeat(200)}`, 'nested too deeply'], ['<a>'.repeat(300_000), 'nested too deeply'], [`<domain>${' '.repeat(1024 * 1024)}</domain>`, 'too large'],
    ] as const) {
      const error = thrown(() => libvirtFormat.parse(text));
      expect(error.kind).toBe('invalid-argument');
      expect(error.message).toContain(message);
    }
  });

  it('is not taken for one', () => {
    for (const text of ['<domain>', '<?xml version="1.0"?>\n<!-- a <domain> --><!-- b -->\n<domain type="kvm">', '\uFEFF<domain/>', '<!-- a comment that goes on and on', inactive, running]) expect(libvirtFormat.recognises('a.xml', text), text).toBe(true);
    for (const text of ['', ' ', '<domains>', '<network/>', '<!-- <domain> -->\n<pool/>', `${'<!---->'.repeat(300)}<pool/>`]) expect(libvirtFormat.recognises('a.xml', text), text).toBe(false);
    expect(libvirtFormat.recognises('a.txt', inactive)).toBe(false);
    expect(libvirtFormat.recognises('.xml', inactive)).toBe(false);
  });
});

describe('any XML', () => {
  it('is refused or comes out byte for byte, and a clone of it is a domain again', { timeout: 180_000 }, () => {
    fc.assert(fc.property(fc.oneof(mutated(inactive, JUNK), mutated(running, JUNK), mutated(inactive.replaceAll('\n', '\r\n'), JUNK)), (text) => { assertSoundOnAnything(libvirtFormat, text); }), { numRuns: 700 });
    fc.assert(fc.property(fc.array(fc.constantFrom(...JUNK, '<domain>', '<devices>', '</devices>'), { maxLength: 12 }), (pieces) => { assertSoundOnAnything(libvirtFormat, pieces.join('')); }), { numRuns: 500 });
  });

  it('with names that only look blank (U+FEFF, which XML allows in a name) is read by the names that it lists', () => {
    const text = inactive.replace('<smbios mode=', '<\u{FEFF}smbios \u{FEFF}kind="a" mode=');
    expect(text).not.toBe(inactive);
    expect(libvirtFormat.parse(text).keys()).toEqual(expect.arrayContaining(['os/\u{FEFF}smbios/@mode', 'os/\u{FEFF}smbios/@\u{FEFF}kind']));
    assertSoundOnAnything(libvirtFormat, text);
  });

  it('of a made domain, whatever its quotes, blanks and characters, keeps all that a clone does not change', { timeout: 180_000 }, () => {
    const quote = fc.constantFrom("'", '"');
    const blank = fc.constantFrom('', ' ', '\n    ', '\r\n\t', '<!-- \u{1F600} -->', '<other a="1">x</other>');
    fc.assert(fc.property(fc.array(fc.record({ q: quote, before: blank, after: blank, mac: fc.boolean() }), { maxLength: 5 }), quote, blank, (interfaces, q, between) => {
      const written = (mac: (index: number) => string): string => `<domain type=${q}kvm${q}>${between}<name>@</name>${between}<uuid>#</uuid><devices>${interfaces
        .map((each, index) => `${each.before}<interface type=${each.q}user${each.q} >${each.before}<mac  address = ${each.q}${mac(index)}${each.q} />${each.after}</interface>${each.after}`).join('')}</devices></domain>`;
      const document = libvirtFormat.parse(written(() => '52:54:00:ff:ff:ff'));
      const macs = interfaces.map((_, index) => `52:54:00:00:00:0${index}`);
      document.customise(identity(macs));
      expect(document.toText()).toBe(written((index) => macs[index]!).replace('@', 'web-07').replace('#', CLONE_UUID));
    }), { numRuns: 300 });
  });
});
