/**
 * Names in messages: the first few and how many more there are, and a name as a word of a command that somebody may copy to a shell. Pure.
 */

/** So many are enough to know what it is about. */
const LISTED_MAX = 5;
/** Nothing in these means anything to a shell. */
const PLAIN_WORD = /^[\w@%+=:,./-]+$/u;

/** `a, b, c, d, e and 95 more`. `nameOf` is asked for those that are listed only. */
export function listedNames<T>(all: readonly T[], nameOf: (each: T) => string): string {
  const first = all.slice(0, LISTED_MAX).map(nameOf).join(', ');
  return all.length <= LISTED_MAX ? first : `${first} and ${all.length - LISTED_MAX} more`;
}

/** The same as words of a command: `a b c d e …`. */
export function listedWords<T>(all: readonly T[], nameOf: (each: T) => string): string {
  return [...all.slice(0, LISTED_MAX).map((each) => shellWord(nameOf(each))), ...(all.length > LISTED_MAX ? ['…'] : [])].join(' ');
}

/** The same one a line, and how many there are beside. */
export function listedLines<T>(all: readonly T[], textOf: (each: T) => string): { readonly lines: readonly string[]; readonly more: number } {
  return { lines: all.slice(0, LISTED_MAX).map(textOf), more: Math.max(0, all.length - LISTED_MAX) };
}

/** Names are chosen by whoever can write under the mount: quoted, one is a name for the shell too, whatever is in it. */
export function shellWord(name: string): string {
  return PLAIN_WORD.test(name) && !name.startsWith('-') ? name : `'${name.replaceAll("'", String.raw`'\''`)}'`;
}
