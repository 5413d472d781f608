"""Encoders: masked language models and embeddings of sentences, against transformers and PEFT."""

import json
from pathlib import Path

import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaForMaskedLM

import reference
from cli import Cli
from models import save_random_model, write_lines

ENCODERS = "encoders"  # the name of its checks, together
RELATIVE, LOSS, LOSS_WHILE_TRAINING, ROWS = 1e-4, 1e-5, 2e-4, 2e-3
STEPS, BATCH_SIZE, LR = 10, 4, 1e-2
TOKENS = [140, 7, 66, 21]
SHAPE = dict(
    vocab_size=150,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=64,
    initializer_range=0.15,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
MODULES = [
    {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
    for place, (path, name) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])
]


def check_encoders(cli: Cli, report, work: Path):
    work.mkdir()
    for seed, (name, cls, config) in enumerate(
        [
            ("bert", BertForMaskedLM, BertConfig(**SHAPE)),
            ("bert-tanh", BertForMaskedLM, BertConfig(**SHAPE, hidden_act="gelu_new")),
            ("roberta", RobertaForMaskedLM, RobertaConfig(**SHAPE, type_vocab_size=1, layer_norm_eps=1e-5)),
        ]
    ):
        path = work / name
        save_random_model(path, cls, config, seed=seed)
        model = cls.from_pretrained(path, attn_implementation="eager").eval()
        check_model(cli, report, work / f"{name}-checks", path, model)
        check_training(cli, report, work / f"{name}-training", cls, model)
    check_sentences(cli, report, work / "sentences")


def examples(count: int, seed: int) -> list[dict]:
    """Lines of different lengths, about a third of whose tokens have another token as their label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        ids = torch.randint(4, SHAPE["vocab_size"], (5 + (7 * row) % 13,), generator=generator)
        ids[row % 5] = TOKENS[row % len(TOKENS)]
        others = torch.randint(4, SHAPE["vocab_size"], ids.shape, generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, others, -100)
        labels[1] = ids[1]
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def relative(report, what: str, ours: torch.Tensor, theirs: torch.Tensor):
    scale = theirs.abs().max().item()
    report.close(what, ours / scale, theirs / scale, RELATIVE)


@torch.no_grad()
def check_model(cli: Cli, report, work: Path, path: Path, model):
    work.mkdir()
    name, pad = path.name, model.config.pad_token_id
    ids = torch.randint(4, SHAPE["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(5))
    theirs = {"embeddings": model.get_input_embeddings()(ids), "logits": model(input_ids=ids).logits}
    ours = cli.forward(work, path, ids)
    report.equal_bits(f"{name}: embeddings", ours["embeddings"], theirs["embeddings"])
    relative(report, f"{name}: logits (relative)", ours["logits"], theirs["logits"])
    lines = examples(11, seed=3)
    data = write_lines(work / "data.jsonl", lines)
    loss = model(**reference.collate(lines, pad)).loss.item()
    evaluated = cli("eval", model=path, data=data, batch_size=11)
    report.within(f"{name}: masked loss of a padded batch, {loss:.4f}", abs(evaluated["loss"] - loss), LOSS)
    again = cli("eval", model=path, data=data, batch_size=3)
    report.within(f"{name}: the same in other batches", abs(again["loss"] - loss), LOSS)


def check_training(cli: Cli, report, work: Path, cls, model):
    """PEFT drops the bias of a tied output layer, so this model has none: then both sides train the same."""
    work.mkdir()
    path, ours, theirs = work / "model", work / "ours", work / "theirs"
    name, pad = work.name, model.config.pad_token_id
    with torch.no_grad():
        model.get_output_embeddings().bias.zero_()
    model.save_pretrained(path)
    lines = examples(18, seed=4)
    data, metrics = write_lines(work / "train.jsonl", lines), work / "metrics.jsonl"
    options = dict(steps=STEPS, batch_size=BATCH_SIZE, lr=LR, weight_decay=0.1)
    ids = ",".join(map(str, TOKENS))
    cli("train", model=path, data=data, token_ids=ids, out=ours, metrics=metrics, **options)
    config = TrainableTokensConfig(token_indices=TOKENS, target_modules=["word_embeddings"])
    def load():
        return cls.from_pretrained(path, attn_implementation="eager").eval()

    peft = get_peft_model(load(), config).eval()
    losses = train(peft, lines, pad, **options)
    peft.save_pretrained(theirs)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    our_losses = [step["loss"] for step in steps if "step" in step]
    apart = max(abs(a - b) for a, b in zip(our_losses, losses, strict=True))
    report.within(f"{name}: losses", apart, LOSS_WHILE_TRAINING)
    in_files = [reference.read_tensors(adapter) for adapter in (ours, theirs)]
    report.equal(f"{name}: keys of the adapter", sorted(in_files[0]), sorted(in_files[1]))
    for key in in_files[1]:
        report.close(f"{name}: rows {key.split('.')[-2]}", in_files[0][key], in_files[1][key], ROWS)
    loaded = PeftModel.from_pretrained(load(), ours).eval()
    tokens = torch.tensor([lines[0]["input_ids"]])
    with torch.no_grad():
        logits = loaded(input_ids=tokens).logits
    own = cli.forward(work, path, tokens, adapter=ours)["logits"]
    relative(report, f"{name}: logits in PEFT (relative)", own, logits)


def train(model, lines, pad, *, steps, batch_size, lr, weight_decay):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    losses = []
    for step in range(steps):
        batch = [lines[(step * batch_size + place) % len(lines)] for place in range(batch_size)]
        optimizer.zero_grad()
        out = model(**reference.collate(batch, pad))
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return losses


@torch.no_grad()
def check_sentences(cli: Cli, report, path: Path):
    """Embeddings of sentences, one by one, against those of a padded batch in transformers."""
    save_random_model(path, BertModel, BertConfig(**SHAPE), seed=9)
    (path / "modules.json").write_text(json.dumps(MODULES))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    model = BertModel.from_pretrained(path, attn_implementation="eager").eval()
    lines = examples(7, seed=6)
    batch = reference.collate(lines, model.config.pad_token_id)
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    pooled = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)
    for row, (line, theirs) in enumerate(zip(lines, pooled)):
        cli.forward(path.parent, path, torch.tensor([line["input_ids"]]))
        ours = load_file(path.parent / "forward.safetensors")["sentence_embeddings"][0]
        relative(report, f"sentences: embedding {row} (relative)", ours, theirs)
