#!/usr/bin/env python3
"""A training step of a whole model with real PEFT, with LoRA on the embedding, or of the embedding as a whole.

The flags and the line of JSON are those of the program that does the same with the trainer.

    python benches/peft/model.py --mode peft --model DIR --input-ids DIR/input_ids.json --token-ids 255000-255015
"""
import argparse
import json
import os
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from memory import Peak
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM


def adapted(model, mode, token_ids):
    if mode == "peft":
        return get_peft_model(model, TrainableTokensConfig(token_indices=token_ids))
    if mode == "lora":
        return get_peft_model(model, LoraConfig(r=16, target_modules=["embed_tokens"]))
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=["peft", "lora", "full"], default="peft")
    parser.add_argument("--model", required=True)
    parser.add_argument("--input-ids", required=True, help="a JSON file of equally long lists of ids")
    parser.add_argument("--token-ids", default="255000-255015", help="FIRST-LAST, both included")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    first, last = map(int, args.token_ids.split("-"))
    with open(args.input_ids) as file:
        ids = torch.tensor(json.load(file), device=args.device)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="eager").to(args.device)
    model.config.use_cache = False
    table = model.get_input_embeddings().weight.shape

    peak = Peak(args.device)
    model = adapted(model, args.mode, list(range(first, last + 1)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    seconds, losses = [], []
    # One more to warm up.
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        seconds.append(time.perf_counter() - start)
    print(json.dumps({
        "system": args.mode, "v": table[0], "d": table[1], "k": last + 1 - first, "tokens": ids.numel(),
        "steps": args.steps, "step_s": statistics.median_high(seconds[1:]), "extra_mb": peak.stop(),
        "trainable": sum(parameter.numel() for parameter in trained), "loss": losses,
    }))


if __name__ == "__main__":
    main()
