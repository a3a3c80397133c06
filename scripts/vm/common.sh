# Shared by the host-side scripts of the VM bench; sourced, not run.
# shellcheck shell=bash

# Kernel series of this host's archive; the first is what run.sh boots unless told otherwise. Every other series comes from
# the archive of a newer Debian.
# shellcheck disable=SC2034 # used by the scripts that source this
VM_SERIES=(6.12 6.1)

# vm_say TEXT: progress, with the seconds since the script began.
vm_say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }

# vm_die TEXT: one line that says what is wrong, then exit 2 (1 is left to scenarios that fail).
vm_die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# vm_known SERIES: dies unless it can be the name of a series.
vm_known() {
  [[ $1 == newest || $1 =~ ^[0-9]+\.[0-9]+$ ]] ||
    vm_die "\"$1\" is no kernel series; there are: ${VM_SERIES[*]}, newest, and those of newer Debians, such as 7.2"
}
