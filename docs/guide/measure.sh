#!/usr/bin/env bash
# Measures the table of docs/guide/training.md: the held-out loss by how rows start and by learning rate, for two tokens that
# are new to the demo's model.
#
#   docs/guide/measure.sh [PROGRAM]
set -euo pipefail
program=$(realpath "${1:-$(command -v trainable-tokens)}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

"$program" demo --out demo > /dev/null 2>&1
for part in train heldout; do
    sed 's/<dax>/<zib>/g; s/<wug>/<quo>/g' "demo/$part.jsonl" > "$part.jsonl"
done

add() { # INIT [OPTIONS]
    local init=$1
    shift
    "$program" add-tokens --force --model demo/model --tokens '<zib>,<quo>' --lstrip --init "$init" --out model "$@" > /dev/null
}

losses() { # MODEL OPTIONS: before, after 30 steps, after 120 steps
    local model=$1
    shift
    "$program" --force --json train --model "$model" --data train.jsonl --eval-data heldout.jsonl --eval-every 30 --steps 120 \
        --tokens '<zib>,<quo>' --out adapter --metrics metrics.jsonl "$@" > summary.json
    python3 - << 'PYTHON'
import json
summary = json.load(open("summary.json"))
steps = {line["step"]: line for line in map(json.loads, open("metrics.jsonl")) if "step" in line}
print(f"{summary['loss_before']:.3f} | {steps[30]['eval_loss']:.3f} | {summary['loss_after']:.3f} |")
PYTHON
}

printf '| start | learning rate | loss before | after 30 steps | after 120 steps |\n|---|---|---|---|---|\n'
for init in zeros random:0.05 mean mean+noise:0.01 mean+norm-match mean-covariance:1 subtokens 'copy: a' \
    'description: a small brown thing'; do
    add "$init"
    printf '| `%s` | 0.02 | %s\n' "$init" "$(losses model --lr 0.02)"
done
add mean+noise:0.01
for lr in 0.001 0.005 0.05 0.2; do
    printf '| `mean+noise:0.01` | %s | %s\n' "$lr" "$(losses model --lr "$lr")"
done
printf '| `mean+noise:0.01` | 0.05, cosine | %s\n' "$(losses model --lr 0.05 --schedule cosine --warmup-steps 10)"
