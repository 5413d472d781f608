"""Adapters with weights of LoRA: our merges against PEFT's `merge_and_unload`."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import reference
from models import GEMMA, SHAPE, VOCAB_SIZE, save_random_model

# The sums that torch takes in another order. Halves may then round to the neighbour, but seldom.
F32, NEIGHBOURS = 1e-6, 0.01
TOKENS = [300, 7, 150, 42]


@dataclass
class LoraCase:
    """A model, and the adapters that are merged into it in their order."""

    name: str
    model: str
    adapters: list[dict]
    dtype: torch.dtype = torch.float32


def gpt2(**options):
    return GPT2Config(vocab_size=VOCAB_SIZE, n_embd=48, n_layer=2, n_head=4, n_positions=64, **options)


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **GEMMA)),
    "gpt2": (GPT2LMHeadModel, gpt2()),
    "gpt2-untied": (GPT2LMHeadModel, gpt2(tie_word_embeddings=False)),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
PATTERNS = dict(
    rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.(up|gate)_proj": 6},
    alpha_pattern={"model.layers.0.self_attn.q_proj": 3, "q_proj": 24, "^down_proj": 1, "down_proj": 5},
)

CASES = [
    LoraCase("linear and tokens", "llama", [dict(r=4, lora_alpha=12, target_modules=ATTENTION, tokens=TOKENS)]),
    LoraCase("tied and tokens", "llama-tied", [dict(target_modules=r".*\.(q|down)_proj", tokens=TOKENS)]),
    LoraCase(
        "embedding and head, two token sets",
        "llama",
        [dict(r=3, target_modules=["v_proj"], tokens={"embed_tokens": TOKENS, "lm_head": [5, 299]})],
    ),
    LoraCase("rs-LoRA", "llama", [dict(r=5, use_rslora=True, target_modules="all-linear", tokens=TOKENS)]),
    LoraCase("patterns", "llama", [dict(r=4, target_modules=["q_proj", "up_proj", "down_proj"], **PATTERNS)]),
    LoraCase("rs-LoRA and patterns", "llama", [dict(use_rslora=True, target_modules="all-linear", **PATTERNS)]),
    LoraCase("embedding", "llama", [dict(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])]),
    LoraCase("embedding of a tied model", "llama-tied", [dict(r=4, target_modules=["embed_tokens"])]),
    LoraCase("layers and exclusions", "llama", [dict(target_modules=ATTENTION, layers_to_transform=[1])]),
    LoraCase("exclusions", "llama", [dict(target_modules=ATTENTION, exclude_modules=r".*\.0\.self_attn\.o_proj")]),
    LoraCase("gaussian start", "llama", [dict(target_modules=ATTENTION, init_lora_weights="gaussian")]),
    LoraCase("orthogonal start", "llama", [dict(target_modules=ATTENTION, init_lora_weights="orthogonal")]),
    LoraCase(
        "several adapters",
        "llama",
        [dict(r=4, target_modules=ATTENTION, tokens=[300, 7]), dict(r=2, target_modules=["q_proj"], tokens=[42])],
    ),
    LoraCase("Conv1D", "gpt2", [dict(r=4, target_modules=CONV1D, tokens=TOKENS, fan_in_fan_out=True)]),
    LoraCase("Conv1D and embedding", "gpt2", [dict(r=4, target_modules=[*CONV1D, "wte"])]),
    LoraCase("Conv1D and linear", "gpt2-untied", [dict(r=4, target_modules=[*CONV1D, "lm_head"])]),
    LoraCase("bf16", "llama", [dict(r=4, target_modules=ATTENTION, tokens=TOKENS)], torch.bfloat16),
    LoraCase("bf16, rs-LoRA", "llama", [dict(r=4, use_rslora=True, target_modules=["up_proj"])], torch.bfloat16),
    LoraCase("bf16, embedding", "llama", [dict(r=4, target_modules=["embed_tokens", "q_proj"])], torch.bfloat16),
    LoraCase("bf16, Conv1D", "gpt2", [dict(r=4, target_modules=CONV1D, tokens=TOKENS)], torch.bfloat16),
    LoraCase(
        "bf16, several adapters",
        "llama",
        [dict(r=4, target_modules=ATTENTION), dict(r=2, target_modules=["q_proj"])],
        torch.bfloat16,
    ),
    LoraCase("f16", "llama", [dict(r=4, target_modules=ATTENTION, tokens=TOKENS)], torch.float16),
]
# PEFT cannot merge these from the file alone, or gives the weights a meaning of their own.
REFUSED = [
    (dict(use_dora=True), "use_dora"),
    (dict(lora_bias=True), "lora_bias"),
    (dict(init_lora_weights="pissa"), "init_lora_weights"),
    (dict(init_lora_weights="olora"), "init_lora_weights"),
    (dict(bias="all"), ".bias"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(alora_invocation_tokens=[3, 4]), "alora_invocation_tokens"),
]


def check_lora(cli, report, work: Path):
    for seed, (name, (cls, config)) in enumerate(MODELS.items()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            save_random_model(model_path(work, name, dtype), cls, config, seed=seed, dtype=dtype, max_shard_size="60KB")
    for number, case in enumerate(CASES):
        check_case(cli, report, case, model_path(work, case.model, case.dtype), work / f"case-{number}")
    check_refusals(cli, report, model_path(work, "llama", torch.float32), work / "refused")
    for name in ("llama", "llama-tied", "gemma2", "gpt2"):
        check_training(cli, report, model_path(work, name, torch.float32), work / f"trained-{name}")


def check_training(cli, report, model: Path, work: Path):
    """Weights of LoRA and rows train together as in PEFT, from the same start."""
    work.mkdir()
    what = f"LoRA, training of {model.name}:"
    generator = torch.Generator().manual_seed(5)
    lines = [torch.randint(VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(6)]
    examples = [{"input_ids": line[:8] + TOKENS} for line in lines]
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    metrics, start, ours, again = (work / name for name in ("metrics.jsonl", "start", "ours", "again"))
    options = dict(model=model, data=data, token_ids=",".join(map(str, TOKENS)), batch_size=3, seed=2)
    options |= dict(padding_idx="torch", lora_rank=4, lora_alpha=12, lora_targets="all-linear", weight_decay=0.1)
    cli("train", **options, out=start, steps=1, lr=0)
    summary = cli("train", **options, out=ours, steps=8, lr=1e-2, metrics=metrics)
    per_layer = 4 if model.name.startswith("gpt2") else 7
    report.equal(f"{what} layers", summary["lora_modules"], per_layer * SHAPE["num_hidden_layers"])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = PeftModel.from_pretrained(reference.load_model(model), start, is_trainable=True).eval()
    complaints = [str(warning.message) for warning in caught if "key" in str(warning.message)]
    report.none(f"{what} PEFT's warnings on keys", complaints)
    keys = reference.adapter_keys(trained)
    report.equal(f"{what} keys", sorted(reference.read_tensors(ours)), sorted(keys))
    losses = reference.train(trained, examples, 0, steps=8, batch_size=3, lr=1e-2, weight_decay=0.1)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    our_losses = [step["loss"] for step in steps if "step" in step]
    difference = max(abs(a - b) for a, b in zip(our_losses, losses, strict=True))
    report.within(f"{what} losses {losses[0]:.3f} to {losses[-1]:.3f}", difference, 2e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(again)
        loaded = PeftModel.from_pretrained(reference.load_model(model), ours).eval()
    mine, theirs = reference.read_tensors(ours), reference.read_tensors(again)
    difference = max((mine[name] - theirs[name]).abs().max().item() for name in theirs)
    report.within(f"{what} weights and rows", difference, 2e-3)
    ids = torch.tensor([example["input_ids"] for example in examples])
    logits = reference.forward(loaded, ids)["logits"]
    report.close(f"{what} logits", cli.forward(work, model, ids, adapter=ours)["logits"], logits, 1e-4)


def model_path(work: Path, name: str, dtype: torch.dtype) -> Path:
    return work / f"{name}-{str(dtype).removeprefix('torch.')}"


def make_adapter(model_path: Path, out: Path, *, seed: int, tokens=None, **options):
    """An adapter in which nothing is as it started."""
    torch.manual_seed(seed)
    config = LoraConfig(trainable_token_indices=tokens, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(reference.load_model(model_path, "auto"), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(out)


def merge_in_peft(model_path: Path, adapters: list[Path], out: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"adapter{number}" for number in range(len(adapters))]
        model = PeftModel.from_pretrained(reference.load_model(model_path, "auto"), adapters[0], names[0])
        for name, adapter in zip(names[1:], adapters[1:]):
            model.load_adapter(adapter, name)
        model.merge_and_unload(adapter_names=names).save_pretrained(out)


def check_case(cli, report, case: LoraCase, model: Path, work: Path):
    adapters = [work / f"adapter-{number}" for number in range(len(case.adapters))]
    for seed, (out, options) in enumerate(zip(adapters, case.adapters)):
        make_adapter(model, out, seed=seed, **options)
    merge_in_peft(model, adapters, work / "theirs")
    for adapter in adapters:
        fits = cli("verify", model=model, adapter=adapter)["fits"]
        report.equal(f"LoRA, {case.name}: fits, says verify", fits, True)
    merged = cli.merge(model, adapters, work / "ours", safe=True)
    base, ours = reference.read_tensors(model), reference.read_tensors(work / "ours")
    theirs = reference.read_tensors(work / "theirs")
    compare(report, case, base, ours, theirs, lora_tensors(adapters, base))
    changed = sorted(name for name in ours if not same_bits(ours[name], base[name]))
    report.equal(f"LoRA, {case.name}: tensors that changed", len(changed), len(merged["tensors"]))


def lora_tensors(adapters: list[Path], base: dict) -> set[str]:
    keys = {key for adapter in adapters for key in reference.read_tensors(adapter) if ".lora_" in key}
    names = {f"{key.removeprefix('base_model.model.').rpartition('.lora_')[0]}.weight" for key in keys}
    assert names <= set(base), names - set(base)
    return names


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def compare(report, case: LoraCase, base: dict, ours: dict, theirs: dict, lora: set[str]):
    others = set(theirs) - lora
    rest = ({name: side[name] for name in others if name in side} for side in (ours, theirs))
    report.equal_tensors(f"LoRA, {case.name}: rows and all other tensors", *rest)
    moved = min((theirs[name].float() - base[name].float()).abs().max().item() for name in lora)
    report.line(moved > 1e-2, f"LoRA, {case.name}: PEFT changed every weight", f"{moved:.1e} (above 1e-02)")
    if case.dtype == torch.float32:
        difference = max((ours[name].double() - theirs[name].double()).abs().max().item() for name in lora)
        report.within(f"LoRA, {case.name}: {len(lora)} weights", difference, F32)
        return
    steps = [(ordered(ours[name]) - ordered(theirs[name])).abs() for name in lora]
    furthest = max(step.max().item() for step in steps)
    report.line(furthest <= 1, f"LoRA, {case.name}: units in the last place", f"{furthest} (at most 1)")
    share = sum((step > 0).sum().item() for step in steps) / sum(step.numel() for step in steps)
    report.within(f"LoRA, {case.name}: share of {len(lora)} weights that differ", share, NEIGHBOURS)


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Halves as integers: neighbours differ by 1."""
    as_int = bits(x).int()
    return torch.where(as_int < 0, -32768 - as_int, as_int)


def check_refusals(cli, report, model: Path, work: Path):
    for number, (options, culprit) in enumerate(REFUSED):
        adapter = work / f"adapter-{number}"
        target = model
        if "lora_bias" in options or "bias" in options:
            target = work / "with-biases"
            if not target.exists():
                config = LlamaConfig(**SHAPE, attention_bias=True)
                save_random_model(target, LlamaForCausalLM, config, seed=9)
        make_adapter(target, adapter, seed=0, target_modules=["q_proj"], **options)
        said = cli.refusal("merge", model=target, adapter=adapter, out=work / "merged")
        written = (work / "merged").exists()
        report.line(culprit in said and not written, f"LoRA, {json.dumps(options)}: refused", said.splitlines()[0][-90:])
