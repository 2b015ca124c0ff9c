/**
 * Which layers are read through which, as a graph, and who alone needs a layer. Pure: numbers in, numbers out.
 *
 * A layer refers to its backing unless it is complete, and to every layer that it shares extents with. *Readers* (disks, or whole
 * containers: whatever the caller calls one) begin at active layers. A layer that exactly one reader reaches goes when that
 * reader goes, and no other layer does: that is what reclaim does, and `unit/accounting.test.ts` holds the two together. All is one walk over layers and references, not one a
 * disk.
 */

/** The layer is reached by several readers. */
export const MANY = -1;
/** Nobody reaches the layer. */
export const NOBODY = 0;
/** The layer has no reader and nothing refers to it: reclaim has not been there yet. What lies below it stays as long as it does. */
export const LEFT_OVER = -2;

export class LayerGraph {
  readonly #ids: Float64Array;
  readonly #index = new Map<number, number>();
  readonly #below: (readonly number[])[];
  readonly #above: number[][];
  /** Those above come before those below. */
  readonly #order: Int32Array;
  /** 1: a walk down from here can part (or runs in a circle), so that sums must not count what is met twice. */
  readonly #parts: Uint8Array;

  constructor(layers: readonly { readonly id: number; readonly backing_id: number | null }[], shares: readonly { readonly layer_id: number; readonly source_layer_id: number }[]) {
    this.#ids = Float64Array.from(layers, ({ id }) => id);
    layers.forEach(({ id }, i) => this.#index.set(id, i));
    this.#below = layers.map(({ backing_id }) => {
      const at = backing_id === null ? undefined : this.#index.get(backing_id);
      return at === undefined ? [] : [at];
    });
    for (const { layer_id, source_layer_id } of shares) {
      const from = this.#index.get(layer_id);
      const to = this.#index.get(source_layer_id);
      if (from === undefined || to === undefined || from === to || this.#below[from]!.includes(to)) continue;
      this.#below[from] = [...this.#below[from]!, to];
    }
    this.#above = layers.map(() => []);
    this.#below.forEach((targets, from) => { for (const to of targets) this.#above[to]!.push(from); });
    this.#parts = new Uint8Array(layers.length);
    this.#order = this.#sort();
    for (let i = this.#order.length - 1; i >= 0; i -= 1) {
      const at = this.#order[i]!;
      const targets = this.#below[at]!;
      this.#parts[at] = this.#parts[at] === 1 || targets.length > 1 || targets.some((to) => this.#parts[to] === 1) ? 1 : 0;
    }
  }

  get size(): number { return this.#ids.length; }

  idAt(at: number): number { return this.#ids[at]!; }
  indexOf(layerId: number): number | undefined { return this.#index.get(layerId); }

  /**
   * For each layer the one reader that reaches it, MANY or NOBODY (a circle, which only a damaged store has) or LEFT_OVER. `readers` has, for the index of an
   * active layer, whose it is: a number above 0.
   */
  owners(readers: ReadonlyMap<number, number>): Float64Array {
    const owner = new Float64Array(this.size);
    for (const [at, reader] of readers) owner[at] = reader;
    for (const at of this.#order) {
      if (owner[at] === NOBODY && this.#above[at]!.length === 0) owner[at] = LEFT_OVER;
      const mine = owner[at]!;
      if (mine === NOBODY) continue;
      for (const to of this.#below[at]!) owner[to] = owner[to] === NOBODY || owner[to] === mine ? mine : MANY;
    }
    return owner;
  }

  /** All that is read through these, themselves included, each once. */
  reach(from: readonly number[]): number[] {
    return walk(from, (at) => this.#below[at]!);
  }

  /** All that stands on these, themselves included, each once. */
  reachUp(from: readonly number[]): number[] {
    return walk(from, (at) => this.#above[at]!);
  }

  /** What lies at the end of every way down from here: whoever shares anything with this layer shares one of these. */
  bottoms(from: number): number[] {
    let at = from;
    while (this.#parts[at] === 0) {
      const [next] = this.#below[at]!;
      if (next === undefined) return [at];
      at = next;
    }
    return this.reach([at]).filter((each) => this.#below[each]!.length === 0);
  }

  /** What a layer and all below it take together, each once, given what each takes. Asked for all, the cost is still one walk where chains do not part. */
  totals(bytesAt: (at: number) => number): (at: number) => number {
    const known = new Map<number, number>();
    return (from) => {
      if (this.#parts[from] === 1) return this.reach([from]).reduce((sum, at) => sum + bytesAt(at), 0);
      const path: number[] = [];
      let sum: number | undefined;
      for (let at: number | undefined = from; at !== undefined && sum === undefined; at = this.#below[at]![0]) {
        sum = known.get(at);
        if (sum === undefined) path.push(at);
      }
      sum ??= 0;
      for (const at of path.reverse()) known.set(at, sum += bytesAt(at));
      return sum;
    };
  }

  /** Kahn's algorithm. What is in a circle comes last, in any order: a check reports that store as damaged. */
  #sort(): Int32Array {
    const order = new Int32Array(this.size);
    const waiting = Int32Array.from(this.#above, (above) => above.length);
    let count = 0;
    for (let at = 0; at < this.size; at += 1) if (waiting[at] === 0) order[count++] = at;
    for (let i = 0; i < count; i += 1) {
      for (const to of this.#below[order[i]!]!) {
        waiting[to] = waiting[to]! - 1;
        if (waiting[to] === 0) order[count++] = to;
      }
    }
    for (let at = 0; at < this.size; at += 1) {
      if (waiting[at]! <= 0) continue;
      order[count++] = at;
      this.#parts[at] = 1;
    }
    return order;
  }
}

function walk(from: readonly number[], next: (at: number) => readonly number[]): number[] {
  const seen = new Set(from);
  // A set gives what is added to it while it is walked.
  for (const at of seen) for (const to of next(at)) seen.add(to);
  return [...seen];
}
