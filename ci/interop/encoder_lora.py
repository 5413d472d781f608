"""Weights of LoRA in encoders: trained side by side with PEFT, and PEFT's own adapters applied."""

import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

import reference
from encoders import LOSS_WHILE_TRAINING, LR, MODULES, ROWS, SHAPE, TOKENS, examples, relative, train
from models import save_random_model, write_lines

MERGED = 1e-6
STEPS, BATCH_SIZE, WEIGHT_DECAY, RANK, ALPHA = 8, 3, 0.1, 4, 12
ROBERTA = dict(type_vocab_size=1, layer_norm_eps=1e-5)


def check_encoder_lora(cli, report, work: Path):
    work.mkdir()
    for seed, (name, cls, config, targets) in enumerate(
        [
            ("bert", BertForMaskedLM, BertConfig(**SHAPE), "all-linear"),
            ("bert-untied", BertForMaskedLM, BertConfig(**SHAPE, tie_word_embeddings=False), "query,decoder"),
            ("roberta", RobertaForMaskedLM, RobertaConfig(**SHAPE, **ROBERTA), "all-linear"),
            ("xlm-roberta", XLMRobertaForMaskedLM, XLMRobertaConfig(**SHAPE, **ROBERTA), None),
        ]
    ):
        at = work / name
        save_random_model(at / "base", cls, config, seed=seed)
        clear_output_bias(cls, at / "base")
        check_masked(cli, report, name, cls, at, targets)
    check_sentences(cli, report, work / "sentences")
    check_adapters_of_peft(cli, report, work / "theirs")


def clear_output_bias(cls, path: Path):
    """PEFT drops the bias of a tied output layer, so this model has none: then both sides train the same."""
    model = cls.from_pretrained(path)
    with torch.no_grad():
        model.get_output_embeddings().bias.zero_()
    model.save_pretrained(path)


def quietly(make):
    """What `make` makes, and the warnings on the way that speak of keys or modules."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make()
    said = [str(warning.message) for warning in caught]
    return made, [text for text in said if "key" in text or "module" in text]


def load(cls, path: Path):
    return cls.from_pretrained(path, attn_implementation="eager").eval()


def check_masked(cli, report, name: str, cls, at: Path, targets: str | None):
    lines = examples(18, seed=4)
    pad = load(cls, at / "base").config.pad_token_id

    def losses(model):
        return train(model, lines, pad, steps=STEPS, batch_size=BATCH_SIZE, lr=LR, weight_decay=WEIGHT_DECAY)

    ids = torch.tensor([lines[0]["input_ids"]])
    check_run(
        cli, report, f"LoRA, {name}:", cls, at, lines, losses, {"lora_targets": targets},
        lambda model: model(input_ids=ids).logits,
        lambda **options: cli.forward(at, ids=ids, **options)["logits"],
    )


def check_run(cli, report, what: str, cls, at: Path, lines: list, losses, options: dict, output, own_output):
    """Trains from one start on both sides; `output` and `own_output` are those of a model of either."""
    base, start, tuned, again = (at / name for name in ("base", "start", "tuned", "again"))
    data, metrics = write_lines(at / "data.jsonl", lines), at / "metrics.jsonl"
    common = dict(model=base, data=data, token_ids=",".join(map(str, TOKENS)), batch_size=BATCH_SIZE, seed=2)
    common |= dict(lora_rank=RANK, lora_alpha=ALPHA, weight_decay=WEIGHT_DECAY, **options)
    cli("train", **common, out=start, steps=1, lr=0)
    cli("train", **common, out=tuned, steps=STEPS, lr=LR, metrics=metrics)

    model, complaints = quietly(lambda: PeftModel.from_pretrained(load(cls, base), start, is_trainable=True).eval())
    report.none(f"{what} PEFT's warnings on keys", complaints)
    keys = set(reference.read_tensors(tuned))
    report.none(f"{what} keys of one side", keys ^ reference.adapter_keys(model))
    if options.get("lora_targets") == "all-linear":
        config = LoraConfig(target_modules="all-linear", trainable_token_indices=TOKENS)
        fresh, _ = quietly(lambda: get_peft_model(load(cls, base), config))
        their_keys = {key for key in reference.adapter_keys(fresh) if "pooler" not in key}
        report.none(f"{what} keys of all-linear of one side", keys ^ their_keys)
    their_losses = losses(model)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    our_losses = [step["loss"] for step in steps if "step" in step]
    apart = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
    span = f"{their_losses[0]:.3f} to {their_losses[-1]:.3f}"
    report.within(f"{what} losses {span}", apart, LOSS_WHILE_TRAINING)
    quietly(lambda: model.save_pretrained(again))
    in_files = [reference.read_tensors(adapter) for adapter in (tuned, again)]
    apart = max((in_files[0][key] - in_files[1][key]).abs().max().item() for key in in_files[1])
    report.within(f"{what} weights and rows", apart, ROWS)
    moved = min(tensor.abs().max().item() for key, tensor in in_files[1].items() if "lora_B" in key)
    report.line(moved > 1e-3, f"{what} every layer's weights moved", f"{moved:.1e} (above 1e-03)")

    with torch.no_grad():
        loaded, _ = quietly(lambda: PeftModel.from_pretrained(load(cls, base), tuned).eval())
        expected = output(loaded)
        relative(report, f"{what} outputs in PEFT (relative)", own_output(model=base, adapter=tuned), expected)
        cli("split", model=base, adapter=tuned, out_model=at / "split", out_adapter=at / "plain")
        parts, _ = quietly(lambda: PeftModel.from_pretrained(load(cls, at / "split"), at / "plain").eval())
        relative(report, f"{what} outputs of both parts of a split in PEFT (relative)", output(parts), expected)
    cli.merge(base, [tuned], at / "merged", safe=True)
    quietly(lambda: loaded.merge_and_unload().save_pretrained(at / "theirs"))
    ours, theirs = (reference.read_tensors(at / side) for side in ("merged", "theirs"))
    report.none(f"{what} tensors of one of both merged models", set(ours) ^ set(theirs))
    apart = max((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)
    report.within(f"{what} the merged model", apart, MERGED)


def sentence_model(path: Path, cls=BertModel, **options):
    save_random_model(path, cls, BertConfig(**(SHAPE | options)), seed=9)
    (path / "modules.json").write_text(json.dumps(MODULES))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))


def embed(model, sequences: list[list[int]]) -> torch.Tensor:
    """Embeddings of unit length, [sequences, D]."""
    batch = reference.collate([{"input_ids": ids} for ids in sequences], 0)
    del batch["labels"]
    hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def own_embedding(cli, work: Path, ids: list[int], **options) -> torch.Tensor:
    cli.forward(work, ids=torch.tensor([ids]), **options)
    return load_file(work / "forward.safetensors")["sentence_embeddings"][0]


def check_sentences(cli, report, at: Path):
    """Sentences come close to their definitions, whose embeddings are those of the model before the first step."""
    sentence_model(at / "base")
    generator = torch.Generator().manual_seed(3)
    lines = [
        {"input_ids": line["input_ids"], "definition_ids": ids.tolist()}
        for line, ids in zip(examples(9, seed=6), torch.randint(4, SHAPE["vocab_size"], (9, 6), generator=generator))
    ]
    with torch.no_grad():
        definitions = embed(load(BertModel, at / "base"), [line["definition_ids"] for line in lines])

    def losses(model):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
        found = []
        for step in range(STEPS):
            batch = [(step * BATCH_SIZE + place) % len(lines) for place in range(BATCH_SIZE)]
            optimizer.zero_grad()
            embeddings = embed(model, [lines[row]["input_ids"] for row in batch])
            loss = (1 - (embeddings * definitions[batch]).sum(1)).mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ids = lines[0]["input_ids"]
    check_run(
        cli, report, "LoRA, sentences:", BertModel, at, lines, losses,
        {"lora_targets": "all-linear", "objective": "teach"},
        lambda model: embed(model, [ids])[0],
        lambda **options: own_embedding(cli, at, ids, **options),
    )


@torch.no_grad()
def check_adapters_of_peft(cli, report, work: Path):
    """With many layers PEFT writes `dense` for all of them, and poolers are in checkpoints of models without one."""
    ids = examples(1, seed=7)[0]["input_ids"]
    config = LoraConfig(r=RANK, target_modules="all-linear", trainable_token_indices=TOKENS)
    many = dict(num_hidden_layers=4)
    for name, stored, cls in [("masked", BertForPreTraining, BertForMaskedLM), ("sentences", BertModel, BertModel)]:
        what, base, adapter = f"LoRA of PEFT, {name}:", work / name, work / f"{name}-adapter"
        sentence_model(base, stored, **many)
        if cls is BertForMaskedLM:
            clear_output_bias(stored, base)
        made, _ = quietly(lambda: get_peft_model(load(cls, base), config).eval())
        torch.manual_seed(1)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        made.save_pretrained(adapter)
        targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
        report.equal(f"{what} target_modules", sorted(targets), ["dense", "key", "query", "value"])
        report.equal(f"{what} fits, says verify", cli("verify", model=base, adapter=adapter)["fits"], True)
        if cls is BertForMaskedLM:
            theirs = made(input_ids=torch.tensor([ids])).logits
            ours = cli.forward(work, ids=torch.tensor([ids]), model=base, adapter=adapter)["logits"]
        else:
            theirs = embed(made, [ids])[0]
            ours = own_embedding(cli, work, ids, model=base, adapter=adapter)
        relative(report, f"{what} outputs (relative)", ours, theirs)
