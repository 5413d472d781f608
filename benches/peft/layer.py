#!/usr/bin/env python3
"""A training step of an embedding with real PEFT beside torch's frozen lookup, in one process.

The workload, the flags and the line of JSON are those of benches/layer: lookup, backward pass from a given gradient, AdamW
without weight decay; two threads.

    python benches/peft/layer.py --vocab-size 256000     # in the environment of ci/python.sh
"""
import argparse
import json
import statistics
import time

import torch
from memory import Peak
from peft import TrainableTokensConfig, get_peft_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
WATCHED = 3


class Model(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.emb = torch.nn.Embedding(*table.shape, _weight=table)

    def forward(self, input_ids):
        return self.emb(input_ids)


def trained_ids(vocab_size, rows):
    stride = max(1, min(7, (vocab_size - 1) // rows))
    return [vocab_size - 1 - slot * stride for slot in range(rows)]


def batch(vocab_size, tokens, trained):
    def id_at(at):
        return trained[at // 10 % len(trained)] if at % 10 == 0 else at * 2654435761 % 2**32 % vocab_size

    return torch.tensor([[id_at(at) for at in range(tokens)]])


def timed(what):
    start = time.perf_counter()
    result = what()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)

    dtype = DTYPES[args.dtype]
    table = torch.empty(args.vocab_size, args.dim, dtype=dtype, device=args.device).normal_(0, 0.02)
    base = Model(table).requires_grad_(False)
    trained = trained_ids(args.vocab_size, args.rows)
    ids = batch(args.vocab_size, args.tokens, trained).to(args.device)
    upstream = torch.randn(1, args.tokens, args.dim, dtype=dtype, device=args.device)

    plain = torch.nn.Embedding.from_pretrained(base.emb.weight.data)

    def frozen():
        with torch.no_grad():
            return plain(ids)

    peak = Peak(args.device)
    model = get_peft_model(base, TrainableTokensConfig(token_indices=trained, target_modules=["emb"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    def step():
        rows, forward = timed(lambda: model(ids))
        _, backward = timed(lambda: rows.backward(upstream))
        _, optimize = timed(update)
        return [forward, backward, optimize, forward + backward + optimize]

    for _ in range(WATCHED):
        step()
    extra = peak.stop()
    frozen()
    times = [[timed(frozen)[1], *step()] for _ in range(args.rounds)]
    frozen_ms, forward, backward, optimize, total = map(statistics.median_high, zip(*times))
    print(json.dumps({
        "backend": "peft", "v": args.vocab_size, "d": args.dim, "n": args.tokens, "k": args.rows, "dtype": args.dtype,
        "rounds": args.rounds, "frozen_ms": frozen_ms, "forward_ms": forward,
        "forward_over_frozen": forward / frozen_ms, "backward_ms": backward, "optimizer_ms": optimize,
        "total_ms": total, "extra_mb": extra,
    }))


if __name__ == "__main__":
    main()
