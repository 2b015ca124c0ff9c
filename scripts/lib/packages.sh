# Debian packages that a script needs: looks first, says what it installs, installs only what is missing. Sourced.
# shellcheck shell=bash

# package_installed NAME
package_installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}' -- "$1" 2>/dev/null)" = installed ]
}

# missing_packages SPEC...: prints the specs that are not there. A spec is a package, or several with | between them of
# which any will do (names change between releases of Debian).
missing_packages() {
  local spec name
  for spec in "$@"; do
    for name in ${spec//|/ }; do
      if package_installed "$name"; then continue 2; fi
    done
    printf '%s\n' "$spec"
  done
}

# choose_package SPEC: the first of the alternatives that apt can install.
choose_package() {
  local name
  for name in ${1//|/ }; do
    if apt-cache show --no-all-versions -- "$name" >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  return 1
}

# install_packages PURPOSE SPEC...
install_packages() {
  local purpose=$1
  shift
  local missing=() chosen=() spec name log
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  have apt-get || fail "$purpose needs: ${missing[*]}. This script installs packages on Debian only: install them by hand and run it again"
  [ "$(id -u)" = 0 ] || fail "$purpose needs Debian packages that are missing: run 'apt-get install ${missing[*]%%|*}' as root"

  log=$(mktemp -t offshoot-apt-XXXXXX)
  say "Debian packages are missing for $purpose: asking apt for its lists"
  apt_quietly "$log" update || note "apt-get update failed: going on with the lists that are there"
  for spec in "${missing[@]}"; do
    name=$(choose_package "$spec") || fail "apt knows no package named ${spec//|/ or }: check apt's sources and 'apt-get update' (its output is in $log)"
    chosen+=("$name")
  done
  say "Installing ${chosen[*]}"
  if ! without_services apt_quietly "$log" install -y --no-install-recommends -- "${chosen[@]}"; then
    tail -n 30 -- "$log" >&2
    fail "apt-get install failed (above; all of it in $log)"
  fi
  rm -f -- "$log"
}

# without_services COMMAND...: packages that it installs start no services. Tests and exports run those programs by themselves, with files of their own.
without_services() (
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    trap 'rm -f -- "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  "$@"
)

# apt_quietly LOG ARGUMENTS...: what it says goes to LOG.
apt_quietly() {
  local log=$1
  shift
  DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 "$@" >"$log" 2>&1 </dev/null
}
