#!/usr/bin/env bash
# Every check that guards main. Runs at home as it runs in CI: `bash ci/check.sh`.
# The README's two commands are run word for word; a change of either has to be made in both places.
set -euo pipefail
cd "$(dirname "$0")/.."

BACKENDS=(ndarray candle burn dfdx)
FEATURES=$(IFS=,; echo "${BACKENDS[*]}")
TEST_COMMAND="cargo test --workspace --features $FEATURES"
DEMO_COMMAND='cargo run --release -p trainable-tokens-cli -- demo'
# Every step builds what it needs once: what incremental builds would keep is disk alone.
export CARGO_TERM_COLOR=never CARGO_INCREMENTAL=0
log=$(mktemp)
trap 'rm -f "$log" "$log.fuzz"' EXIT

step() {
    printf '\n== %s (%ss)\n' "$*" "$SECONDS"
}

step README names the commands that run here
for command in "$TEST_COMMAND" "$DEMO_COMMAND"; do
    grep -qxF "$command" README.md || { echo "README.md does not name: $command"; exit 1; }
done

step formatting
cargo fmt --all -- --check

step lints
cargo clippy --locked --workspace --all-targets --features "$FEATURES" -- -D warnings

step each feature alone
cargo check --locked -p trainable-tokens --no-default-features
for feature in format "${BACKENDS[@]}"; do
    cargo check --locked -p trainable-tokens --no-default-features --features "$feature"
done

step arrows of dependency
no_dependency() { # PACKAGE [CARGO OPTIONS] -- NAMES
    local package=$1 options=() name tree
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    tree=$(cargo tree --locked -p "$package" "${options[@]}" -e normal --prefix none)
    for name in "$@"; do
        if grep -q "^$name v" <<<"$tree"; then
            echo "$package must not depend on $name"
            exit 1
        fi
    done
}
frameworks=(candle-core candle-nn ndarray burn burn-core dfdx)
no_dependency trainable-tokens-core -- "${frameworks[@]}" serde serde_json safetensors memmap2
no_dependency trainable-tokens-format -- "${frameworks[@]}"
no_dependency trainable-tokens-testkit -- "${frameworks[@]}"
no_dependency trainable-tokens -- "${frameworks[@]}"
declare -A own=([ndarray]='ndarray' [candle]='candle-core candle-nn' [burn]='burn burn-core' [dfdx]='dfdx')
for backend in "${BACKENDS[@]}"; do
    others=()
    for framework in "${frameworks[@]}"; do
        [[ " ${own[$backend]} " == *" $framework "* ]] || others+=("$framework")
    done
    no_dependency "trainable-tokens-$backend" -- "${others[@]}" trainable-tokens-format
    no_dependency trainable-tokens --no-default-features --features "$backend" -- "${others[@]}" trainable-tokens-format
done

step tests
$TEST_COMMAND 2>&1 | tee "$log"

step fuzz targets, ten seconds each
cargo_fuzz=0.13.2
export PATH="$PWD/target/tools/bin:$PATH"
[ "$(cargo-fuzz --version 2>/dev/null)" = "cargo-fuzz $cargo_fuzz" ] ||
    CARGO_TARGET_DIR=target/tools/build cargo install --locked cargo-fuzz --version "$cargo_fuzz" --root target/tools
cargo fmt --manifest-path fuzz/Cargo.toml -- --check
(
    export CARGO_TARGET_DIR=$PWD/target/fuzz
    cargo clippy --locked --manifest-path fuzz/Cargo.toml --all-targets -- -D warnings
    cargo fuzz build --sanitizer none
    bash fuzz/seed.sh
    for target in $(cargo fuzz list); do
        bash fuzz/run.sh "$target" -max_total_time=10 >"$log.fuzz" 2>&1 || { tail -n 40 "$log.fuzz"; exit 1; }
        sed -n "s/^stat::number_of_executed_units: */$target: executions /p" "$log.fuzz"
    done
)

step documentation
RUSTDOCFLAGS=-Dwarnings cargo doc --locked --workspace --no-deps --features "$FEATURES"

step CUDA, type-checked without a GPU
bash ci/cuda-check.sh

step burn on wgpu, type-checked
CARGO_TARGET_DIR=target/cuda-check cargo check --locked -p trainable-tokens-burn --features wgpu

step packages
# Cargo unpacks and builds a package of the same version once, whatever has changed in it since.
rm -rf "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/trainable-tokens-* target/packages/debug/.fingerprint/trainable-tokens-*
CARGO_TARGET_DIR=target/packages \
    cargo package --locked --workspace --allow-dirty --exclude trainable-tokens-demo-model --exclude trainable-tokens-nested-vec
# A machine that is used once has no use for it, and the reference below takes 6 GB.
[ -z "${CI:-}" ] || rm -rf target/packages

step the demo
rm -rf target/ci-demo
$DEMO_COMMAND --out target/ci-demo
grep -q '<code>--tokens</code>' target/ci-demo/report.html

step the report, in a browser
bash ci/report.sh

step real PEFT
bash ci/interop.sh

step the comparison with PEFT, in small
bash benches/run.sh --smoke

step 'the session of the guide'
bash ci/guide.sh

step 'golden vectors, in numpy'
"${INTEROP_PYTHON:-target/interop-venv/bin/python}" tests/vectors/check.py

passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$log" | awk '{ sum += $1 } END { print sum + 0 }')
printf '\n== all checks passed in %ss\n' "$SECONDS"
printf '%s passed, 0 failed\n' "$passed"
