#!/usr/bin/env bash
# Type-checks the CUDA code on a machine without CUDA.
#
# Candle's build script compiles its kernels with nvcc. Type-checking needs none of them, only files where the build
# script looks for them, so a stand-in for nvcc answers with a version and empty outputs:
#   --version       the text that names a release
#   --list-gpu-code one line per architecture
#   -o FILE         the file, empty: PTX and objects for the compiler, an archive for the linker of libmoe.a
#   --output-directory DIR with sources: one empty .ptx per source
# Nothing is linked or run: a real build takes a real toolkit.
set -euo pipefail

cd "$(dirname "$0")/.."

toolkit=$(mktemp -d)
trap 'rm -rf "$toolkit"' EXIT
mkdir -p "$toolkit/bin" "$toolkit/include" "$toolkit/lib64"

cat > "$toolkit/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
out= dir= sources=()
while (($#)); do
    case "$1" in
        --version) echo 'Cuda compilation tools, release 13.0, V13.0.0'; exit 0 ;;
        --list-gpu-code) printf 'sm_80\nsm_90\n'; exit 0 ;;
        -o | --output-file) out=$2; shift ;;
        --output-directory) dir=$2; shift ;;
        *.cu) sources+=("$1") ;;
    esac
    shift
done
if [[ -n $out ]]; then
    : > "$out"
elif [[ -n $dir ]]; then
    for source in "${sources[@]}"; do
        : > "$dir/$(basename "$source" .cu).ptx"
    done
fi
NVCC
chmod +x "$toolkit/bin/nvcc"

export PATH="$toolkit/bin:$PATH" NVCC="$toolkit/bin/nvcc"
export CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000
export CARGO_TARGET_DIR=${CUDA_CHECK_TARGET_DIR:-target/cuda-check}
cargo check -p trainable-tokens-candle --features cuda "$@"

# dfdx has a feature of its own for the same: with `ci-check` its build script makes empty kernels and asks for no nvcc.
cargo check -p trainable-tokens-dfdx --features cuda,dfdx/ci-check "$@"
