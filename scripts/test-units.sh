#!/bin/bash
# The unit files in packaging/systemd: systemd can read them, knows the options, and rates their exposure at most 2.5.
# Usage: scripts/test-units.sh
set -euo pipefail
cd "$(dirname "$0")/.."
command -v systemd-analyze >/dev/null || scripts/packages.sh systemd
failed=0
for unit in packaging/systemd/*.service; do
  # Programs and files of the units need not be installed here.
  said=$(systemd-analyze verify --man=no "$unit" 2>&1 | grep "$(basename "$unit")" | grep -v 'is not executable' || true)
  [[ -z $said ]] || { echo "FAILED: $said"; failed=1; }
  if systemd-analyze security --offline=true --threshold=25 --no-pager "$unit" >/dev/null; then
    echo "ok: $(systemd-analyze security --offline=true --no-pager "$unit" | sed -n 's/^→ //p')"
  else
    systemd-analyze security --offline=true --no-pager "$unit" | grep -E '✗|→' || true
    echo "FAILED: $unit is more exposed than 2.5"
    failed=1
  fi
done
exit "$failed"
