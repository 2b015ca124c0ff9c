/**
 * What each transport can carry, as data.
 *
 * The file-system core promises the same things whatever brings the requests; a transport that cannot carry an operation
 * says so here, once, and the conformance suite reads the same table: where an ability is missing the suite expects the
 * refusal named beside the field, not silence. Main thread only; imports nothing.
 */
export type TransportName = 'kernel' | 'fuse-native';

export interface TransportAbilities {
  readonly name: TransportName;
  /** Guests wait while the server is away and go on with the next one. Without it every open file is lost (ECONNABORTED, then ENOTCONN). */
  readonly survivesServerRestart: boolean;
  /** Mounts for an ordinary user. Without it: root only. */
  readonly mountsWithoutRoot: boolean;
  /** New nodes belong to the user who made them. Without it they belong to the owner of the directory they are made in. */
  readonly callerIdentity: boolean;
  /** fallocate(2): allocation, punch hole, zero range. Without it: EOPNOTSUPP, and QEMU and loop write zeros instead. */
  readonly fallocate: boolean;
  /** lseek(2) with SEEK_DATA and SEEK_HOLE. Without it the kernel answers that the whole file is data, which is always safe. */
  readonly seekDataHole: boolean;
  /** renameat2(2) with NOREPLACE and EXCHANGE. Without it: EINVAL. */
  readonly renameFlags: boolean;
  /** utimensat(2) may set one of the two times. Without it such a call is accepted by the library and changes nothing. */
  readonly setOneTime: boolean;
  /** Times before 1970. Without it they are kept as 1970. */
  readonly timesBefore1970: boolean;
  /** Finest step of a time that is set or read. */
  readonly timeStepUs: number;
  /** A directory can be removed while a file that was unlinked from it is still open. Without it: ENOTEMPTY until the last close. */
  readonly removesDirectoryOfOpenFiles: boolean;
  /** MAP_SHARED mapping of ordinary files. Without it: ENODEV. Disks never have it. */
  readonly sharedMappings: boolean;
  /** Asynchronous direct I/O (libaio, io_uring) is really asynchronous. Without it each submission waits. */
  readonly asynchronousDirectIo: boolean;
  /** Largest READ or WRITE request; the kernel cuts larger calls into several of these. */
  readonly requestBytesMax: number;
}

export const kernelAbilities: TransportAbilities = {
  name: 'kernel',
  survivesServerRestart: true,
  mountsWithoutRoot: false,
  callerIdentity: true,
  fallocate: true,
  seekDataHole: true,
  renameFlags: true,
  setOneTime: true,
  timesBefore1970: true,
  timeStepUs: 1,
  removesDirectoryOfOpenFiles: true,
  sharedMappings: true,
  asynchronousDirectIo: true,
  requestBytesMax: 1024 * 1024,
};

/** libfuse 2.9 speaks FUSE 7.19 in buffers of 132 KiB, and fuse-native 2.2.6 hands on fewer operations than libfuse knows. */
export const fuseNativeAbilities: TransportAbilities = {
  name: 'fuse-native',
  survivesServerRestart: false,
  mountsWithoutRoot: true,
  callerIdentity: false,
  fallocate: false,
  seekDataHole: false,
  renameFlags: false,
  setOneTime: false,
  timesBefore1970: false,
  timeStepUs: 1000,
  removesDirectoryOfOpenFiles: false,
  sharedMappings: false,
  asynchronousDirectIo: false,
  requestBytesMax: 128 * 1024,
};

export const transportAbilities = {
  kernel: kernelAbilities,
  'fuse-native': fuseNativeAbilities,
} as const satisfies Record<TransportName, TransportAbilities>;
