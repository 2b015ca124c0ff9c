/**
 * The NFS presenter of the build, in a process of its own, so that a test can run it in a network of its own: `apply` or `end`. What it started goes on.
 * One JSON argument: { place, settings, exports }. Prints what `apply` gave, or the error's sentence with exit code 1.
 */
import process from 'node:process';

import { createNfsPresenter } from '../../dist/daemon/presenter/nfs/nfs.js';

const { place, settings, exports } = JSON.parse(process.argv[2]);
const presenter = createNfsPresenter({ ...place, logger: { warn: (context, message) => { console.error(message, context); } } }, settings);
const call = { signal: new AbortController().signal };
try {
  for (const each of exports) presenter.check(each);
  console.log(JSON.stringify(await presenter.apply(exports, call)));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
