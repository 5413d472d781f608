#!/usr/bin/env bash
# Runs the commands of docs/guide/session.md as they stand there, in an empty directory.
#
#   ci/guide.sh
#
# The Python of the guide runs in the reference that python.sh installs.
#   TRAINABLE_TOKENS_BIN  the program: it is not built
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

program=${TRAINABLE_TOKENS_BIN:-}
if [[ -z $program ]]; then
    cargo build --quiet -p trainable-tokens-cli
    target=$(cargo metadata --format-version 1 --no-deps |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
    program=$target/debug/trainable-tokens
fi
python=$(bash ci/python.sh)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/session"
ln -s "$(realpath "$program")" "$work/bin/trainable-tokens"

# One script of all blocks, in their order; Python's are its input.
python3 - docs/guide/session.md > "$work/session.sh" << 'PYTHON'
import re
import sys

blocks = re.findall(r"^```(\w+)\n(.*?)^```$", open(sys.argv[1]).read(), re.DOTALL | re.MULTILINE)
assert len(blocks) >= 8, f"only {len(blocks)} blocks"
for language, text in blocks:
    if language == "python":
        print(f"guide_python << 'END_OF_BLOCK'\n{text}END_OF_BLOCK")
    else:
        assert language == "sh", language
        print(text)
PYTHON
cd "$work/session"
export HF_HUB_OFFLINE=1 GUIDE_PYTHON=$python PATH=$work/bin:$PATH
guide_python() { "$GUIDE_PYTHON" -; }
export -f guide_python
bash -euo pipefail -x "$work/session.sh"

# What the guide says is there, is there, and better than before.
for file in report.html curves.svg metrics.jsonl adapter/adapter_config.json merged/model.safetensors; do
    [[ -s $file ]] || { echo "guide.sh: the session left no $file"; exit 1; }
done
loss() { trainable-tokens eval --json --data heldout.jsonl "$@" | python3 -c 'import json, sys; print(json.load(sys.stdin)["loss"])'; }
python3 -c 'import sys; before, after, merged = map(float, sys.argv[1:]); print(f"held-out loss {before:.3f} -> {after:.3f}, merged {merged:.3f}"); sys.exit(not (after < before / 4 and abs(merged - after) < 0.05))' \
    "$(loss --model model)" "$(loss --model model --adapter adapter)" "$(loss --model merged)"
