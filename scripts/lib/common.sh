# Shared by every script here: where the checkout is, how to speak, how to fail. Sourced, not run.
# shellcheck shell=bash

set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck disable=SC2034 # read by the scripts that source this file
readonly ROOT

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
  BOLD=$'\033[1m' DIM=$'\033[2m' PLAIN=$'\033[0m'
else
  BOLD='' DIM='' PLAIN=''
fi
# shellcheck disable=SC2034 # read by the scripts that source this file
readonly BOLD DIM PLAIN

# say WORDS...: one line of narration.
say() { printf '%s\n' "${BOLD}$*${PLAIN}"; }

# note WORDS...: one line of detail.
note() { printf '%s\n' "  $*"; }

# fail WORDS...: what was wrong and what to do, then the end.
fail() {
  printf '%s\n' "${0##*/}: $*" >&2
  exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

need_root() {
  [ "$(id -u)" = 0 ] || fail "this mounts file systems and needs root: run it as root, or with sudo"
}

need_fuse() {
  [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || true
  [ -c /dev/fuse ] || fail "/dev/fuse is missing: load the kernel's fuse module (modprobe fuse), or give it to this container (--device /dev/fuse --cap-add SYS_ADMIN)"
}
