/**
 * Operations on the session itself, and those that are refused: INIT, DESTROY, FORGET, INTERRUPT, and a table of errnos.
 * Main thread.
 *
 * FORGET and BATCH_FORGET have no reply and need nothing done: node ids are rows of the store and are never used again,
 * so there is no count to keep, and one that a dead server swallowed is no loss. INTERRUPT is answered ENOSYS once,
 * after which the kernel sends no more: no request waits on anything that could be called off.
 */
import { Errno } from '../../../blockstore/errors.js';
import { dataReply, errorReply, newReply, WireError, type Request } from './codec.js';
import { negotiate } from './negotiation.js';
import type { Answer, Operation, OperationHost } from './operation.js';
import { BatchForgetIn, ForgetIn, InitIn, InterruptIn, Opcode } from './protocol.js';

export const sessionOperations: readonly Operation[] = [
  { opcode: Opcode.INIT, name: 'INIT', bodyBytesMin: InitIn.bytesBeforeMinor36, answered: true, absent: Errno.EIO, run: init },
  { opcode: Opcode.DESTROY, name: 'DESTROY', bodyBytesMin: 0, answered: true, absent: Errno.EIO, run: destroy },
  { opcode: Opcode.FORGET, name: 'FORGET', bodyBytesMin: ForgetIn.bytes, answered: false, absent: Errno.EIO, run: unanswered },
  { opcode: Opcode.BATCH_FORGET, name: 'BATCH_FORGET', bodyBytesMin: BatchForgetIn.bytes, answered: false, absent: Errno.EIO, run: unanswered },
  { opcode: Opcode.NOTIFY_REPLY, name: 'NOTIFY_REPLY', bodyBytesMin: 0, answered: false, absent: Errno.EIO, run: unanswered },
  refusal(Opcode.INTERRUPT, 'INTERRUPT', Errno.ENOSYS, InterruptIn.bytes),
  // Asked once each, then never again: the kernel remembers ENOSYS and gives its own answer.
  refusal(Opcode.ACCESS, 'ACCESS', Errno.ENOSYS),
  refusal(Opcode.GETXATTR, 'GETXATTR', Errno.ENOSYS),
  refusal(Opcode.LISTXATTR, 'LISTXATTR', Errno.ENOSYS),
  refusal(Opcode.SETXATTR, 'SETXATTR', Errno.ENOSYS),
  refusal(Opcode.REMOVEXATTR, 'REMOVEXATTR', Errno.ENOSYS),
  refusal(Opcode.POLL, 'POLL', Errno.ENOSYS),
  refusal(Opcode.BMAP, 'BMAP', Errno.ENOSYS),
  refusal(Opcode.SYNCFS, 'SYNCFS', Errno.ENOSYS),
  // Not negotiated, so that the kernel keeps locks by itself, over a restart too.
  refusal(Opcode.GETLK, 'GETLK', Errno.ENOSYS),
  refusal(Opcode.SETLK, 'SETLK', Errno.ENOSYS),
  refusal(Opcode.SETLKW, 'SETLKW', Errno.ENOSYS),
  refusal(Opcode.SETUPMAPPING, 'SETUPMAPPING', Errno.ENOSYS),
  refusal(Opcode.REMOVEMAPPING, 'REMOVEMAPPING', Errno.ENOSYS),
  // Probed by QEMU at every open (block size, alignment): the answer must be the plain «no such ioctl».
  refusal(Opcode.IOCTL, 'IOCTL', Errno.ENOTTY),
  refusal(Opcode.TMPFILE, 'TMPFILE', Errno.EOPNOTSUPP),
];

function init(host: OperationHost, request: Request): Answer {
  const negotiation = negotiate(request.body, host.limits);
  switch (negotiation.outcome) {
    case 'agreed':
      // First kept, then answered: a server that dies in between gets INIT again, one that dies after never does.
      host.keepSession(negotiation.parameters);
      return dataReply(request.unique, negotiation.payload);
    case 'asked-again':
      return dataReply(request.unique, negotiation.payload);
    case 'refused':
      host.giveUp(negotiation.error);
      return errorReply(request.unique, negotiation.errno);
  }
}

/** Comes only for mounts of block devices. The end of this one is read(2) giving ENODEV. */
function destroy(_host: OperationHost, request: Request): Answer {
  return newReply(request.unique, 0);
}

function unanswered(): Answer {
  return null;
}

function refusal(opcode: number, name: string, errno: number, bodyBytesMin = 0): Operation {
  return {
    opcode,
    name,
    bodyBytesMin,
    answered: true,
    absent: Errno.EIO,
    run: () => {
      throw new WireError(errno, `${name} is not served`);
    },
  };
}
