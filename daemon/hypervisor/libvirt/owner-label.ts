/**
 * Says in a domain's XML as whom its QEMU runs, with libvirt's own means: a static label of the `dac` security model.
 *
 * Without it libvirt runs every machine as one user, and makes the disks that user's while they run: the files of all machines would be open
 * to each of them. With it QEMU is the disks' owner, and `relabel='no'` keeps libvirt from changing the owner of anything.
 * The one place of this adapter that writes into a configuration: one element before the end of the document, which stays as it is otherwise.
 */
import { OffshootError } from '../../../blockstore/errors.js';

/** The end of the document's element: nothing but white space, comments and instructions follow. */
const END = /<\/domain\s*>(?=(?:\s|<!--[\s\S]*?-->|<\?[\s\S]*?\?>)*$)/u;
const DAC_LABEL = /<seclabel\b[^>]*\bmodel\s*=\s*(['"])dac\1[^>]*>(?:[\s\S]*?<\/seclabel\s*>)?/u;

export function withOwnerLabel(text: string, { uid, gid }: { readonly uid: number; readonly gid: number }): string {
  const label = `<label>+${uid}:+${gid}</label>`;
  const own = DAC_LABEL.exec(text)?.[0];
  // A dynamic one, which dumpxml says of a machine that runs, is libvirt's own choice and none of the configuration.
  if (own !== undefined && /^<seclabel\b[^>]*\btype\s*=\s*(['"])dynamic\1/u.test(own)) return withOwnerLabel(text.replace(own, ''), { uid, gid });
  if (own !== undefined) {
    if (own.includes(label)) return text;
    throw new OffshootError('not-permitted',
      `the configuration says itself as whom the machine runs (seclabel, model dac), which is not the disks' owner, user ${uid}: take the element out`, { uid });
  }
  if (!END.test(text)) throw new OffshootError('invalid-argument', 'the configuration is no domain of libvirt: it does not end with </domain>');
  return text.replace(END, (end) => `  <seclabel type='static' model='dac' relabel='no'>${label}</seclabel>\n${end}`);
}
