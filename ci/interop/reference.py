"""What PEFT and transformers do."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROWS = "default"  # the name that PEFT gives an adapter without a name


def load_model(path: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def load_adapter(model_path: Path, adapter: Path, dtype=torch.float32):
    """The model with the adapter, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load_model(model_path, dtype), adapter).eval()
    return model, [str(warning.message) for warning in caught]


def new_adapter(model_path: Path, tokens: list[int]):
    """A fresh adapter on the model, and the warnings on the way."""
    base = load_model(model_path)
    embedding = base.get_input_embeddings()
    path = next(path for path, module in base.named_modules() if module is embedding)
    config = TrainableTokensConfig(
        token_indices=tokens, target_modules=[path.split(".")[-1]], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, config).eval()
    return model, [str(warning.message) for warning in caught]


def embedding_layer(model: PeftModel):
    return model.get_base_model().get_input_embeddings()


def rows_of(model: PeftModel) -> torch.Tensor:
    return embedding_layer(model).trainable_tokens_delta[ROWS].detach().clone()


def adapter_keys(model: PeftModel) -> set[str]:
    """The names that PEFT looks for in a file, and writes."""
    return set(get_peft_model_state_dict(model, save_embedding_layers=False))


@torch.no_grad()
def forward(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Embeddings, as the embedding module returns them, and logits."""
    seen = {}
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _input, y: seen.update(embeddings=y))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return {"embeddings": seen["embeddings"], "logits": logits}


def collate(examples: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded at the end, masked, padding no target."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(values, filler):
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(e["input_ids"], pad_id) for e in examples]),
        "labels": torch.tensor([padded(e.get("labels", e["input_ids"]), -100) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * len(e["input_ids"]), 0) for e in examples]),
    }


def loss(model, examples: list[dict], pad_id: int) -> torch.Tensor:
    return model(**collate(examples, pad_id), use_cache=False).loss


def train(
    model: PeftModel, examples: list[dict], pad_id: int, *, steps: int, batch_size: int, lr: float, weight_decay: float
) -> list[float]:
    """The loss of each step; step s takes the lines after those of step s - 1, and begins anew at the end."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    losses = []
    for step in range(steps):
        lines = [examples[(step * batch_size + place) % len(examples)] for place in range(batch_size)]
        optimizer.zero_grad()
        value = loss(model, lines, pad_id)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def save_merged(model_path: Path, adapter: Path, out: Path):
    """Merges into the checkpoint's own dtype, and saves."""
    model, _ = load_adapter(model_path, adapter, dtype="auto")
    model.merge_and_unload().save_pretrained(out)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model or adapter directory."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
