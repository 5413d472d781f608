#!/usr/bin/env bash
# Makes corpus/<target> from the fixtures and from seeds/<target>: `bash fuzz/seed.sh`. Inputs are laid out as
# src/<target>.rs says.
set -euo pipefail
cd "$(dirname "$0")"
shopt -s globstar nullglob
fixtures=../tests/fixtures/peft
largest=16384

byte() { printf "\\x$(printf %02x "$1")"; }

u32() { # N in four bytes, the lowest first
    local shift
    for shift in 0 8 16 24; do byte $(($1 >> shift & 255)); done
}

with_length() { # FILE after its length
    u32 "$(stat -c %s "$1")"
    cat "$1"
}

header() { # of a safetensors FILE, if its length is honest
    local length
    length=$(od -An -v -t u8 -N 8 "$1" | tr -d ' ')
    [ -n "$length" ] && [ "${#length}" -lt 6 ] && tail -c +9 "$1" | head -c "$length"
}

small() { [ -f "$1" ] && [ "$(stat -c %s "$1")" -le $largest ]; }

seed() { # TARGET NAME: writes what is piped in
    mkdir -p "corpus/$1"
    cat >"corpus/$1/$(tr / _ <<<"$2")"
}

for config in "$fixtures"/**/adapter_config.json; do
    dir=${config%/*}
    name=${dir#"$fixtures"/}
    rows=$dir/adapter_model.safetensors
    seed config "$name" <"$config"
    small "$rows" && { byte 0; with_length "$config"; cat "$rows"; } | seed adapter "$name"
    [ -f "$rows" ] && { byte 1; with_length "$config"; header "$rows" || true; } | seed adapter "$name.header"
done
for file in "$fixtures"/**/*.safetensors; do
    name=${file#"$fixtures"/}
    small "$file" && { byte 0; cat "$file"; } | seed checkpoint "$name"
    { byte 3; header "$file" || true; } | seed checkpoint "$name.header"
done
for config in "$fixtures"/**/config.json; do
    name=${config#"$fixtures"/}
    seed model_config "$name" <"$config"
done
for target in seeds/*; do
    mkdir -p "corpus/${target#seeds/}"
    cp "$target"/* "corpus/${target#seeds/}"
done
