#!/usr/bin/env bash
# Builds and runs a target on stable Rust: `bash fuzz/run.sh TARGET [LIBFUZZER'S OPTIONS]`.
set -euo pipefail
cd "$(dirname "$0")"
target=$1
shift
mkdir -p "corpus/$target" "regressions/$target"
# 200 MB is what a file may cost to read, whatever it says.
exec cargo fuzz run --sanitizer none "$target" "corpus/$target" "regressions/$target" -- \
    -dict="dictionaries/$target.dict" -rss_limit_mb=200 -timeout=5 -print_final_stats=1 "$@"
