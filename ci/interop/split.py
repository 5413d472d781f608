"""Models and plain LoRA adapters that were split: PEFT computes with them what it computes with the whole adapter."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reference
from lora import TOKENS, make_adapter
from models import SHAPE, VOCAB_SIZE, save_random_model

CASES = {
    "untied": (dict(), TOKENS, torch.float32),
    "untied, embedding and head": (dict(), {"embed_tokens": TOKENS, "lm_head": [5, 299]}, torch.float32),
    "tied": (dict(tie_word_embeddings=True), TOKENS, torch.float32),
    "tied, bf16": (dict(tie_word_embeddings=True), TOKENS, torch.bfloat16),
}


def check_split(cli, report, work: Path):
    for seed, (name, (options, tokens, dtype)) in enumerate(CASES.items()):
        at = work / str(seed)
        base, adapter, model, plain = (at / part for part in ("base", "adapter", "model", "plain"))
        save_random_model(base, LlamaForCausalLM, LlamaConfig(**SHAPE, **options), seed=seed, dtype=dtype)
        make_adapter(base, adapter, tokens=tokens, seed=seed, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        cli("split", model=base, adapter=adapter, out_model=model, out_adapter=plain)
        whole, _ = reference.load_adapter(base, adapter, "auto")
        parts, warnings = reference.load_adapter(model, plain, "auto")
        ids = torch.randint(VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(seed))
        ids[:, :4] = torch.tensor(TOKENS)
        ours, theirs = (reference.forward(loaded, ids)["logits"] for loaded in (parts, whole))
        report.equal_bits(f"split, {name}: logits in PEFT", ours, theirs)
        moved = (theirs - reference.forward(reference.load_model(base, "auto"), ids)["logits"]).abs().max().item()
        report.line(moved > 1e-2, f"split, {name}: the adapter matters", f"{moved:.1e} (above 1e-02)")
        missing = [warning for warning in warnings if "missing" in warning]
        report.none(f"split, {name}: PEFT's warnings of missing keys", missing)
        names = [key for key in reference.read_tensors(plain) if ".lora_" not in key]
        report.none(f"split, {name}: tensors that are no weights of LoRA", names)
        indices = json.loads((plain / "adapter_config.json").read_text())["trainable_token_indices"]
        report.equal(f"split, {name}: trainable_token_indices", indices, None)
