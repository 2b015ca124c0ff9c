/**
 * Programs of this repository as JavaScript, for tests that start processes: compiled from the sources that are there now.
 *
 * A test that started dist/ would test what was built last. Types are not checked here; that is the compiler's run in
 * `scripts/test`. Only what an entry point imports is compiled. The result lies in `.cache`, inside the checkout, where
 * node finds the packages, in a folder of its own for each test file, so that two test files never write the same file.
 */
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import ts from 'typescript';

const ROOT = resolve(import.meta.dirname, '../..');

export interface CompiledPrograms {
  /** Where the JavaScript of an entry point lies. */
  pathOf(entry: string): string;
  remove(): void;
}

/** Compiles entry points: paths from the top of the checkout, .ts. */
export function compilePrograms(folder: string, entries: readonly string[]): CompiledPrograms {
  const target = join(ROOT, '.cache', 'test-programs', folder);
  rmSync(target, { recursive: true, force: true });
  const seen = new Set<string>();
  const compile = (source: string): void => {
    if (seen.has(source)) return;
    seen.add(source);
    const text = readFileSync(source, 'utf8');
    const { outputText } = ts.transpileModule(text, {
      fileName: source,
      compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2023, verbatimModuleSyntax: true },
    });
    const output = compiledPath(target, source);
    mkdirSync(dirname(output), { recursive: true });
    writeFileSync(output, outputText);
    for (const { fileName } of ts.preProcessFile(outputText, true, true).importedFiles) {
      if (!fileName.startsWith('.')) continue;
      const imported = resolve(dirname(source), fileName.replace(/\.js$/u, '.ts'));
      if (existsSync(imported)) compile(imported);
    }
  };
  for (const entry of entries) compile(join(ROOT, entry));
  return {
    pathOf: (entry) => compiledPath(target, join(ROOT, entry)),
    remove: () => {
      rmSync(target, { recursive: true, force: true });
    },
  };
}

function compiledPath(target: string, source: string): string {
  return join(target, relative(ROOT, source).replace(/\.ts$/u, '.js'));
}
