# Performance functions for scenarios; source after lib.sh. Emulated CPUs: only ratios within one run mean anything, so
# configurations are interleaved, round after round, on the same device in the same guest.
# shellcheck shell=bash
#
# A scenario defines, for each configuration NAME, up_NAME (sets PERF_DEV) and down_NAME, then calls compare.

PERF_DIR=$OUT_DIR/perf
PERF_DEV=
# "row rw bs iodepth": the rows of the table.
PERF_ROWS=("4k-randread-QD1 randread 4k 1" "4k-randread-QD32 randread 4k 32" "128k-read-QD8 read 128k 8")

_cpu_ticks() { awk '/^cpu / {busy = $2 + $3 + $4 + $7 + $8; print busy, busy + $5 + $6}' /proc/stat; }

# measure DEV NAME [ROUND [SECONDS]]: every row once, into $PERF_DIR/NAME/ROW.ROUND.json (fio's) and .cpu (the busy
# share of all virtual CPUs, client and server together, in percent).
measure() {
  local dev=$1 name=$2 round=${3:-1} seconds=${4:-6} spec row rw bs depth file b0 t0 b1 t1
  mkdir -p "$PERF_DIR/$name"
  for spec in "${PERF_ROWS[@]}"; do
    read -r row rw bs depth <<<"$spec"
    file=$PERF_DIR/$name/$row.$round
    read -r b0 t0 < <(_cpu_ticks)
    must fio --name="$row" --filename="$dev" --direct=1 --ioengine=libaio --rw="$rw" --bs="$bs" --iodepth="$depth" \
      --thread --time_based --runtime="$seconds" --ramp_time=1 --randrepeat=1 --norandommap \
      --percentile_list=50:99:99.9 --eta=never --output-format=json --output="$file.json"
    read -r b1 t1 < <(_cpu_ticks)
    echo $((100 * (b1 - b0) / (t1 - t0 > 0 ? t1 - t0 : 1))) >"$file.cpu"
  done
}

# compare ROUNDS SECONDS NAME...: the configurations in turn, ROUNDS times, the order reversed every other round; then
# the table, with ratios against the first NAME.
compare() {
  local rounds=$1 seconds=$2 round name order i
  shift 2
  for ((round = 1; round <= rounds; round++)); do
    order=("$@")
    if ((round % 2 == 0)); then
      order=()
      for ((i = $#; i > 0; i--)); do order+=("${!i}"); done
    fi
    for name in "${order[@]}"; do
      say "round $round: $name"
      "up_$name"
      measure "$PERF_DEV" "$name" "$round" "$seconds"
      "down_$name"
    done
  done
  must python3 "$VM_DIR/perf.py" "$PERF_DIR" "$@" | tee "$OUT_DIR/table.md"
}
