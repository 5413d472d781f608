"""The embedding alone: a step beside the frozen lookup, ours and PEFT's; and how it grows."""
from processes import bench, by_turns, peft, run

BACKENDS = ["ndarray", "ndarray-reused", "candle", "burn", "dfdx"]
NUMBERS = [
    "frozen_ms", "forward_ms", "forward_over_frozen", "backward_ms", "optimizer_ms", "total_ms", "extra_mb",
]
REFERENCE = {"v": 256_000, "d": 2304, "n": 4096, "k": 128, "dtype": "f32"}
SMOKE = {"v": 512, "d": 16, "n": 64, "k": 8, "dtype": "f32"}


# With these glibc's allocator does not give memory back to the system, and new buffers are old ones.
KEEPING = {name: str(8 << 30) for name in ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"]}


def case(program, backend, sizes, steps, variables=()):
    """A function that measures a step of a backend, or PEFT's, in a process of its own."""
    flags = [
        "--vocab-size", sizes["v"], "--dim", sizes["d"], "--tokens", sizes["n"], "--rows", sizes["k"],
        "--dtype", sizes["dtype"], "--rounds", steps,
    ]
    if backend == "peft":
        command = peft("layer", *flags)
    else:
        command = [program, "--backend", backend, *map(str, flags)]
    return lambda: run(command, NUMBERS, variables, backend=backend, **sizes)


def program(smoke):
    return bench("layer", smoke, "--features", "ndarray,candle,burn,dfdx")


def layer(rounds, smoke, _out):
    """A row for each backend, table and element type."""
    # The first is the one that all figures in texts are from.
    tables = [(REFERENCE, "default", rounds)]
    tables += [({**REFERENCE, **other}, "default", rounds) for other in [{"v": 32_000}, {"dtype": "bf16"}, {"dtype": "f16"}]]
    tables.append((REFERENCE, "keeping", rounds))
    if smoke:
        tables = [(SMOKE, "default", 1), ({**SMOKE, "dtype": "bf16"}, "keeping", 1)]
    built, rows = program(smoke), []
    for at, (sizes, allocator, rounds) in enumerate(tables):
        rounds = rounds if at == 0 else max(1, rounds // 2)
        variables = KEEPING if allocator == "keeping" else {}
        # dfdx has no bfloat16.
        backends = [it for it in BACKENDS if (it, sizes["dtype"]) != ("dfdx", "bf16")]
        # One run of PEFT is enough to see that it works.
        with_peft = not smoke or sizes is SMOKE
        cases = [case(built, backend, sizes, 2 if smoke else 9, variables) for backend in backends]
        if with_peft:
            cases.append(case(built, "peft", sizes, 2 if smoke else 4, variables))
        results = by_turns(rounds, cases)
        theirs = results[-1]["total_ms"] if with_peft else None
        for result in results:
            result["allocator"] = allocator
            if theirs is not None:
                result["peft_total_ms"] = theirs
                result["speedup_over_peft"] = theirs / result["total_ms"]
            rows.append(result)
    return rows


# Tables of up to a million rows in 3 GB; PEFT's own cost is several tables.
GROWTH = {
    "v": ({"d": 768, "n": 4096, "k": 128}, [32_000, 128_000, 256_000, 512_000, 1_000_000]),
    "n": ({"v": 32_000, "d": 2304, "k": 128}, [512, 1024, 2048, 4096, 8192, 16_384]),
    "k": ({"v": 64_000, "d": 2304, "n": 4096}, [1, 10, 128, 1000, 10_000, 30_000]),
}
SMOKE_GROWTH = {
    "v": ({"d": 16, "n": 64, "k": 8}, [512, 2048]),
    "n": ({"v": 512, "d": 16, "k": 8}, [32, 64]),
    "k": ({"v": 512, "d": 16, "n": 64}, [1, 32]),
}
PEFT_GROWTH = [32_000, 128_000, 256_000]


def growth(_rounds, smoke, _out):
    """Points along one size, all others as they are."""
    built, points = program(smoke), []
    for axis, (fixed, values) in (SMOKE_GROWTH if smoke else GROWTH).items():
        cases = []
        for value in values:
            sizes = {**fixed, axis: value, "dtype": "f32"}
            steps = 2 if smoke else 5 if axis == "k" else 9
            cases += [case(built, backend, sizes, steps) for backend in BACKENDS]
            if axis == "v" and value in PEFT_GROWTH:
                cases.append(case(built, "peft", sizes, 4))
        points += [{"axis": axis, **point} for point in by_turns(1, cases)]
    return points
