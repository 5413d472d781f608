"""Building programs, running them, and what their lines of JSON say."""
import json
import math
import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path


class Failure(Exception):
    """The comparison cannot be made."""


def peft(script, *args):
    """A command that runs one of the scripts that measure PEFT."""
    return [sys.executable, f"benches/peft/{script}.py", *map(str, args)]


@cache
def cargo(*args):
    """Builds a target and returns the path of its program."""
    built = subprocess.run(
        ["cargo", *args, "--message-format", "json-render-diagnostics"], stdout=subprocess.PIPE, text=True
    )
    if built.returncode != 0:
        raise Failure(f"`cargo {' '.join(args)}` failed")
    messages = map(json.loads, built.stdout.splitlines())
    programs = [message["executable"] for message in messages if message.get("executable")]
    if len(programs) != 1:
        raise Failure(f"`cargo {' '.join(args)}` built {len(programs)} programs instead of one")
    return programs[0]


def bench(name, smoke, *args):
    """The program of a bench, optimised unless it is only to be tried out: then with what the tests are built with."""
    if smoke:
        args = ["--workspace", "--features", "ndarray,candle,burn,dfdx", "--profile", "dev"]
    return cargo("bench", "--locked", "--no-run", "--bench", name, *args)


def run(command, numbers, variables=(), **expected):
    """Runs a program and returns the line of JSON that it prints last: `numbers` must be in it and finite, and `expected` as
    they are."""
    return run_all(command, numbers, variables, last=1, **expected)[0]


def run_all(command, numbers, variables=(), last=0, **expected):
    """As `run`, all lines or the last ones; with variables of the environment."""
    print("  " + " ".join(Path(word).name if "/" in word else word for word in command), file=sys.stderr, flush=True)
    environment_of_it = {**environment(), **dict(variables)}
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_of_it
    )
    said = f"`{' '.join(command)}`"
    if ran.returncode != 0:
        raise Failure(f"{said} failed with {ran.returncode}:\n{ran.stderr[-2000:]}")
    try:
        lines = [json.loads(line) for line in ran.stdout.splitlines()[-last:]]
    except ValueError as error:
        raise Failure(f"{said} printed what is no JSON: {ran.stdout[-500:]!r}") from error
    if len(lines) < max(1, last):
        raise Failure(f"{said} printed nothing")
    for line in lines:
        for name in numbers:
            number = line.get(name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise Failure(f"{said}: {name} is {number!r}")
        for name, value in expected.items():
            if line.get(name) != value:
                raise Failure(f"{said}: {name} is {line.get(name)!r} instead of {value!r}")
    return lines


def environment():
    """Two threads for everything, or as many as there are."""
    threads = str(min(2, os.cpu_count() or 1))
    names = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"]
    return {**os.environ, **{name: threads for name in names}}


def by_turns(rounds, cases):
    """Runs each of `cases`, functions that return what was measured, once in each round; medians of their numbers."""
    measured = [[] for _ in cases]
    for round_number in range(rounds):
        print(f" round {round_number + 1} of {rounds}", file=sys.stderr, flush=True)
        for results, case in zip(measured, cases):
            results.append(case())
    return [medians(results) for results in measured]


def medians(results):
    """One result of several: medians of numbers, the first of all else."""
    def middle(name, first):
        if isinstance(first, float):
            return statistics.median(result[name] for result in results)
        return first

    return {name: middle(name, first) for name, first in results[0].items()}
