/** What the door of NBD exports is told, and what it answers: JSON, written whole by one side, read by the other. See `main.ts`. */

export interface DoorEntry {
  readonly id: number;
  readonly address: string;
  readonly port: number;
  /** Addresses and networks. */
  readonly clients: readonly string[];
  /** Of the program that a connection is given to. */
  readonly arguments: readonly string[];
}

export interface DoorConfig {
  /** Says which configuration an answer is about. */
  readonly serial: string;
  readonly program: string;
  readonly entries: readonly DoorEntry[];
}

export interface DoorState {
  readonly serial: string;
  /** Why it does not listen, by the entry's id. */
  readonly failures: Readonly<Record<string, string>>;
}

/** `DIRECTORY/nbd.conf` gives `DIRECTORY/nbd.up`. */
export function stateFileOf(configFile: string): string { return configFile.replace(/\.conf$/u, '.up'); }

/** It was written by us, whole, in a directory that is closed to others. */
export function parseDoorConfig(text: string): DoorConfig {
  const config = JSON.parse(text) as Partial<DoorConfig>;
  if (typeof config.serial !== 'string' || typeof config.program !== 'string' || !Array.isArray(config.entries)) throw new Error('this is no configuration of NBD exports');
  return config as DoorConfig;
}
