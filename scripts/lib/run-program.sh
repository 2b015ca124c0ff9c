# Runs one of the programs of this directory that are written in TypeScript: builds, gives it a directory and a mark of its own,
# and takes away whatever it left, also after Ctrl-C or a failure. Sourced after common.sh, packages.sh, build.sh, leftovers.sh.
# shellcheck shell=bash

work='' runtime='' program_pid=''

# shellcheck disable=SC2317 # run by the trap
clean_up_program() {
  local code=$?
  trap '' INT TERM
  trap - EXIT
  if [ -n "$program_pid" ]; then end_processes "$program_pid"; fi
  if [ -n "$work" ]; then
    clear_leftovers "$OFFSHOOT_RUN" "$work" >/dev/null
    rm -rf --one-file-system -- "$work" "$runtime"
  fi
  exit "$code"
}

# prepare_program PURPOSE PACKAGE...
prepare_program() {
  need_root
  need_fuse
  install_packages "$@"
  ensure_dependencies
  say "Building"
  build || fail "the build failed (above)"
  (cd -- "$ROOT" && node_modules/.bin/tsc -p scripts/tsconfig.json) || fail "the program does not compile (above)"
  # The compiler leaves what is JavaScript already where it is.
  cp -- "$ROOT/test/support/model/file-agent.mjs" "$ROOT/.cache/scripts/test/support/model/"
}

# run_program NAME OPTIONS...: scripts/NAME/main.ts, with its exit code.
run_program() {
  local name=$1 code=0
  shift
  trap clean_up_program EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # Short: control sockets lie below it.
  work=$(mktemp -d "/tmp/offshoot-$name-XXXXXX")
  runtime=$(mktemp -d "/dev/shm/offshoot-$name-XXXXXX")
  export OFFSHOOT_RUN=${work##*/} TMPDIR=$work OFFSHOOT_TEST_TMPFS=$runtime
  unset OFFSHOOT_SOCKET OFFSHOOT_RUNTIME_DIR
  # In the background, so that a signal to this script alone is acted upon at once.
  node "$ROOT/.cache/scripts/scripts/$name/main.js" --cli-entry "$ROOT/dist/cli/main.js" "$@" </dev/null &
  program_pid=$!
  wait "$program_pid" || code=$?
  program_pid=''
  exit "$code"
}
