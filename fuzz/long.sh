#!/usr/bin/env bash
# Runs a target for a number of executions and prints how many there were:
# `bash fuzz/long.sh TARGET [EXECUTIONS] [JOBS]`.
set -euo pipefail
cd "$(dirname "$0")"
target=$1 executions=${2:-10000000} jobs=${3:-1}
[ -d "corpus/$target" ] || bash seed.sh
cargo fuzz build --sanitizer none "$target"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
pids=()
for job in $(seq "$jobs"); do
    bash run.sh "$target" -runs=$(((executions + jobs - 1) / jobs)) >"$logs/$job" 2>&1 &
    pids+=($!)
done
failed=0
for job in $(seq "$jobs"); do
    wait "${pids[job - 1]}" || { failed=1; grep -aE 'panicked|ERROR|SUMMARY|Test unit' -A 2 "$logs/$job"; }
done
sed -n 's/^stat::number_of_executed_units: *//p' "$logs"/* |
    awk -v target="$target" -v seconds="$SECONDS" '
        { sum += $1 }
        END { printf "%s: %d executions in %d s, %d a second\n", target, sum, seconds, sum / (seconds ? seconds : 1) }'
exit "$failed"
