/** One after the other: whoever comes waits until all before have ended, however they ended. */
export class Turns {
  #last: Promise<unknown> = Promise.resolve();

  async take<T>(body: () => Promise<T>): Promise<T> {
    const mine = this.#last.then(body);
    this.#last = mine.catch(() => undefined);
    return await mine;
  }

  async idle(): Promise<void> { await this.#last; }
}
