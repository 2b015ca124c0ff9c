/** What virsh's words mean, and the one element that is written into a domain's XML. The words are those of libvirt 9.0 in the C locale. */
import { describe, expect, it } from 'vitest';

import { stateOf } from '../../daemon/hypervisor/libvirt/libvirt.js';
import { withOwnerLabel } from '../../daemon/hypervisor/libvirt/owner-label.js';
import { virshError } from '../../daemon/hypervisor/libvirt/virsh.js';

const OWNER = { uid: 1000, gid: 100 };
const LABEL = "<seclabel type='static' model='dac' relabel='no'><label>+1000:+100</label></seclabel>";

describe('virsh', () => {
  it.each([
    ["error: operation failed: domain 'a' already exists with uuid 1-2", 'already-exists'],
    ["error: operation failed: domain 'a' is already defined with uuid 1-2", 'already-exists'],
    ["error: failed to get domain 'x'\nerror: Domain not found: no domain with matching uuid 'x'", 'not-found'],
    ["error: failed to connect to the hypervisor\nerror: Failed to connect socket to '/run/libvirt/libvirt-sock': No such file or directory", 'source-unreachable'],
    ["error: failed to connect to the hypervisor\nerror: Cannot recv data: Connection reset by peer", 'source-unreachable'],
    ['error: Domain is already active', 'in-use'],
    ['error: Requested operation is not valid: domain is not running', 'conflict'],
    ['error: Guest agent is not responding: QEMU guest agent is not connected', 'timed-out'],
    ['error: argument unsupported: QEMU guest agent is not configured', 'not-supported'],
    ["error: internal error: unable to execute QEMU agent command 'guest-fsfreeze-freeze': The command guest-fsfreeze-freeze has not been found", 'not-supported'],
    ["error: Failed to start domain 'a'\nerror: internal error: process exited while connecting to monitor: Could not open '/m/a.img': Permission denied", 'permission-denied'],
    ["error: Failed to start domain 'a'\nerror: Cannot access storage file '/m/a.img': No such file or directory", 'not-found'],
    ['error: Failed to define domain from /dev/stdin\nerror: (domain_definition):3: Opening and ending tag mismatch', 'invalid-argument'],
    ['error: XML error: missing source information for device vda', 'invalid-argument'],
    ['error: something new', 'io-error'],
    ['', 'io-error'],
  ] as const)('%s', (stderr, kind) => {
    const error = virshError('start', 'qemu:///system', stderr);
    expect(error.kind).toBe(kind);
    // What was said is passed on, without the word that is before each line.
    expect(error.message).toContain(stderr.split('\n').at(-1)!.replace('error: ', ''));
  });

  it('domstate', () => {
    const said = ['running (booted)', 'running (unpaused)', 'idle', 'in shutdown (unknown)', 'paused (user)', 'paused (I/O error)', 'pmsuspended (unknown)', 'shut off (unknown)', 'shut off (shutdown)', 'shut off (destroyed)', 'shut off (crashed)', 'crashed (panicked)'];
    expect(said.map(stateOf)).toEqual(
      ['running', 'running', 'running', 'running', 'paused', 'paused', 'paused', 'shut-off', 'shut-off', 'shut-off', 'crashed', 'crashed']);
    expect(() => stateOf('no state')).toThrow(/no state that is known/u);
  });
});

describe('the label of the disks\' owner', () => {
  it('is put before the end of the document, which is as it was otherwise', () => {
    const text = "<?xml version='1.0'?>\n<!-- </domain> -->\n<domain type='qemu'>\n  <name>a</name>\n</domain >\n<!-- after -->\n";
    expect(withOwnerLabel(text, OWNER)).toBe(text.replace('</domain >', `  ${LABEL}\n</domain >`));
    expect(withOwnerLabel('<domain><name>a$&</name></domain>', OWNER)).toBe(`<domain><name>a$&</name>  ${LABEL}\n</domain>`);
  });

  it('is left where it says the same, and refuses another one', () => {
    const own = withOwnerLabel('<domain></domain>', OWNER);
    expect(withOwnerLabel(own, OWNER)).toBe(own);
    expect(() => withOwnerLabel(own, { uid: 1001, gid: 100 })).toThrow(expect.objectContaining({ kind: 'not-permitted' }));
    for (const other of ["<seclabel type='none' model='dac'/>", '<seclabel model="dac" type="static" relabel="yes"><label>+0:+0</label></seclabel>']) {
      expect(() => withOwnerLabel(`<domain>${other}</domain>`, OWNER)).toThrow(expect.objectContaining({ kind: 'not-permitted' }));
    }
  });

  it('replaces the one that libvirt chose for a machine that ran', () => {
    const said = "<domain><seclabel type='dynamic' model='dac' relabel='yes'>\n  <label>+64055:+64055</label>\n</seclabel></domain>";
    expect(withOwnerLabel(said, OWNER)).toBe(`<domain>  ${LABEL}\n</domain>`);
  });

  it('needs a domain', () => {
    expect(() => withOwnerLabel('<network></network>', OWNER)).toThrow(expect.objectContaining({ kind: 'invalid-argument' }));
  });
});
