/**
 * The words of the NBD protocol that both ends here use: fixed newstyle handshake, simple replies, READ.
 *
 * Numbers as in the protocol's description (github.com/NetworkBlockDevice/nbd, doc/proto.md), big-endian on the wire.
 */
export const NBD_MAGIC = 0x4e42444d41474943n;
export const IHAVEOPT = 0x49484156454f5054n;
export const OPTION_REPLY_MAGIC = 0x3e889045565a9n;
export const REQUEST_MAGIC = 0x25609513;
export const SIMPLE_REPLY_MAGIC = 0x67446698;

export const HandshakeFlag = { FIXED_NEWSTYLE: 1, NO_ZEROES: 2 } as const;
export const Option = { ABORT: 2, GO: 7 } as const;
export const OptionReply = { ACK: 1, INFO: 3, ERROR: 0x80000000, ERR_UNKNOWN: 0x80000006 } as const;
export const INFO_EXPORT = 0;
export const TransmissionFlag = { HAS_FLAGS: 1, READ_ONLY: 2, CAN_MULTI_CONN: 256 } as const;
export const Command = { READ: 0, DISCONNECT: 2 } as const;

/** Errors that travel in replies: errno numbers, but only these. */
export const NbdError = { EPERM: 1, EIO: 5, ENOMEM: 12, EINVAL: 22, ENOSPC: 28, EOVERFLOW: 75, ENOTSUP: 95, ESHUTDOWN: 108 } as const;

export const REQUEST_BYTES = 28;
export const SIMPLE_REPLY_BYTES = 16;
export const OPTION_HEADER_BYTES = 16;
export const OPTION_REPLY_BYTES = 20;
/** Options and their replies longer than this are nothing that we understand. */
export const OPTION_BYTES_MAX = 64 * 1024;
