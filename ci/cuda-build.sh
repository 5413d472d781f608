#!/usr/bin/env bash
# Builds programs for CUDA on a machine that has neither a GPU nor CUDA, to be carried to one that has: CUDA 13.0 or later with
# its cuBLAS, cuRAND and NVRTC. Runs the command with an environment in which candle's `cuda` feature builds.
#
#   ci/cuda-build.sh cargo build --release -p trainable-tokens-cli --features cuda
#
# nvcc comes from CUDA's Python wheels, of the release that the kernels are made for: a driver takes those of its own release and
# older ones. The libraries of CUDA are linked by name: stand-ins with the functions that cudarc declares, but nothing in
# them. The runtime is in the wheels.
#   CUDA_COMPUTE_CAP  the architecture, 90 (Hopper) unless given
#   CUDA_TARGET_DIR   where cargo builds, target/cuda unless given
set -euo pipefail
shopt -s inherit_errexit

cd "$(dirname "$0")/.."

release=13.0
home=$PWD/target/cuda-toolkit
libraries=(cuda:libcuda.so.1:driver cublas:libcublas.so.13:cublas cublasLt:libcublasLt.so.13:cublaslt
    curand:libcurand.so.10:curand nvrtc:libnvrtc.so.13:nvrtc)

install_nvcc() {
    [[ -f $home/stamp && $(< "$home/stamp") == "$release" ]] && return
    rm -rf "$home"
    python3 -m venv "$home/venv"
    "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        nvidia-cuda-{nvcc,crt,cccl,runtime}=="$release.*" nvidia-nvvm=="$release.*" nvidia-curand==10.4.0.* >&2
    ln -s "$home"/venv/lib/python3*/site-packages/nvidia/cu13 "$home/cuda"
    echo "$release" > "$home/stamp"
}

# The shared library NAME with the functions that cudarc's MODULE declares.
stand_in() { # NAME SONAME MODULE
    local sources functions
    sources=$(cargo metadata --format-version 1 --locked --features candle,cuda \
        | python3 -c 'import json, os, sys
packages = {p["name"] + p["version"][:4]: p["manifest_path"] for p in json.load(sys.stdin)["packages"]}
print(os.path.dirname(packages["cudarc0.19"]))')
    functions=$(grep -oP '^\s+fn \K(cu|nvrtc)\w+(?=\()' "$sources/src/$3/sys/mod.rs" | sort -u)
    printf 'void %s(void) {}\n' $functions | cc -shared -fPIC -w -x c -Wl,-soname,"$2" -o "$home/lib/lib$1.so" -
}

install_nvcc
mkdir -p "$home/lib"
ln -sfn "$home/cuda/lib/libcudart.so.13" "$home/lib/libcudart.so"
for library in "${libraries[@]}"; do
    IFS=: read -r name soname module <<< "$library"
    [[ -f $home/lib/lib$name.so ]] || stand_in "$name" "$soname" "$module"
done

export PATH="$home/cuda/bin:$PATH" NVCC="$home/cuda/bin/nvcc" CUDA_HOME="$home/cuda" CUDA_PATH="$home/cuda"
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000
export LIBRARY_PATH="$home/lib" RUSTFLAGS="-L native=$home/lib"
export CARGO_TARGET_DIR=${CUDA_TARGET_DIR:-target/cuda}
exec "$@"
