#!/usr/bin/env python3
"""Makes a small causal language model with a large vocabulary, and a batch for it: what both sides of the comparison load.

    python benches/peft/checkpoint.py DIR --arch llama     # DIR/model.safetensors, DIR/config.json, DIR/input_ids.json
"""
import argparse
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM


# A shape by name, where it is not the small one of the flags: that of the published configuration.
GEMMA_2_2B = dict(
    vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, sliding_window=4096, query_pre_attn_scalar=256,
    attn_logit_softcapping=50.0, final_logit_softcapping=30.0, tie_word_embeddings=True,
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("--arch", choices=["llama", "gemma2", "gemma-2-2b"], default="llama")
    parser.add_argument("--vocab-size", type=int, default=256_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=[2, 128])
    parser.add_argument("--token-ids", default="255000-255015")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the weights are drawn")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of the weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=args.vocab_size, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=args.hidden // 8,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )
    torch.set_default_device(args.device)
    if args.arch == "gemma-2-2b":
        model = Gemma2ForCausalLM(Gemma2Config(**GEMMA_2_2B))
    elif args.arch == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(sliding_window=512, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    if args.dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(args.dir)
    first, last = map(int, args.token_ids.split("-"))
    ids = torch.randint(0, first, tuple(args.batch))
    # Every eighth token is one that trains.
    ids[:, ::8] = torch.randint(first, last + 1, ids[:, ::8].shape)
    with open(os.path.join(args.dir, "input_ids.json"), "w") as file:
        json.dump(ids.tolist(), file)
    print(json.dumps({"arch": args.arch}))


if __name__ == "__main__":
    main()
