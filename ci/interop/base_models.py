"""Checkpoints of a base model alone: adapters that PEFT makes on `AutoModel`, and models that transformers saves of both."""

import json
from pathlib import Path

import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import reference
from models import Case, random_ids


def check_base_models(cli, report, work: Path, cases: list[Case]):
    work.mkdir()
    for case in cases:
        if case.prefix:
            (work / case.name).mkdir()
            check_auto_model(cli, report, work / case.name, case)
            check_tuned(cli, report, work / case.name, case)
    check_missing_head(cli, report, work, next(case for case in cases if case.name == "llama-bare"))


def load(path: Path):
    return AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def check_auto_model(cli, report, work: Path, case: Case):
    """PEFT's adapter of `AutoModel` has keys without the prefix; ours of a model saved by `AutoModel` have it."""
    adapter, merged, alone = work / "adapter", work / "merged", work / "alone"
    base = load(case.model)
    module = base.get_input_embeddings()
    path = next(path for path, other in base.named_modules() if other is module)
    model = get_peft_model(base, TrainableTokensConfig(token_indices=case.tokens, target_modules=path))
    rows = model.get_base_model().get_input_embeddings().trainable_tokens_delta["default"]
    # As the checkpoint can hold them.
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(4)).bfloat16())
    model.save_pretrained(adapter)
    keys = list(load_file(adapter / "adapter_model.safetensors"))
    report.equal(f"{case.name}, AutoModel: PEFT's keys", keys, [f"base_model.model.{path}.trainable_tokens_delta"])
    report.equal(f"{case.name}, AutoModel: fits", cli("verify", model=case.model, adapter=adapter)["fits"], True)
    cli.merge(case.model, [adapter], merged)
    ids = random_ids(case, 2, 12, seed=5)
    states = [each(input_ids=ids).last_hidden_state for each in (load(merged), model.get_base_model())]
    report.close(f"{case.name}, AutoModel: merged, hidden states", *states, 1e-5)
    ours = cli.forward(work, case.model, ids, adapter=adapter)["logits"]
    theirs = reference.forward(reference.load_model(merged), ids)["logits"]
    report.close(f"{case.name}, AutoModel: logits", ours, theirs, 1e-4)

    # Saved by `AutoModel`, the class in config.json is another.
    load(case.model).save_pretrained(alone)
    report.line(
        json.loads((alone / "config.json").read_text())["architectures"][0].endswith("Model"),
        f"{case.name}, AutoModel: class",
        "saved alone",
    )
    ours = work / "ours"
    cli("init", model=alone, token_ids=",".join(map(str, case.tokens)), out=ours)
    keys = reference.adapter_keys(PeftModel.from_pretrained(reference.load_model(alone), ours))
    report.equal(f"{case.name}, AutoModel: our keys", sorted(reference.read_tensors(ours)), sorted(keys))


@torch.no_grad()
def check_tuned(cli, report, work: Path, case: Case):
    """Transformers saves a tuned model with the prefix and without masks; the rows are found all the same."""
    tuned, adapter, merged = work / "tuned", work / "extracted", work / "merged-again"
    model = reference.load_model(case.model, "auto")
    model.get_input_embeddings().weight[case.tokens] = 0.25
    model.save_pretrained(tuned)
    made = cli("extract", base=case.model, tuned=tuned, out=adapter)
    report.equal(f"{case.name}, extract: tokens", made["token_indices"], sorted(case.tokens))
    cli.merge(case.model, [adapter], merged)
    tensors = case.named(reference.read_tensors(merged))
    report.equal_tensors(f"{case.name}, extract: merged", tensors, reference.read_tensors(tuned))


def check_missing_head(cli, report, work: Path, case: Case):
    """Transformers starts a head that is not stored at random, and says so; here it is an error."""
    path, data = work / "no-head", work / "data.jsonl"
    path.mkdir()
    (path / "config.json").write_text((case.model / "config.json").read_text())
    tensors = reference.read_tensors(case.model)
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    data.write_text(json.dumps({"input_ids": case.tokens}) + "\n")
    said = cli.refusal("eval", model=path, data=data)
    report.line("lm_head.weight" in said, "no head: refused", said.splitlines()[0].removeprefix("error: "))
