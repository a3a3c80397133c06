# What the test scripts share; they source it. No script judges time: it waits for states, and a limit is only there to end
# what hangs. TIME_SCALE (default 1) says how much longer everything may take on this machine; scripts/test.sh sets it.
# shellcheck shell=bash

# limit SECONDS: the same for this machine, a whole number.
limit() { awk -v s="$1" -v scale="${TIME_SCALE:-1}" 'BEGIN { n = s * scale; printf "%d\n", n + (n > int(n)) }'; }

# wait_for WHAT COMMAND...: until the command succeeds.
wait_for() { waiting '' "$@"; }

# wait_while PID WHAT COMMAND...: the same, as long as the process lives.
wait_while() { waiting "$@"; }

waiting() {
  local pid=$1 what=$2 end=$((SECONDS + $(limit 120)))
  shift 2
  until "$@" >/dev/null 2>&1; do
    [[ -z $pid ]] || kill -0 "$pid" 2>/dev/null || { "$@" >/dev/null 2>&1 && return; echo "it ended before: $what"; return 1; }
    ((SECONDS < end)) || { "$@" >/dev/null 2>&1 && return; echo "not within $(limit 120) s: $what"; return 1; }
    sleep 0.1
  done
}

# fails COMMAND...: it ends by itself, with an error. What a time limit or a signal ends hangs, and has not failed.
fails() {
  local rc=0
  "$@" || rc=$?
  ((rc != 0)) || { echo "succeeded: $*"; return 1; }
  ((rc < 124)) || { echo "status $rc: $*"; return 1; }
}

# listens ADDRESS: somebody accepts connections there: a port of 127.0.0.1, or the path of a unix socket. That the file of a
# socket exists is not enough: it does before anybody listens.
listens() {
  /usr/bin/python3 - "$1" <<'PY'
import socket, sys
port = sys.argv[1].isdigit()
s = socket.socket(socket.AF_INET if port else socket.AF_UNIX)
s.settimeout(60)
s.connect(("127.0.0.1", int(sys.argv[1])) if port else sys.argv[1])
PY
}

# free_port VARIABLE: a port that is this script's until it ends, for what must know it before it binds it. Scripts run beside
# each other, so each port has a lock; those that systems hand out (ip_local_port_range) are higher, those of cargo test, too.
free_port() {
  local candidate lock dir=${TMPDIR:-/tmp}/rnbd-test-ports
  [[ -d $dir ]] || mkdir -m 1777 "$dir" 2>/dev/null || [[ -d $dir ]] || return
  for ((candidate = 12000 + $$ % 7000; ; candidate = candidate < 19999 ? candidate + 1 : 12000)); do
    exec {lock}>>"$dir/$candidate" || continue
    if flock -n "$lock" && ! listens "$candidate" 2>/dev/null; then
      printf -v "$1" %s "$candidate"
      return
    fi
    exec {lock}>&-
  done
}

# own_address N: the Nth address (0 to 1) of the loopback device that no other process has: made of this shell's number, which
# is below 2^22. Those of cargo test are 127.192.0.0 and above.
own_address() { echo "127.$((64 + ($1 << 6) + ($$ >> 16 & 63))).$(($$ >> 8 & 255)).$(($$ & 255))"; }
