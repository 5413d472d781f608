"""The same on a GPU: a step of the embedding and of whole models, ours and PEFT's on one card."""
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from layer import NUMBERS as LAYER_NUMBERS, REFERENCE
from model import NUMBERS as MODEL_NUMBERS, check
from processes import Failure, by_turns, cargo, peft, run

# What differs from the point that all others are compared with.
LAYERS = [{}, {"v": 32_000}, {"v": 1_000_000}, {"dtype": "bf16"}]
# Shape, type of the weights and of the computation, what runs beside ours.
MODELS = [
    ("llama", "f32", ["peft", "lora", "full"]),
    ("gemma-2-2b", "bf16", ["peft", "full"]),
    ("gemma-2-2b", "f32", ["peft", "full"]),
]


def program(name, *args):
    """A program that was built with CUDA: carried here, where the machine has no cargo, or built."""
    carried = os.environ.get("BENCH_CUDA_PROGRAMS")
    if carried is None:
        return cargo("bench", "--locked", "--no-run", "--bench", name, *args)
    path = Path(carried) / name
    if not path.exists():
        raise Failure(f"{path} is missing")
    return str(path)


def cuda(rounds, smoke, out):
    """The card, rows for the embedding and rows for whole models."""
    if smoke or not torch.cuda.is_available():
        raise Failure("there is no CUDA device")
    return {"card": card(), "layer": layers(rounds), "model": models(rounds, out)}


def card():
    properties = torch.cuda.get_device_properties(0)
    packages = ", ".join(f"{name} {version(name)}" for name in ["peft", "torch", "transformers"])
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {packages}"


def layers(rounds):
    """Whole steps of the embedding."""
    ours = program("layer", "--features", "candle,cuda")
    rows = []
    for other in LAYERS:
        sizes = {**REFERENCE, **other}
        flags = [
            "--vocab-size", sizes["v"], "--dim", sizes["d"], "--tokens", sizes["n"], "--rows", sizes["k"],
            "--dtype", sizes["dtype"], "--rounds", 20, "--device", "cuda",
        ]
        cases = [
            lambda flags=flags, sizes=sizes: run([ours, *map(str, flags)], LAYER_NUMBERS, backend="candle", **sizes),
            lambda flags=flags, sizes=sizes: run(peft("layer", *flags), LAYER_NUMBERS, backend="peft", **sizes),
        ]
        results = by_turns(rounds, cases)
        for result in results:
            result["allocator"] = "default"
            result["peft_total_ms"] = results[-1]["total_ms"]
            result["speedup_over_peft"] = results[-1]["total_ms"] / result["total_ms"]
        rows += results
    return rows


def models(rounds, out):
    """Steps of whole models."""
    ours = program("model", "-p", "trainable-tokens-trainer", "--features", "cuda")
    rows = []
    for shape, dtype, others in MODELS:
        checkpoint = out / "models" / f"{shape}-{dtype}"
        if not (checkpoint / "input_ids.json").exists():
            run(peft("checkpoint", checkpoint, "--arch", shape, "--dtype", dtype, "--device", "cuda"), [], arch=shape)
        flags = [
            "--model", checkpoint, "--input-ids", checkpoint / "input_ids.json", "--token-ids", "255000-255015",
            "--steps", 8, "--lr", 1e-3, "--device", "cuda", "--dtype", dtype,
        ]
        cases = [lambda: run([ours, *map(str, flags)], MODEL_NUMBERS, system="trainable-tokens")]
        for mode in others:
            cases.append(lambda mode=mode: run(peft("model", "--mode", mode, *flags), MODEL_NUMBERS, system=mode))
        results = by_turns(max(1, rounds - 1), cases)
        # Numbers of eight bits of precision are added up in another order.
        check(results, 1e-3 if dtype == "f32" else 2e-2)
        rows += [{"shape": f"{shape}, {dtype}", **result} for result in results]
        shutil.rmtree(checkpoint)
    return rows
