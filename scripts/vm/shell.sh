#!/bin/bash
# The guest's side of run.sh --shell.
cat >/run/bashrc <<RC
source "$VM_DIR/lib.sh"
trap - EXIT
PS1='vm:\w# '
RC
exec setsid -c bash --rcfile /run/bashrc -i </dev/hvc0 >/dev/hvc0 2>&1
