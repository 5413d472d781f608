#!/usr/bin/env bash
# The side-by-side comparison with PEFT, in one go.
#
#   benches/run.sh [--smoke] [layer|model|files|growth|all]    measures; `all` is the default
#   benches/run.sh cuda                                        measures on a GPU, which `all` does not
#   benches/run.sh docs                                        writes what was measured into docs/performance.md
#
# Writes target/bench/report.json, a Markdown table and SVG plots beside it; a part that is run alone replaces its own
# figures there. Builds what it measures. `all` takes about a quarter of an hour on two cores, and 12 GB of memory. PEFT and
# torch are installed by ci/python.sh.
#   BENCH_ROUNDS    how often each process is run, ours and theirs by turns (3)
#   INTEROP_PYTHON  a python that has the packages of ci/interop/requirements.txt
# With --smoke everything is tiny and built without optimisation: it shows that the comparison works, and writes to
# target/bench-smoke.
set -euo pipefail
shopt -s inherit_errexit

cd "$(dirname "$0")/.."

python=$(bash ci/python.sh)
HF_HUB_OFFLINE=1 PYTHONPYCACHEPREFIX=$PWD/target/bench-pycache exec "$python" benches/report "$@"
