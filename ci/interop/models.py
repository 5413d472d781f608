"""Small random models, made on the spot, and data for them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB_SIZE = 301
SHAPE = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(head_dim=12, sliding_window=6, query_pre_attn_scalar=12, tie_word_embeddings=True)
GPT2_SHAPE = dict(
    vocab_size=VOCAB_SIZE, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.15, eos_token_id=2
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,  # wavelengths 6, 29, 135, ...: one kept, one on the ramp, the rest stretched
)


@dataclass
class Case:
    """A model, and the tokens of it that train, in an order that is not sorted."""

    name: str
    model: Path
    tokens: list[int]
    padding_idx: str | None = None  # what --padding-idx says, if the padding token is among them
    prefix: str = ""  # what transformers puts before the names that are stored, but for the head's

    @property
    def config(self):
        return json.loads((self.model / "config.json").read_text())

    def named(self, tensors: dict) -> dict:
        """Tensors of the checkpoint by their names in transformers, without masks, which are no weights there."""
        return {
            name if name.startswith("lm_head.") else self.prefix + name: tensor
            for name, tensor in tensors.items()
            if not name.endswith(".attn.bias")
        }


def make_cases(work: Path, fixtures: Path) -> list[Case]:
    made = [
        ("llama-untied", LlamaForCausalLM, LlamaConfig(**SHAPE), {}),
        ("llama-tied", LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True), {}),
        ("mistral-window", MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=6), {}),
        (
            "llama3-rope-bias",
            LlamaForCausalLM,
            LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True),
            {},
        ),
        ("bf16-shards-tied", LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True), SHARDS),
        ("bf16-shards-untied", LlamaForCausalLM, LlamaConfig(**SHAPE), SHARDS),
        ("qwen3-bf16", Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=12), SHARDS),
        ("gemma2-bf16", Gemma2ForCausalLM, Gemma2Config(**SHAPE, **GEMMA), SHARDS),
        ("gemma3-tied", Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, **GEMMA, sliding_window_pattern=2), {}),
        ("gpt2-bf16", GPT2LMHeadModel, GPT2Config(**GPT2_SHAPE), SHARDS),
    ]
    cases = []
    for seed, (name, cls, config, options) in enumerate(made):
        save_random_model(work / name, cls, config, seed=seed, **options)
        cases.append(Case(name, work / name, [300, 7, 150, 42]))
    for name, whole, prefix in (("gpt2-bare", "gpt2-bf16", "transformer."), ("llama-bare", "llama-untied", "model.")):
        save_bare_model(work / name, work / whole, prefix)
        cases.append(Case(name, work / name, [300, 7, 150, 42], prefix=prefix))
    for name in ("llama_untied", "llama_tied"):
        model = fixtures / name / "base"
        config = json.loads((model / "config.json").read_text())
        last = config["vocab_size"] - 1
        cases.append(Case(f"fixture-{name}", model, [last, 12, config["pad_token_id"], 90], padding_idx="torch"))
    return cases


SHARDS = dict(dtype=torch.bfloat16, max_shard_size="30KB")


def save_random_model(path: Path, cls, config, *, seed: int, dtype=torch.float32, max_shard_size="1GB"):
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms start at 1 and biases at 0, which would hide that they are used.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)


def save_bare_model(path: Path, whole: Path, prefix: str):
    """The same model, stored as the Hub's gpt2 is: without the prefix of its class, with the causal masks of GPT-2."""
    path.mkdir()
    (path / "config.json").write_text((whole / "config.json").read_text())
    tensors = {
        name.removeprefix(prefix): tensor
        for shard in whole.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    if prefix == "transformer.":
        size = GPT2_SHAPE["n_positions"]
        for layer in range(GPT2_SHAPE["n_layer"]):
            tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def random_ids(case: Case, rows: int, length: int, *, seed: int) -> torch.Tensor:
    """[rows, length], about half of them tokens that train."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, case.config["vocab_size"], (rows, length), generator=generator)
    trained = torch.tensor(case.tokens)[torch.randint(len(case.tokens), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.5, trained, ids)


def make_examples(case: Case, count: int, *, seed: int) -> list[dict]:
    """Lines of different lengths; every third has labels, some of which are -100."""
    examples = []
    for index, row in enumerate(random_ids(case, count, 24, seed=seed)):
        ids = row[: 9 + (5 * index) % 16].tolist()
        example = {"input_ids": ids}
        if index % 3 == 0:
            example["labels"] = [-100 if place % 4 == 2 else id for place, id in enumerate(ids)]
        examples.append(example)
    return examples


def write_lines(path: Path, examples: list[dict]) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


@dataclass
class Architecture:
    """A model of some architecture, smaller still: only PEFT and the library's files meet it."""

    name: str
    path: Path
    cls: type
    lora_targets: list[str] | str  # what LoRA adapts
    tied: list[str]  # modules that share the input embedding's table
    decodes: bool = False  # an encoder and a decoder

    vocab_size = 60

    def load(self, dtype=torch.float32):
        return self.cls.from_pretrained(self.path, dtype=dtype, attn_implementation="eager").eval()

    def inputs(self, vocab_size: int) -> dict[str, torch.Tensor]:
        """Every token of the vocabulary, in four rows."""
        ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(5))
        ids = torch.cat([ids, ids[: -vocab_size % 4]]).view(4, -1)
        return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if self.decodes else {})


def make_architectures(work: Path) -> list[Architecture]:
    size = Architecture.vocab_size
    llama = dict(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
    )
    bert = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    bart = dict(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        init_std=0.15,
    )
    encoder_decoder = ["encoder.embed_tokens", "decoder.embed_tokens"]
    made = [
        ("llama-untied", LlamaForCausalLM, LlamaConfig(**llama), r".*\.(q_proj|down_proj)", []),
        (
            "llama-tied",
            LlamaForCausalLM,
            LlamaConfig(**llama, tie_word_embeddings=True),
            r".*\.(q_proj|down_proj)",
            ["lm_head"],
        ),
        (
            "gpt2",
            GPT2LMHeadModel,
            GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.15),
            ["c_attn"],
            ["lm_head"],
        ),
        (
            "bert",
            BertForMaskedLM,
            BertConfig(vocab_size=size, **bert, max_position_embeddings=32, initializer_range=0.15),
            ["query"],
            ["cls.predictions.decoder"],
        ),
        (
            "t5",
            T5ForConditionalGeneration,
            T5Config(
                vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
            ),
            ["q"],
            ["lm_head", *encoder_decoder],
        ),
        (
            "bart",
            BartForConditionalGeneration,
            BartConfig(vocab_size=size, **bart),
            ["q_proj"],
            ["lm_head", *(f"model.{path}" for path in encoder_decoder)],
        ),
    ]
    architectures = []
    for seed, (name, cls, config, lora_targets, tied) in enumerate(made):
        save_random_model(work / name, cls, config, seed=seed)
        architectures.append(Architecture(name, work / name, cls, lora_targets, tied, config.is_encoder_decoder))
    return architectures
