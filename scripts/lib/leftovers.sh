# What a run left behind: processes that carry its mark, mounts and loop devices below its directory. Sourced.
#
# A run marks everything that it starts by OFFSHOOT_RUN=<mark> in the environment, which children inherit, detached ones
# too; so only its own processes are ever ended, each by its id. A FUSE mount whose server is gone may hang whoever touches
# it: mounts are found in mountinfo, aborted through fusectl by the number that stands there, and never looked into.
# shellcheck shell=bash

FUSECTL=/sys/fs/fuse/connections

# marked_processes MARK: ids of the processes that carry it. The shell that exported the mark, and its subshells, were started
# without it, which is what the kernel shows.
marked_processes() {
  local mark=$1 directory pid
  for directory in /proc/[0-9]*; do
    pid=${directory#/proc/}
    if { tr '\0' '\n' <"$directory/environ"; } 2>/dev/null | grep -qxF "OFFSHOOT_RUN=$mark"; then printf '%s\n' "$pid"; fi
  done
}

describe_process() { { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null | cut -c1-160; }

# mounts_below DIRECTORY: mount points below it, the deepest first.
mounts_below() {
  awk -v top="$1/" 'index($5, top) == 1 { print length($5), $5 }' /proc/self/mountinfo | sort -rn | cut -d' ' -f2-
}

# loops_below DIRECTORY: loop devices whose file lies below it.
loops_below() {
  have losetup || return 0
  losetup -nO NAME,BACK-FILE 2>/dev/null | awk -v top="$1/" 'index($2, top) == 1 { print $1 }'
}

# abort_fuse_below DIRECTORY: ends the FUSE connections there, so that nobody waits for a server that is gone.
abort_fuse_below() {
  [ -n "$(ls -A "$FUSECTL" 2>/dev/null)" ] || mount -t fusectl fusectl "$FUSECTL" 2>/dev/null || true
  local device
  awk -v top="$1/" 'index($5, top) == 1 && / - fuse/ { split($3, d, ":"); print d[2] }' /proc/self/mountinfo | while read -r device; do
    if [ -w "$FUSECTL/$device/abort" ]; then echo 1 >"$FUSECTL/$device/abort" || true; fi
  done
}

# end_processes PID...: asks, waits a little, then insists.
end_processes() {
  local pid tries
  for pid in "$@"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "$@"; do
    for ((tries = 0; tries < 30; tries++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
}

# clear_leftovers MARK DIRECTORY: takes away what is left of a run, and prints a line for each thing that it found.
clear_leftovers() {
  local mark=$1 directory=$2 pids=() loops=() point device pid
  mapfile -t pids < <(marked_processes "$mark")
  # Now: a lazy unmount takes the names of their files away.
  mapfile -t loops < <(loops_below "$directory")
  for pid in "${pids[@]}"; do printf 'process %s: %s\n' "$pid" "$(describe_process "$pid")"; done
  for device in "${loops[@]}"; do printf 'loop device %s\n' "$device"; done
  while read -r point; do printf 'mount %s\n' "$point"; done < <(mounts_below "$directory")

  abort_fuse_below "$directory"
  if [ ${#pids[@]} -gt 0 ]; then end_processes "${pids[@]}"; fi
  for point in $(mounts_below "$directory"); do umount -l -- "$point" 2>/dev/null || true; done
  for device in "${loops[@]}"; do losetup -d "$device" 2>/dev/null || true; done
}
