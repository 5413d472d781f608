#!/usr/bin/env python3
"""Times one step of an embedding with real PEFT beside torch's frozen lookup: lookup, backward pass, AdamW.

The workload is that of benches/step.rs: rows of 2304, 4096 ids, every tenth of them a trained one, 128 trained rows,
f32, two threads. Prints the median of the steps after the first, in milliseconds.

    python benches/peft/step.py 32000 256000     # in the environment of ci/interop/requirements.txt
"""
import statistics
import sys
import time

import torch
from peft import TrainableTokensConfig, get_peft_model

DIM, TOKENS, ROWS, STEPS = 2304, 4096, 128, 8


class Model(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.emb = torch.nn.Embedding(vocab_size, DIM)

    def forward(self, input_ids):
        return self.emb(input_ids)


def median_ms(step):
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main():
    torch.set_num_threads(2)
    for vocab_size in map(int, sys.argv[1:] or ["32000", "256000"]):
        base = Model(vocab_size).requires_grad_(False)
        trained = [vocab_size - 1 - 7 * slot for slot in range(ROWS)]
        ids = [trained[at // 10 % ROWS] if at % 10 == 0 else at * 2654435761 % 2**32 % vocab_size for at in range(TOKENS)]
        ids = torch.tensor([ids])
        with torch.no_grad():
            frozen = median_ms(lambda: base(ids))
        model = get_peft_model(base, TrainableTokensConfig(token_indices=trained, target_modules=["emb"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

        def step():
            model(ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        print(f"V={vocab_size}: frozen lookup {frozen:.1f} ms, PEFT step {median_ms(step):.1f} ms", flush=True)


if __name__ == "__main__":
    main()
