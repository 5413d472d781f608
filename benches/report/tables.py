"""The report as Markdown, and its plots."""
import plots

SYSTEMS = {
    "peft": "PEFT", "ndarray": "ndarray", "ndarray-reused": "ndarray, reused buffers", "candle": "candle", "burn": "burn",
    "dfdx": "dfdx",
}
GROWTH_TITLES = {"v": "rows of the table (V)", "n": "ids of a batch (N)", "k": "trained rows (k)"}


def write(report, out):
    """Writes report.md and the plots beside it."""
    made = fragments(report, out)
    (out / "report.md").write_text("\n\n".join(made.values()) + "\n")


def fragments(report, out):
    """A piece of Markdown for each part that was measured. Draws the plots that they show."""
    makers = {"machine": machine, "layer": layer, "model": model, "files": files, "growth": growth, "cuda": cuda}
    return {name: make(report[name], out) for name, make in makers.items() if name in report}


def step(rows):
    """The front page's table: one step at two sizes of the table, and the lookup beside the frozen one."""
    rows = [row for row in rows if (row["dtype"], row["allocator"]) == ("f32", "default")]
    sizes = sorted({row["v"] for row in rows})
    at = {(row["backend"], row["v"]): row for row in rows}
    systems = sorted({row["backend"] for row in rows}, key=lambda name: -at[name, sizes[-1]]["total_ms"])
    head = ["", *(f"V={size}" for size in sizes), "PEFT's step over it", "lookup over the frozen one"]
    body = []
    for name in systems:
        largest = at[name, sizes[-1]]
        ratios = [short(largest["speedup_over_peft"]), f"{largest['forward_over_frozen']:.2f}"]
        body.append([SYSTEMS[name], *(f"{short(at[name, size]['total_ms'])} ms" for size in sizes), *ratios])
    return table(head, body)


def table(head, rows):
    """A table in Markdown: the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def short(number):
    """A number with three digits that count."""
    if number is None:
        return ""
    if abs(number) >= 100:
        return f"{number:.0f}"
    return f"{number:.3g}"


def share(number):
    """A part of a whole, which one that was measured apart from it can exceed by noise."""
    return "" if number is None else f"{100 * number:.0f} %"


def machine(it, _out):
    versions = ", ".join(f"{name} {version}" for name, version in it["versions"].items())
    return (
        f"{it['cpu']}, {it['cores']} cores, {it['memory_gb']} GB; {it['system']}; {it['rustc']}; {versions}; "
        f"commit {it['commit']}."
    )


def layer(rows, out, plot="layer"):
    parts = []

    def key(row):
        return tuple(row[name] for name in ["v", "d", "n", "k", "dtype", "allocator"])

    sizes = list(dict.fromkeys(map(key, rows)))
    for v, d, n, k, dtype, allocator in sizes:
        these = [row for row in rows if key(row) == (v, d, n, k, dtype, allocator)]
        these.sort(key=lambda row: -row["total_ms"])
        head = [
            f"V={v}, D={d}, N={n}, k={k}, {dtype}", "frozen lookup, ms", "forward, ms", "of frozen", "backward, ms",
            "AdamW, ms", "step, ms", "PEFT's step over it",
        ]
        columns = [
            "frozen_ms", "forward_ms", "forward_over_frozen", "backward_ms", "optimizer_ms", "total_ms",
            "speedup_over_peft",
        ]
        # What is kept was there before.
        if allocator == "default":
            head, columns = [*head, "memory, MB"], [*columns, "extra_mb"]
        else:
            parts.append(
                "With an allocator that keeps freed memory, new buffers are old ones, for ours and for PEFT "
                "(`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` of glibc at 8 GB):"
            )
        body = [[SYSTEMS[row["backend"]], *(short(row.get(column)) for column in columns)] for row in these]
        parts.append(table(head, body))
    v, d, n, k, dtype, _ = sizes[0]
    first = [row for row in rows if key(row) == sizes[0]]
    plots.bars(
        out / f"{plot}.svg", f"one step of an embedding, ms (V={v}, D={d}, N={n}, k={k}, {dtype})",
        [(SYSTEMS[row["backend"]], row["total_ms"]) for row in first],
    )
    return "\n\n".join([*parts, f"![one step of an embedding]({plot}.svg)"])


MODEL_SYSTEMS = {
    "trainable-tokens": "this library", "peft": "PEFT", "lora": "PEFT, LoRA of rank 16 on the embedding",
    "full": "torch, the whole embedding",
}


def model(rows, out, plot="model"):
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        these = [row for row in rows if row["shape"] == shape]
        theirs = next(row for row in these if row["system"] == "peft")
        ours = next(row for row in these if row["system"] == "trainable-tokens")
        head = [
            f"{shape}, V={ours['v']}, D={ours['d']}, {theirs['tokens']} tokens, k={theirs['k']}", "step, s",
            "PEFT's step over it", "in matrix products", "memory, MB", "first loss", "last loss",
        ]
        body = [
            [
                MODEL_SYSTEMS[row["system"]], short(row["step_s"]), short(theirs["step_s"] / row["step_s"]),
                share(row.get("gemm_share")), short(row["extra_mb"]), f"{row['loss'][0]:.4f}", f"{row['loss'][-1]:.4f}",
            ]
            for row in sorted(these, key=lambda row: -row["step_s"])
        ]
        parts.append(table(head, body))
        file = f"{plot}-{shape.replace(', ', '-')}.svg"
        plots.bars(
            out / file, f"one step of a whole model, s ({shape}, V={ours['v']}, D={ours['d']})",
            [(MODEL_SYSTEMS[row["system"]], row["step_s"]) for row in these],
        )
        parts.append(f"![one step of a whole model]({file})")
    return "\n\n".join(parts)


def cuda(measured, out):
    """The tables of the other parts, and plots of whole models by their own names."""
    both = [layer(measured["layer"], out, "cuda-layer"), model(measured["model"], out, "cuda-model")]
    return "\n\n".join([f"{measured['card']}.", *both])


def files(rows, _out):
    head = ["work on files", "MB", "ms", "MB/s", "beside", "its speed over that", "memory, MB"]
    body = []
    for row in rows:
        beside = {"over_cp": "`cp -r` and `fsync`", "over_cat": "`cat`"}
        against = next((key for key in beside if key in row), None)
        body.append([
            row["what"], short(row["bytes"] / 1e6), short(1e3 * row["seconds"]), short(row["bytes"] / row["seconds"] / 1e6),
            beside.get(against, ""), short(row.get(against)), short(row["anon_mb"]),
        ])
    return table(head, body)


def growth(points, out):
    parts = []
    for axis, title in GROWTH_TITLES.items():
        these = [point for point in points if point["axis"] == axis]
        values = sorted({point[axis] for point in these})
        systems = [name for name in SYSTEMS if any(point["backend"] == name for point in these)]
        at = {(point["backend"], point[axis]): point for point in these}
        body = []
        for name in systems:
            times = [at.get((name, value), {}).get("total_ms") for value in values]
            measured = [(value, time) for value, time in zip(values, times) if time is not None]
            (low, first), (high, last) = measured[0], measured[-1]
            memory = at[name, high]["extra_mb"]
            body.append([SYSTEMS[name], *map(short, times), f"{last / first:.2f} for {high / low:.0f}", short(memory)])
        sizes = ", ".join(f"{name.upper() if name != 'k' else name}={these[0][name]}" for name in "vdnk" if name != axis)
        head = [f"step, ms; {title}; {sizes}", *map(str, values), "growth", "memory at most, MB"]
        parts.append(table(head, body))
        lines = {SYSTEMS[name]: [(value, at[name, value]["total_ms"]) for value in values if (name, value) in at] for name in systems}
        plots.lines(out / f"growth-{axis}.svg", f"one step of an embedding, ms; {sizes}", title, lines)
        parts.append(f"![growth with {title}](growth-{axis}.svg)")
    return "\n\n".join(parts)
