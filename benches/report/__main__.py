"""Runs the parts of the comparison and writes the report; benches/run.sh is the way in."""
import argparse
import json
import os
import sys
from pathlib import Path

import cuda
import docs
import files
import layer
import machine
import model
import tables
from processes import Failure

PARTS = {"layer": layer.layer, "model": model.model, "files": files.files, "growth": layer.growth}
# Not one of all: it takes a machine of its own, and says which.
APART = {"cuda": cuda.cuda}


def main():
    parser = argparse.ArgumentParser(prog="benches/run.sh")
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, *APART, "all", "docs"])
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    out = Path("target/bench-smoke" if args.smoke else "target/bench")
    report_file = out / "report.json"
    if args.part == "docs":
        docs.write(json.loads(report_file.read_text()), out)
        return
    rounds = 1 if args.smoke else int(os.environ.get("BENCH_ROUNDS", "3"))
    if rounds < 1:
        raise Failure("BENCH_ROUNDS is below 1")
    out.mkdir(parents=True, exist_ok=True)
    report = json.loads(report_file.read_text()) if report_file.exists() else {}
    for part in PARTS if args.part == "all" else [args.part]:
        report[part] = {**PARTS, **APART}[part](rounds, args.smoke, out)
        if part in PARTS:
            report["machine"] = machine.describe()
        # After each part, so that what was measured is kept if the next one fails.
        report_file.write_text(json.dumps(report, indent=1) + "\n")
        tables.write(report, out)
    print(out / "report.md")


if __name__ == "__main__":
    try:
        main()
    except (Failure, OSError) as error:
        sys.exit(f"benches/run.sh: {error}")
