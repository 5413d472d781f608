"""Adapters that were extracted from tuned models: PEFT reads them, and makes the tuned models of them again."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import reference
from models import SHAPE, VOCAB_SIZE, save_random_model


@dataclass
class ExtractCase:
    """Rows that change in the embedding, and in the head where it is not tied; how many rows are new."""

    name: str
    tied: bool
    rows: list[int]
    head_rows: list[int]
    grown_by: int = 0
    dtype: torch.dtype = torch.float32


CASES = [
    ExtractCase("tied", True, [7, 300, 42], []),
    ExtractCase("untied, embedding alone", False, [0, 299], []),
    ExtractCase("untied, head alone", False, [], [5, 9]),
    ExtractCase("untied, both", False, [7, 42], [7, 11]),
    ExtractCase("bf16, tied", True, [1, 2, 3], [], dtype=torch.bfloat16),
    ExtractCase("grown, tied", True, [3], [], grown_by=4),
    ExtractCase("grown, untied", False, [3], [4], grown_by=3, dtype=torch.bfloat16),
]


def check_extract(cli, report, work: Path):
    for seed, case in enumerate(CASES):
        check_case(cli, report, case, work / str(seed), seed)


@torch.no_grad()
def tune(case: ExtractCase, base: Path, out: Path):
    """Changes rows with nothing but transformers."""
    model = reference.load_model(base, "auto")
    if case.grown_by:
        model.resize_token_embeddings(VOCAB_SIZE + case.grown_by, mean_resizing=False)
    for module, rows in (
        (model.get_input_embeddings(), case.rows),
        (model.get_output_embeddings(), case.head_rows),
    ):
        for row in rows:
            module.weight[row] = torch.randn(SHAPE["hidden_size"]).to(case.dtype)
    model.save_pretrained(out)


def check_case(cli, report, case: ExtractCase, work: Path, seed: int):
    def what(text: str) -> str:
        return f"extract, {case.name}: {text}"

    base, tuned, adapter, merged = (work / name for name in ("base", "tuned", "adapter", "merged"))
    config = LlamaConfig(**SHAPE, tie_word_embeddings=case.tied)
    save_random_model(base, LlamaForCausalLM, config, seed=seed, dtype=case.dtype)
    torch.manual_seed(seed)
    tune(case, base, tuned)
    made = cli("extract", base=base, tuned=tuned, out=adapter)
    new = range(VOCAB_SIZE, VOCAB_SIZE + case.grown_by)
    report.equal(what("tokens"), made["token_indices"], sorted({*case.rows, *case.head_rows, *new}))
    expected = reference.read_tensors(tuned)
    cli("merge", model=base, adapter=adapter, out=merged)
    report.equal_tensors(what("merged"), reference.read_tensors(merged), expected)

    model = reference.load_model(base, "auto")
    if case.grown_by:
        model.resize_token_embeddings(VOCAB_SIZE + case.grown_by, mean_resizing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    in_file, looked_for = set(reference.read_tensors(adapter)), reference.adapter_keys(model)
    report.equal(what("keys in the file, and in PEFT"), sorted(in_file), sorted(looked_for))
    missing = [str(warning.message) for warning in caught if "missing" in str(warning.message)]
    report.none(what("PEFT's warnings of missing keys"), missing)
    again = work / "again"
    model.merge_and_unload().save_pretrained(again)
    report.equal_tensors(what("merged by PEFT"), reference.read_tensors(again), expected)
