#!/usr/bin/env bash
# Opens the report of a run in a browser: the one of the demo's data, with tokens whose strings are HTML.
#
#   ci/report.sh
#
# Chromium is installed if there is none. Needs python3 and cargo; screenshots are left in target/ci-report.
#   TRAINABLE_TOKENS_BIN  the program to check: it is not built
#   CHROMIUM              the browser
set -euo pipefail
cd "$(dirname "$0")/.."

chromium=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
if [[ -z $chromium ]]; then
    sudo=$([[ $(id -u) -eq 0 ]] || echo sudo)
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq --no-install-recommends chromium > /dev/null
    chromium=$(command -v chromium)
fi

program=${TRAINABLE_TOKENS_BIN:-}
if [[ -z $program ]]; then
    cargo build --quiet -p trainable-tokens-cli
    target=$(cargo metadata --format-version 1 --no-deps |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
    program=$target/debug/trainable-tokens
fi

out=target/ci-report
demo=crates/cli/demo
hostile='<img src=x onerror=alert(1)>'
long=$(printf 'long%.0s' {1..60})
rm -rf "$out"
mkdir -p "$out"
"$program" add-tokens --model "$demo/model" --tokens "$hostile,</td><script>&amp;\"',$long" --out "$out/model" > /dev/null
"$program" train --model "$out/model" --data "$demo/train.jsonl" --eval-data "$demo/heldout.jsonl" --steps 20 \
    --eval-every 5 --lr 0.02 --schedule cosine --warn-dead-after 0 \
    --tokens "<dax>,<wug>,$hostile,</td><script>&amp;\"',$long" \
    --out "$out/adapter" --metrics "$out/metrics.jsonl" --report "$out/report.html" > /dev/null
tokens=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \
    '<dax>' '<wug>' "$hostile" "</td><script>&amp;\"'" "$long")
python3 ci/report/check.py "$chromium" "$out/report.html" "$tokens"
