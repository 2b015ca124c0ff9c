/**
 * What disks must hold, in plain memory: the one small definition of correctness that the model test compares with.
 *
 * A disk is a buffer. Cloning copies it, punching zeroes it, growing appends zeros; a snapshot is a copy that is kept, and going
 * back to it puts the copy in the place of what is there. Nothing here knows of layers, blocks, fills or restarts: none of
 * these may change what a disk holds. Ordinary files are disks that also grow by what is written behind their end.
 */
export interface ModelContent {
  readonly content: Buffer;
  readonly isFile: boolean;
}

export class ModelDisks {
  readonly #contents = new Map<string, Buffer>();
  readonly #files = new Set<string>();

  get paths(): readonly string[] {
    return [...this.#contents.keys()];
  }

  add(path: string, content: Buffer, isFile = false): void {
    if (this.#contents.has(path)) throw new Error(`the model has ${path} already`);
    this.#contents.set(path, content);
    if (isFile) this.#files.add(path);
  }

  has(path: string): boolean {
    return this.#contents.has(path);
  }

  isFile(path: string): boolean {
    return this.#files.has(path);
  }

  /** A copy, to be kept. */
  copy(path: string): ModelContent {
    return { content: Buffer.from(this.content(path)), isFile: this.isFile(path) };
  }

  /** Puts a copy at a path, whatever is there. */
  put(path: string, { content, isFile }: ModelContent): void {
    if (this.has(path)) this.remove(path);
    this.add(path, Buffer.from(content), isFile);
  }

  /** The live content: do not keep it. */
  content(path: string): Buffer {
    const content = this.#contents.get(path);
    if (content === undefined) throw new Error(`the model has no ${path}`);
    return content;
  }

  sizeBytes(path: string): number {
    return this.content(path).length;
  }

  write(path: string, offsetBytes: number, data: Uint8Array): void {
    const endBytes = offsetBytes + data.length;
    if (endBytes > this.sizeBytes(path)) {
      if (!this.isFile(path)) throw new Error('the model does not write past the end of a disk');
      this.resize(path, endBytes);
    }
    this.content(path).set(data, offsetBytes);
  }

  zero(path: string, offsetBytes: number, lengthBytes: number): void {
    const content = this.content(path);
    content.fill(0, offsetBytes, Math.min(content.length, offsetBytes + lengthBytes));
  }

  clone(source: string, target: string): void {
    this.put(target, this.copy(source));
  }

  resize(path: string, sizeBytes: number): void {
    const resized = Buffer.alloc(sizeBytes);
    this.content(path).copy(resized);
    this.#contents.set(path, resized);
  }

  remove(path: string): void {
    if (!this.#contents.delete(path)) throw new Error(`the model has no ${path}`);
    this.#files.delete(path);
  }
}
