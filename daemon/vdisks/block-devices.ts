/**
 * The seam to block devices of this host over files of the mount: attached, found again, given back.
 *
 * Everything that opens a file under the mount runs in a program of its own (losetup, sfdisk, mkfs, mount, cp), never in the server and never
 * with its descriptors. Every call can be made again: giving back what is gone is well. A device is told by its number and by the node that
 * it shows: numbers are used again, node ids never, so that nothing of somebody else's is ever given back.
 */

export interface BlockDeviceCall {
  readonly signal: AbortSignal;
}

/** A part of the file: what the device shows, and nothing around it. */
export interface DeviceWindow {
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

export interface AttachOptions extends BlockDeviceCall {
  readonly readOnly: boolean;
  /** The whole file when left out. */
  readonly window?: DeviceWindow;
  /** What the file is: another one that a user put in its place meanwhile is not attached, and `conflict` thrown. */
  readonly nodeId: number;
}

export interface AttachedDevice {
  /** `/dev/loop7`. */
  readonly device: string;
  /** The file under the mount, as the kernel calls it now. */
  readonly file: string;
  readonly readOnly: boolean;
  readonly offsetBytes: number;
  /** It goes with its last close. */
  readonly isLeaving: boolean;
  /** The node that it shows; null where nobody can say. */
  readonly nodeId: number | null;
}

export interface BlockDevices {
  /** With direct I/O. */
  attach(file: string, options: AttachOptions): Promise<AttachedDevice>;
  /** What is attached of files below a directory, also by whom nobody knows. */
  list(directory: string, options: BlockDeviceCall): Promise<readonly AttachedDevice[]>;
  /** One of them, as it is now; null: it shows nothing, or nothing of the directory. */
  find(device: string, directory: string, options: BlockDeviceCall): Promise<AttachedDevice | null>;
  /** Throws `in-use` while it is mounted, or open; then it goes with its last close. Shows it another node by now, it is left alone. */
  detach(device: string, options: BlockDeviceCall & { readonly directory: string; readonly nodeId: number }): Promise<void>;
  /** Holds it open for a while, so that it goes with the last close after that. */
  lend(device: string, options: BlockDeviceCall & { readonly seconds: number }): Promise<void>;
}
