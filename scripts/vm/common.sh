# Shared by the host-side scripts of the VM bench; sourced, not run.
# shellcheck shell=bash

# Kernel series the bench knows; the first is what run.sh boots unless told otherwise.
# shellcheck disable=SC2034 # used by the scripts that source this
VM_SERIES=(6.12 6.1)

# vm_say TEXT: progress, with the seconds since the script began.
vm_say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }

# vm_die TEXT: one line that says what is wrong, then exit 2 (1 is left to scenarios that fail).
vm_die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# vm_known SERIES: dies unless the bench knows the series.
vm_known() { [[ " ${VM_SERIES[*]} " == *" $1 "* ]] || vm_die "unknown kernel series \"$1\"; there are: ${VM_SERIES[*]}"; }
