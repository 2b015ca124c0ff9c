# Node.js dependencies and the build, made when they are missing or old. Sourced after common.sh and packages.sh.
# shellcheck shell=bash

need_node() {
  have node || fail "Node.js is missing: install 20.19 or newer (nodejs.org, or your distribution's package)"
  have npm || fail "npm is missing: install it (it comes with Node.js; on Debian it is a package of its own)"
  node -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)' ||
    fail "Node.js $(node --version) is too old: install 20.19 or newer"
}

# True when what is installed is not what package-lock.json asks for.
dependencies_stale() {
  local installed=$ROOT/node_modules/.package-lock.json
  [ ! -f "$installed" ] || [ "$ROOT/package-lock.json" -nt "$installed" ]
}

# ensure_dependencies: npm ci, when it is needed. Prebuilt binaries of native modules are used where npm finds them; where it
# does not, they are compiled, so a compiler has to be there.
ensure_dependencies() {
  need_node
  dependencies_stale || return 0
  local compiler=()
  have g++ || compiler+=(g++)
  have make || compiler+=(make)
  have python3 || compiler+=(python3)
  [ ${#compiler[@]} -eq 0 ] || install_packages "compiling native modules" "${compiler[@]}"

  say "Installing Node.js packages (npm ci; a minute or two where better-sqlite3 has to be compiled)"
  local log prefix
  log=$(mktemp -t offshoot-npm-XXXXXX)
  prefix=$(dirname -- "$(dirname -- "$(readlink -f -- "$(command -v node)")")")
  # node-gyp would download the headers that this machine has.
  if [ -z "${npm_config_nodedir:-}" ] && [ -f "$prefix/include/node/node.h" ]; then export npm_config_nodedir=$prefix; fi
  if ! (cd -- "$ROOT" && npm ci --no-audit --no-fund --loglevel=error) >"$log" 2>&1 </dev/null; then
    tail -n 40 -- "$log" >&2
    fail "npm ci failed (above; all of it in $log)"
  fi
  touch -- "$ROOT/node_modules/.package-lock.json"
  check_native_modules "$log"
  rm -f -- "$log"
}

# An npm that wants install scripts to be approved goes on without them, and the error would come much later.
check_native_modules() {
  local log=$1
  if ! (cd -- "$ROOT" && node -e 'new (require("better-sqlite3"))(":memory:").close(); require("koffi");') >>"$log" 2>&1; then
    rm -f -- "$ROOT/node_modules/.package-lock.json"
    tail -n 20 -- "$log" >&2
    fail "the native modules do not load (above). If npm says that install scripts were not approved: package.json's allowScripts must name better-sqlite3, koffi and fuse-native"
  fi
}

# build: compiles; quick when nothing changed. Two at a time would write the same files.
build() {
  mkdir -p -- "$ROOT/.cache"
  (
    flock 9
    cd -- "$ROOT" && npm run --silent build </dev/null
  ) 9>"$ROOT/.cache/build.lock"
}

# ensure_build: for those who only want to run it.
ensure_build() {
  ensure_dependencies
  [ -f "$ROOT/dist/cli/main.js" ] && return 0
  say "Building"
  build || fail "the build failed (above)"
}
