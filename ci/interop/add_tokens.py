"""Models with added tokens: transformers loads them, and its tokenizer finds the tokens where ours does."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import reference
from models import SHAPE, save_random_model

WORDS = ["the", "cat", "sat", "on", "mat", "a", "b", "x"]
NEW = ["<new>", "[TOOL]", "two words", "über"]
SMALL = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=48)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece() -> Tokenizer:
    pieces = ["[PAD]", "[UNK]", *WORDS, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz<>[]")]
    tokenizer = Tokenizer(models.Unigram(pieces + [(f"▁{word}", -3.0) for word in WORDS], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


CASES = {
    "BPE, untied": (byte_level, LlamaForCausalLM, LlamaConfig(**SHAPE), AutoModelForCausalLM, {}),
    "BPE, tied, bf16 shards": (
        byte_level,
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
        AutoModelForCausalLM,
        dict(dtype=torch.bfloat16, max_shard_size="30KB"),
    ),
    "WordPiece, BERT": (
        word_piece,
        BertForMaskedLM,
        BertConfig(**SMALL, vocab_size=40),
        AutoModelForMaskedLM,
        {},
    ),
    "Unigram, T5": (
        unigram,
        T5ForConditionalGeneration,
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0),
        AutoModelForSeq2SeqLM,
        {},
    ),
}


def check_add_tokens(cli, report, work: Path):
    for seed, (name, (make, cls, config, auto, options)) in enumerate(CASES.items()):
        base = work / str(seed)
        save_random_model(base, cls, config, seed=seed, **options)
        PreTrainedTokenizerFast(tokenizer_object=make(), additional_special_tokens=["<old>"]).save_pretrained(base)
        for kind in ("special", "normal"):
            check_kind(cli, report, f"add-tokens, {name}, {kind}", base, work / f"{seed}-{kind}", auto, kind)
    check_flags(cli, report, work / "0", work / "flags")
    check_training(cli, report, work, work / "0", work / "0-special")


@torch.no_grad()
def check_kind(cli, report, what: str, base: Path, out: Path, auto, kind: str):
    old = AutoTokenizer.from_pretrained(base)
    said = cli("add-tokens", model=base, tokens=",".join(NEW), out=out, init="copy:3", normal=(kind == "normal") or None)
    ids = [added["id"] for added in said["added"]]
    report.equal(f"{what}: ids", ids, list(range(len(old), len(old) + len(NEW))))
    ours = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(base)
    theirs.add_tokens(NEW, special_tokens=kind == "special")
    contexts = [
        text
        for token in NEW
        for text in (token, f"{token} the", f"the {token} cat", f"a{token}b", f"the cat {token}", token.upper())
    ]
    differ = [text for text in contexts if ours(text).input_ids != theirs(text).input_ids]
    report.none(f"{what}: texts that transformers' own add_tokens encodes otherwise", differ)
    lost = [token for token, id in zip(NEW, ids) if ours.encode(token, add_special_tokens=False) != [id]]
    report.none(f"{what}: tokens that do not encode to their ids", lost)
    if kind == "special":
        missed = [token for token, id in zip(NEW, ids) if ids_of(ours, f"a{token}b").count(id) != 1]
        report.none(f"{what}: tokens not found between letters", missed)
        skipped = ours.decode(ids, skip_special_tokens=True).strip()
        report.equal(f"{what}: text without special tokens", skipped, "")
    model, info = auto.from_pretrained(out, dtype="auto", output_loading_info=True)
    before = auto.from_pretrained(base, dtype="auto")
    complaints = [f"{kind}: {names}" for kind, names in info.items() if names]
    report.none(f"{what}: transformers on loading it", complaints)
    tables = [("input", *(m.get_input_embeddings().weight for m in (model, before)))]
    tables.append(("output", *(m.get_output_embeddings().weight for m in (model, before))))
    for which, after, rows in tables:
        report.equal_bits(f"{what}: old {which} rows", after[: len(old)], rows[: len(old)])
        report.equal_bits(f"{what}: new {which} rows", after[ids], rows[3].expand(len(ids), -1).contiguous())
    report.equal(f"{what}: rows", model.config.vocab_size, tables[0][1].shape[0])
    text = ours("the <new> cat", return_tensors="pt").input_ids
    inputs = dict(input_ids=text)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = text
    logits = model.eval()(**inputs).logits
    report.equal(f"{what}: logits", list(logits.shape), [1, text.shape[1], said["vocab_size"]])
    # A copied row, and a copied bias, get the logit of what they were copied from.
    report.close(f"{what}: logits of the new tokens", logits[..., ids], logits[..., [3] * len(ids)], 1e-6)


def check_flags(cli, report, base: Path, out: Path):
    texts = [text.format(NEW[0]) for text in ("{}", "the {} cat", "the{}cat", "  {}  the", "{0}{0}", "a {}, b")]
    for flags in (["lstrip"], ["rstrip"], ["lstrip", "rstrip"], ["single_word"]):
        cli("add-tokens", model=base, tokens=NEW[0], out=out, force=True, **dict.fromkeys(flags, True))
        ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
        # transformers itself takes a special token with flags only so.
        token = AddedToken(NEW[0], special=True, normalized=False, **dict.fromkeys(flags, True))
        theirs.add_tokens([token], special_tokens=True)
        differ = [text for text in texts if ours(text).input_ids != theirs(text).input_ids]
        report.none(f"add-tokens, {' '.join(flags)}: texts that transformers encodes otherwise", differ)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def check_training(cli, report, work: Path, base: Path, model: Path):
    """The tokens train by their strings, and PEFT reads the adapter."""
    data = work / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {token} cat"}) + "\n" for token in NEW))
    out = work / "adapter"
    cli("train", model=model, data=data, tokens=",".join(NEW), steps=4, lr=0.05, out=out)
    loaded, warnings = reference.load_adapter(model, out)
    ids = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(NEW)
    report.equal("add-tokens, training: token_indices in PEFT", loaded.peft_config["default"].token_indices, ids)
    moved = (reference.rows_of(loaded) - loaded.get_base_model().get_input_embeddings().weight[ids]).abs()
    report.line(moved.amax(dim=1).min() > 0.01, "add-tokens, training: every row moved", f"{moved.amax(dim=1).tolist()}")
    # A second time, into rows that are there: nothing is appended.
    padded, again = work / "padded", work / "again"
    cli("add-tokens", model=base, tokens="<p>", out=padded, pad_to_multiple_of=64, init="mean")
    said = cli("add-tokens", model=padded, tokens="<q>,<r>", out=again, init="keep")
    reused = [added["reused_row"] for added in said["added"]]
    report.equal("add-tokens, padded: rows reused", [*reused, said["rows_appended"]], [True, True, 0])
    report.equal("add-tokens, padded: rows", said["vocab_size"] % 64, 0)
    table = reference.load_model(padded).get_input_embeddings().weight
    mean = reference.load_model(base).get_input_embeddings().weight.double().mean(0).float()
    report.close("add-tokens, padded: padding is the mean", table[-1], mean, 1e-6)
    shutil.rmtree(again)
