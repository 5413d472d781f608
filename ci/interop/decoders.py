"""Small random decoders of all families, with what transformers makes of them.

    decoders.py DIRECTORY

writes them and the results as fixtures; check.py compares the program with them live."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from models import SHARDS, save_random_model

# Shorter than the sequences, so that windows and long positions count.
WINDOW, POSITIONS = 5, 24
PROMPT_LENGTH, NEW_TOKENS = 9, 12
# Between the prompt's length and that of the sequences.
LONG_FROM = 16

COMMON = dict(
    vocab_size=83,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=POSITIONS,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ROPE = dict(rope_theta=10000.0)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, factor=8.0)
SMALL_SHARDS = SHARDS | dict(max_shard_size="10KB")
GEMMA = dict(tie_word_embeddings=True, query_pre_attn_scalar=6, sliding_window=WINDOW)
LATER = ("-longrope", "-gelu")
MIXED_LAYERS = ["full_attention", "sliding_attention"]

# name: (model_type, what its config says besides, how it is saved)
DECODERS = {
    "llama": ("llama", dict(attention_bias=True, mlp_bias=True), {}),
    "llama-linear": ("llama", dict(rope_parameters=dict(ROPE, rope_type="linear", factor=3.0)), {}),
    "llama-dynamic": (
        "llama",
        dict(rope_parameters=dict(ROPE, rope_type="dynamic", factor=2.0), max_position_embeddings=12),
        {},
    ),
    "llama-llama3": ("llama", dict(rope_parameters=dict(ROPE, rope_type="llama3", **LLAMA3)), {}),
    "llama-yarn": (
        "llama",
        dict(
            rope_parameters=dict(
                ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.3
            )
        ),
        {},
    ),
    "llama-longrope": (
        "llama",
        dict(
            rope_parameters=dict(
                ROPE,
                rope_type="longrope",
                short_factor=[1.0, 1.1, 1.2, 1.5],
                long_factor=[1.0, 2.0, 5.0, 9.0],
                original_max_position_embeddings=LONG_FROM,
            )
        ),
        {},
    ),
    "llama-gelu": ("llama", dict(hidden_act="gelu"), {}),
    "mistral": ("mistral", dict(sliding_window=WINDOW), {}),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1), SMALL_SHARDS),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True), {}),
    "qwen3-window": (
        "qwen3",
        dict(use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED_LAYERS, attention_bias=True),
        {},
    ),
    "gemma": ("gemma", dict(tie_word_embeddings=True), {}),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=4.0, final_logit_softcapping=6.0), {}),
    "gemma2-untied": ("gemma2", GEMMA | dict(tie_word_embeddings=False, attn_logit_softcapping=None), {}),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | dict(
            layer_types=MIXED_LAYERS,
            rope_parameters=dict(
                full_attention=dict(rope_theta=50000.0, rope_type="linear", factor=2.0),
                sliding_attention=dict(rope_theta=100.0, rope_type="default"),
            ),
        ),
        {},
    ),
    "gpt2": ("gpt2", dict(n_inner=40), {}),
    "gemma-gelu": ("gemma", dict(tie_word_embeddings=True, hidden_act="gelu"), {}),
    "gemma2-gelu": ("gemma2", GEMMA | dict(hidden_activation="gelu"), {}),
    "gpt2-gelu": ("gpt2", dict(n_inner=40, activation_function="gelu"), {}),
    "gpt2-untied": ("gpt2", dict(tie_word_embeddings=False), SMALL_SHARDS),
}


def make_config(name: str):
    model_type, own, _ = DECODERS[name]
    fields = COMMON | own
    if model_type == "gpt2":
        # As many heads of keys as of queries, and no width of its own.
        absent = ("num_key_value_heads", "head_dim", "intermediate_size")
        fields = {key: value for key, value in fields.items() if key not in absent}
    return AutoConfig.for_model(model_type, **fields)


def make_decoder(name: str, path: Path) -> Path:
    config = make_config(name)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    # Those that came later leave the seeds of the others.
    order = sorted(DECODERS, key=lambda other: (other.endswith(LATER), other))
    save_random_model(path, cls, config, seed=order.index(name), **DECODERS[name][2])
    # A token that ends a text would cut the comparison short.
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(fields | {"eos_token_id": []}, indent=2, sort_keys=True) + "\n")
    return path


def probe_ids(length: int) -> torch.Tensor:
    """[2, length]"""
    return torch.randint(3, COMMON["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def results(path: Path) -> dict[str, torch.Tensor]:
    """Embeddings and logits of some ids, and the tokens that transformers appends to them greedily, without a cache:
    with one, dynamic rotary embeddings would turn keys by outdated angles."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = probe_ids(PROMPT_LENGTH + NEW_TOKENS)
    seen = {}
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _input, y: seen.update(embeddings=y))
    logits = model(input_ids=ids, use_cache=False).logits
    hook.remove()
    prompt = probe_ids(PROMPT_LENGTH)[:1]
    generated = model.generate(
        prompt, do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=False, eos_token_id=None, pad_token_id=0
    )
    return {
        "input_ids": ids,
        "embeddings": seen["embeddings"].contiguous(),
        "logits": logits.contiguous(),
        "prompt": prompt[0],
        "prompt_logits": model(input_ids=prompt, use_cache=False).logits.contiguous(),
        "generated": generated[0, PROMPT_LENGTH:].contiguous(),
    }


def check_decoders(cli, report, work: Path):
    """Logits and greedy tokens of every family."""
    work.mkdir()
    for name in DECODERS:
        path = make_decoder(name, work / name)
        theirs = results(path)
        ours = cli.forward(work, path, theirs["input_ids"])
        report.equal_bits(f"{name}: embeddings", ours["embeddings"], theirs["embeddings"])
        report.close(f"{name}: logits", ours["logits"], theirs["logits"], 1e-4)
        prompt = cli.forward(work, path, theirs["prompt"][None])
        report.close(f"{name}: logits of the prompt", prompt["logits"], theirs["prompt_logits"], 1e-4)
        prompt = ",".join(str(id) for id in theirs["prompt"].tolist())
        said = cli("generate", model=path, prompt_ids=prompt, max_new_tokens=NEW_TOKENS)
        report.equal(f"{name}: greedy tokens", said["token_ids"], theirs["generated"].tolist())


def main():
    out = Path(sys.argv[1])
    for name in DECODERS:
        path = make_decoder(name, out / name)
        save_file(results(path), path / "expected.safetensors")
        tensors = [tensor for file in path.glob("model*.safetensors") for tensor in load_file(file).values()]
        print(name, sum(tensor.numel() for tensor in tensors))


if __name__ == "__main__":
    main()
