"""Adapters of every kind, from PEFT to this library and back, and the other way round.

The library reads into its own types and writes from them: the program `adapters`, an example of crates/format. PEFT's
models are made, saved and loaded in this process, so that equal weights give logits of equal bits."""

import json
import subprocess
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import peft
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from models import Architecture, make_architectures

FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENS, MORE = [58, 7, 40], [3, 59]
GROWN_BY, NEW_TOKENS = 3, [62, 7, 61]  # row 60 is new, but not trained
HEAD = "base_model.model.lm_head.weight"
LOST_HEAD = 0.1


class Adapters:
    """The program of crates/format/examples/adapters."""

    def __init__(self, binary: Path):
        self.binary = str(binary)

    def __call__(self, *arguments):
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"adapters {' '.join(map(str, arguments))}: {done.stderr.strip()}")

    def rewrite(self, source: Path, out: Path) -> Path:
        self("rewrite", source, out)
        return out

    def make(self, spec: dict, out: Path) -> Path:
        path = out.with_suffix(".json")
        path.write_text(json.dumps(spec))
        self("make", path, out)
        return out


@dataclass
class Trip:
    """Adapters of one model, by name."""

    name: str
    model: str
    adapters: dict
    grown: bool = False
    save: object = "auto"  # save_embedding_layers
    dtype: torch.dtype = torch.float32

    @property
    def stores_tables(self) -> bool:
        return self.grown and self.save is not False

    @property
    def is_lora(self) -> bool:
        return all(isinstance(config, LoraConfig) for config in self.adapters.values())

    @property
    def has_plain_head(self) -> bool:
        """Whether the head has grown too, and no rows of it train. With LoRA, PEFT stores it; else it leaves it out."""
        if not self.stores_tables or self.model != "llama-untied":
            return False
        return not self.is_lora or isinstance(self.adapters["default"].trainable_token_indices, list)

    @property
    def lacks_head(self) -> bool:
        return self.has_plain_head and not self.is_lora

    @property
    def ignored_by_peft(self) -> list[str]:
        """With a tied model's tables, PEFT stores rows of LoRA twice, and does not look for the second. We do not."""
        twice = self.stores_tables and self.model == "llama-tied" and self.is_lora
        return ["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] if twice else []


def rows_alone(tokens=TOKENS, target=None, **fields) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=list(tokens), target_modules=target, **fields)


def make_trips(architectures: dict[str, Architecture]) -> list[Trip]:
    """Every kind of adapter, on the models where they differ."""

    def lora(model: str, tokens, **fields) -> LoraConfig:
        fields = dict(r=3, lora_alpha=5, target_modules=architectures[model].lora_targets) | fields
        return LoraConfig(trainable_token_indices=tokens, **fields)

    causal = dict(task_type="CAUSAL_LM")
    patterns = dict(
        rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 7.5}, use_rslora=True, lora_dropout=1e-05
    )
    both = {"embed_tokens": TOKENS, "lm_head": MORE}
    same = {"embed_tokens": TOKENS, "lm_head": TOKENS}
    trips = [Trip(f"standalone, {name}", name, {"default": rows_alone()}) for name in architectures]
    trips += [Trip(f"LoRA list, {name}", name, {"default": lora(name, TOKENS)}) for name in architectures]
    trips += [
        Trip("standalone list", "llama-tied", {"default": rows_alone(target=["embed_tokens"], **causal)}),
        Trip("standalone pattern", "llama-untied", {"default": rows_alone(target=r".*embed_tok\w+", **causal)}),
        Trip("standalone, two tables", "llama-untied", {"default": rows_alone(target=r"model\.embed_tokens|lm_head")}),
        Trip("standalone, random start", "gpt2", {"default": rows_alone(init_weights=False)}),
        Trip("standalone, bf16 rows", "llama-tied", {"default": rows_alone()}, dtype=torch.bfloat16),
        Trip("LoRA list, bf16 rows", "llama-untied", {"default": lora("llama-untied", TOKENS)}, dtype=torch.bfloat16),
        Trip("LoRA with patterns", "llama-untied", {"default": lora("llama-untied", TOKENS, **causal, **patterns)}),
        Trip("LoRA dict", "llama-untied", {"default": lora("llama-untied", both)}),
        Trip("LoRA dict by path", "llama-untied", {"default": lora("llama-untied", {"model.embed_tokens": MORE})}),
        Trip("LoRA dict, same tokens", "llama-tied", {"default": lora("llama-tied", same)}),
        Trip(
            "LoRA dict, tying ensured", "llama-tied", {"default": lora("llama-tied", same, ensure_weight_tying=True)}
        ),
    ]
    several = ("default", "deutsch", "v2-é")
    for kind, names in (("default and named", several), ("only named", several[1:])):
        trips += [
            Trip(f"standalone, {kind}", "llama-untied", {n: rows_alone([at, *TOKENS]) for at, n in enumerate(names)}),
            Trip(
                f"LoRA, {kind}", "llama-untied", {n: lora("llama-untied", [at, *MORE]) for at, n in enumerate(names)}
            ),
        ]
    trips.append(Trip("standalone tied, only named", "llama-tied", {"deutsch": rows_alone()}))
    trips.append(Trip("grown LoRA list", "llama-untied", {"default": lora("llama-untied", NEW_TOKENS)}, grown=True))
    for name in ("llama-tied", "llama-untied"):
        new = {"embed_tokens": NEW_TOKENS, "lm_head": [60, 7]} if name == "llama-untied" else NEW_TOKENS
        for save in ("auto", True, False):
            title = f"save_embedding_layers={save}, {name}"
            trips += [
                Trip(f"grown, {title}", name, {"default": rows_alone(NEW_TOKENS)}, grown=True, save=save),
                Trip(f"grown LoRA, {title}", name, {"default": lora(name, new)}, grown=True, save=save),
            ]
    return trips


class Loaded:
    """A PEFT model, and what PEFT said while it was made or loaded."""

    def __init__(self, model: PeftModel, said: list[str], unexpected: list[str], missing: list[str]):
        self.model, self.warnings, self.unexpected, self.missing = model.eval(), said, unexpected, missing


@contextmanager
def listening():
    """Collects warnings and the results of loading state into models."""
    results, warned = [], []
    load = peft.peft_model.set_peft_model_state_dict

    def recorded(*args, **kwargs):
        results.append(load(*args, **kwargs))
        return results[-1]

    with (
        warnings.catch_warnings(record=True) as warned,
        mock.patch.object(peft.peft_model, "set_peft_model_state_dict", recorded),
    ):
        warnings.simplefilter("always")
        yield results, warned


class TripChecks:
    def __init__(self, trip: Trip, architecture: Architecture, adapters: Adapters, report, work: Path):
        self.trip, self.architecture, self.work = trip, architecture, work
        self.adapters, self.report = adapters, report
        self.inputs = architecture.inputs(vocab_size=architecture.vocab_size + (GROWN_BY if trip.grown else 0))
        self.model = architecture.path
        if trip.grown:
            self.model = work / "grown"
            self.base(seed=1).save_pretrained(self.model)

    def what(self, text: str) -> str:
        return f"{self.trip.name}: {text}"

    def base(self, seed: int):
        """The model; if it has grown, with new rows by the seed."""
        model = self.architecture.load(self.trip.dtype)
        if self.trip.grown:
            torch.manual_seed(seed)
            model.resize_token_embeddings(self.architecture.vocab_size + GROWN_BY, mean_resizing=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # away from the file's map: alike in memory, alike in bits
        return model

    def create(self) -> Loaded:
        """PEFT's own adapters, with values as if trained."""
        (first, config), *others = self.trip.adapters.items()
        cast = self.trip.dtype == torch.float32
        with listening() as (_, warned):
            model = get_peft_model(self.base(seed=1), config, adapter_name=first, autocast_adapter_dtype=cast)
            for name, config in others:
                model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_" in name or "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return Loaded(model, [str(one.message) for one in warned], [], [])

    def load(self, directory: Path, seed: int) -> Loaded:
        cast = self.trip.dtype == torch.float32
        first, *others = self.trip.adapters
        with listening() as (results, warned):
            model = PeftModel.from_pretrained(
                self.base(seed), self.at(directory, first), adapter_name=first, autocast_adapter_dtype=cast
            )
            results += [model.load_adapter(self.at(directory, name), name) for name in others]
        missing = []
        for name in self.trip.adapters:
            in_file = set(load_file(self.at(directory, name) / FILES[1]))
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            missing += sorted(set(state) - in_file) + [key for one in results for key in one.missing_keys]
        unexpected = [key for one in results for key in one.unexpected_keys]
        return Loaded(model, [str(one.message) for one in warned], unexpected, missing)

    def save(self, model: PeftModel, name: str) -> Path:
        out = self.work / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # auto says what it decides
            model.save_pretrained(out, save_embedding_layers=self.trip.save)
        return out

    @staticmethod
    def at(directory: Path, name: str) -> Path:
        return directory if name == "default" else directory / name

    @torch.no_grad()
    def logits(self, loaded: Loaded) -> dict[str, torch.Tensor]:
        """Of each adapter alone."""
        found = {}
        for name in self.trip.adapters:
            loaded.model.set_adapter(name)
            found[name] = loaded.model(**self.inputs, use_cache=False).logits
        return found

    def run(self):
        created = self.create()
        before = self.logits(created)
        theirs = self.save(created.model, "theirs")
        rewritten = self.adapters.rewrite(theirs, self.work / "rewritten")
        self.same_files("PEFT's, rewritten by us", rewritten, theirs)
        plain = self.adapters.make(self.spec(theirs, metadata=False), self.work / "plain")
        if self.trip.ignored_by_peft:
            self.same_content("made by us without metadata, as PEFT's", plain, theirs)
            only_theirs = set(self.tensors(theirs, "default")) - set(self.tensors(plain, "default"))
            what = self.what("written by PEFT alone, and ignored by it")
            self.report.equal(what, sorted(only_theirs), self.trip.ignored_by_peft)
        else:
            self.same_files("made by us without metadata, as PEFT's", plain, theirs)
        ours = self.adapters.make(self.spec(theirs, metadata=True), self.work / "ours")
        self.same_content("made by us, and PEFT's", ours, theirs)
        self.same_files("ours, rewritten by us", self.adapters.rewrite(ours, self.work / "ours-rewritten"), ours)
        # The tables that the file holds win over whatever rows the model grew by; what it lacks must be the model's.
        seed = 2 if self.trip.stores_tables and not self.trip.lacks_head else 1
        self.check_through_peft("PEFT -> us -> PEFT", rewritten, created, before, seed)
        self.check_through_peft("us -> PEFT -> us", ours, created, before, seed)
        if self.trip.lacks_head:
            self.check_whole_head(theirs, created, before)

    def check_through_peft(self, way: str, source: Path, created: Loaded, before: dict, seed: int):
        """PEFT loads what we wrote, computes the same, and saves the same."""
        slug = "".join(c for c in way if c.isalpha())
        loaded = self.check_loading(way, source, created, before, seed)
        saved = self.save(loaded.model, f"{slug}-saved")
        self.same_content(f"{way}: saved by PEFT", saved, source)
        again = self.adapters.rewrite(saved, self.work / f"{slug}-again")
        self.same_files(f"{way}: saved by PEFT, rewritten", again, saved)
        self.check_loading(f"{way}, once more", again, created, before, seed)

    def check_loading(self, way: str, source: Path, created: Loaded, before: dict, seed: int) -> Loaded:
        loaded = self.load(source, seed)
        new = [warning for warning in loaded.warnings if warning not in created.warnings]
        self.report.none(self.what(f"{way}: PEFT's warnings"), new)
        self.report.none(self.what(f"{way}: keys that PEFT misses"), loaded.missing)
        ignored = [key for key in self.trip.ignored_by_peft if key in self.tensors(source, "default")]
        self.report.equal(self.what(f"{way}: keys that PEFT ignores"), loaded.unexpected, ignored)
        self.report.equal_tensors(self.what(f"{way}: logits"), self.logits(loaded), before)
        return loaded

    def check_whole_head(self, theirs: Path, created: Loaded, before: dict):
        """With the head in the file, the model may have grown by any rows; PEFT leaves it out of its own files."""
        spec = self.spec(theirs, metadata=True, add_head=True)
        ours = self.adapters.make(spec, self.work / "with-head")
        way = "head stored by us"
        self.same_files(f"{way}, rewritten", self.adapters.rewrite(ours, self.work / "with-head-rewritten"), ours)
        loaded = self.check_loading(way, ours, created, before, seed=2)
        saved = self.save(loaded.model, "head-saved")
        left_out = set(load_file(ours / FILES[1])) - set(load_file(saved / FILES[1]))
        self.report.equal(self.what(f"{way}: left out by PEFT"), sorted(left_out), [HEAD])
        lost = (self.logits(self.load(theirs, seed=2))["default"] - before["default"]).abs().max().item()
        self.report.line(lost > LOST_HEAD, self.what("PEFT's own: logits differ"), f"{lost:.2f} (above {LOST_HEAD})")

    def same_files(self, what: str, ours: Path, theirs: Path):
        """The same adapters, byte for byte."""
        names, expected = ({p.parent.relative_to(at) for p in at.rglob(FILES[0])} for at in (ours, theirs))
        if names != expected:
            self.report.equal(self.what(f"{what}: directories"), sorted(map(str, names)), sorted(map(str, expected)))
            return
        files = [name / file for name in sorted(names) for file in FILES]
        differ = [str(file) for file in files if (ours / file).read_bytes() != (theirs / file).read_bytes()]
        size = sum((theirs / file).stat().st_size for file in files)
        self.report.line(
            not differ, self.what(what), f"{len(differ)} of {len(files)} files differ, {size} bytes {differ or ''}"
        )

    def same_content(self, what: str, ours: Path, theirs: Path):
        """The same tensors and configs; metadata may differ."""
        tensors = [
            {
                f"{name}: {key}": tensor
                for name in self.trip.adapters
                for key, tensor in self.tensors(at, name).items()
                if key not in self.trip.ignored_by_peft
            }
            for at in (ours, theirs)
        ]
        self.report.equal_tensors(self.what(f"{what}: tensors"), *tensors)
        texts = [[(self.at(at, name) / FILES[0]).read_text() for name in self.trip.adapters] for at in (ours, theirs)]
        changed = [
            f"{name}: {key}"
            for name, a, b in zip(self.trip.adapters, *([json.loads(text) for text in side] for side in texts))
            for key in a.keys() | b.keys()
            if a.get(key) != b.get(key) or (key in a) != (key in b)
        ]
        if not changed and texts[0] != texts[1]:
            changed = ["how the file is spelled"]
        self.report.none(self.what(f"{what}: fields of the config that differ"), changed)

    def tensors(self, directory: Path, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.at(directory, name) / FILES[1])

    def spec(self, theirs: Path, *, metadata: bool, add_head=False) -> dict:
        """What to ask for so that it has the rows, other tensors and options of PEFT's adapters; names of rows, copies
        of them, stored tables and all other fields are the library's own."""
        return {
            "model": str(self.model),
            "adapters": {name: self.wanted(theirs, name) for name in self.trip.adapters},
            "metadata": metadata,
            "save_embedding_layers": self.trip.save,
            "named_vocab_size": self.architecture.vocab_size,
            "save_head": add_head or (self.trip.has_plain_head and self.trip.is_lora),
        }

    def wanted(self, theirs: Path, name: str) -> dict:
        config = json.loads((self.at(theirs, name) / FILES[0]).read_text())
        is_lora = config["peft_type"] == "LORA"
        tokens = config.pop("trainable_token_indices" if is_lora else "token_indices")
        tail = (".token_adapter" if is_lora else "") + ".trainable_tokens_delta"
        tensors, modules = {}, {}
        for key, tensor in self.tensors(theirs, name).items():
            path = key.removeprefix("base_model.model.")
            if path.endswith(tail):
                path = path.removesuffix(tail)
                ids = self.own_tokens(path, tokens)
                if ids is None:
                    continue  # a copy for a tied module
                tensors[path], modules[path] = tensor, ids
            elif ".base_layer." not in key and key != HEAD:  # those are the library's to store
                tensors[key] = tensor
        if isinstance(tokens, dict) and set(tokens) != {path.rpartition(".")[2] for path in modules}:
            config["trainable_token_indices"] = tokens
        defaults = (LoraConfig if is_lora else TrainableTokensConfig)().to_dict() | {"task_type": "CAUSAL_LM"}
        file = self.work / f"tensors-{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        written = {"inference_mode", "peft_type"}
        return {
            "tensors": str(file),
            "modules": modules,
            "peft_type": config["peft_type"],
            "fields": {key: value for key, value in config.items() if key not in written and value != defaults[key]},
        }

    def own_tokens(self, path: str, tokens) -> list[int] | None:
        tied = self.architecture.tied
        if isinstance(tokens, list):
            return None if path in tied else tokens
        return next(ids for key, ids in tokens.items() if path == key or path.endswith("." + key))


def check_round_trips(adapters: Path, report, work: Path, guarded):
    architectures = {one.name: one for one in make_architectures(work / "models")}
    for at, trip in enumerate(make_trips(architectures)):
        directory = work / f"trip-{at}"
        directory.mkdir()
        checks = lambda: TripChecks(trip, architectures[trip.model], Adapters(adapters), report, directory).run()
        guarded(report, trip.name, checks)
