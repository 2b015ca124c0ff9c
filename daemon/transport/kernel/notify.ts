/**
 * Messages from the server to the kernel that answer nothing: a reply header with unique 0 and a code in `error`.
 *
 * Pure. RESEND is written once, before any thread of a new server reads. Of the INVAL messages there is one form only,
 * and on purpose: that of attributes, which waits for nothing. INVAL_ENTRY takes the directory's lock and INVAL_INODE of
 * pages takes theirs, and both are held by callers that wait for this server. If it is killed in such a wait, it
 * cannot go until those callers are answered, and they cannot be answered until it is gone and the next one starts: tried,
 * and only an abort of the connection ends it. PROTOCOL.md says why attributes are enough.
 */
import { setInt64, viewOf } from './codec.js';
import { InvalInodeOut, NotifyCode, OutHeader } from './protocol.js';

/** All unanswered requests of all readers go back to the head of the queue, marked by bit 63 of `unique`. */
export function resendMessage(): Uint8Array {
  return notification(NotifyCode.RESEND, 0);
}

/** The kernel forgets a node's attributes, its size among them, and asks before it uses the node again. */
export function invalidateAttributesMessage(nodeId: number): Uint8Array {
  const message = notification(NotifyCode.INVAL_INODE, InvalInodeOut.bytes);
  const view = viewOf(message);
  setInt64(view, OutHeader.bytes + InvalInodeOut.ino, nodeId);
  setInt64(view, OutHeader.bytes + InvalInodeOut.offset, ATTRIBUTES_ONLY);
  return message;
}

/** A negative offset leaves the pages alone. */
const ATTRIBUTES_ONLY = -1;

function notification(code: number, payloadBytes: number): Uint8Array {
  const message = new Uint8Array(OutHeader.bytes + payloadBytes);
  const view = viewOf(message);
  view.setUint32(OutHeader.len, message.byteLength, true);
  view.setInt32(OutHeader.error, code, true);
  return message;
}
