#!/usr/bin/env python3
"""Compares the command line and the library's files with PEFT and transformers, live.

    check.py BINARY ADAPTERS [CASE...]

Every check prints a line with the number measured. The exit status is 1 if any fails."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both sides on the CPU

import peft
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference
from add_tokens import check_add_tokens
from base_models import check_base_models
from cli import Cli
from decoders import check_decoders
from encoder_lora import check_encoder_lora
from encoders import ENCODERS, check_encoders
from extract import check_extract
from lora import check_lora
from models import Case, make_cases, make_examples, random_ids, write_lines
from roundtrips import check_round_trips
from split import check_split

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "peft"

STEPS, BATCH_SIZE, LR, WEIGHT_DECAY = 10, 4, 1e-2, 0.5

LORA = "lora"  # the name of its cases, together
LOGITS, LOSS_WHILE_TRAINING, TRAINED_ROWS, LOSS = 1e-4, 2e-4, 2e-3, 1e-5


class Report:
    """Prints checks as they are made, and counts them."""

    def __init__(self):
        self.passed = self.failed = 0

    def line(self, ok: bool, what: str, measured: str):
        print(f"{'ok  ' if ok else 'FAIL'}  {what:<78} {measured}", flush=True)
        if ok:
            self.passed += 1
        else:
            self.failed += 1

    def within(self, what: str, difference: float, limit: float):
        # A NaN is within nothing.
        self.line(difference <= limit, what, f"{difference:.1e} (at most {limit:.1g})")

    def close(self, what: str, ours: torch.Tensor, theirs: torch.Tensor, limit: float):
        if ours.shape != theirs.shape:
            self.line(False, what, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        else:
            self.within(what, (ours.double() - theirs.double()).abs().max().item(), limit)

    def equal_bits(self, what: str, ours: torch.Tensor, theirs: torch.Tensor):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            self.line(False, what, f"{ours.dtype} {tuple(ours.shape)} and {theirs.dtype} {tuple(theirs.shape)}")
        else:
            differing = differing_elements(ours, theirs)
            self.line(differing == 0, what, f"{differing} of {ours.numel()} elements differ")

    def equal_tensors(self, what: str, ours: dict, theirs: dict):
        """Same names, types, shapes and bits."""
        names = set(ours) ^ set(theirs)
        if names:
            self.line(False, what, f"only one side has {sorted(names)}")
            return
        differ = [
            name
            for name in ours
            if (ours[name].shape, ours[name].dtype) != (theirs[name].shape, theirs[name].dtype)
            or differing_elements(ours[name], theirs[name])
        ]
        self.line(not differ, what, f"{len(differ)} of {len(ours)} tensors differ {' '.join(differ)}".rstrip())

    def none(self, what: str, found):
        found = list(found)
        self.line(not found, what, f"{len(found)}" + (f": {found}" if found else ""))

    def equal(self, what: str, ours, theirs):
        self.line(ours == theirs, what, f"{ours}" if ours == theirs else f"{ours}, not {theirs}")


def differing_elements(a: torch.Tensor, b: torch.Tensor) -> int:
    as_bytes = [x.detach().contiguous().flatten().view(torch.uint8).view(x.numel(), -1) for x in (a, b)]
    return int((as_bytes[0] != as_bytes[1]).any(dim=1).sum())


def root_mean_square(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


class CaseChecks:
    """All checks of one model."""

    def __init__(self, case: Case, cli: Cli, report: Report, work: Path):
        self.case, self.cli, self.report, self.work = case, cli, report, work
        self.pad_id = case.config.get("pad_token_id") or 0
        self.ids = random_ids(case, 3, 20, seed=1)
        self.examples = make_examples(case, 18, seed=2)  # 10 steps of 4 begin anew twice, inside a batch
        self.data = write_lines(work / "train.jsonl", self.examples)
        self.held_out = make_examples(case, 11, seed=3)
        self.token_ids = ",".join(map(str, case.tokens))
        self.usual_warnings = []  # those of a fresh adapter, which say nothing of a file

    def run(self):
        ours, theirs = self.check_training()
        for origin, adapter in (("our adapter", ours), ("PEFT's adapter", theirs)):
            self.check_loading(origin, adapter)
            self.check_forward(origin, adapter)
            self.check_merge(origin, adapter)
            self.check_round_trip(origin, adapter)
            self.check_eval(origin, adapter)
        self.check_forward("no adapter", None)
        self.check_eval("no adapter", None)
        self.check_init()

    def what(self, text: str) -> str:
        return f"{self.case.name}: {text}"

    def check_training(self) -> tuple[Path, Path]:
        """Trains on both sides, and returns both adapters."""
        ours, theirs, metrics = self.work / "ours", self.work / "theirs", self.work / "metrics.jsonl"
        self.cli(
            "train",
            model=self.case.model,
            data=self.data,
            token_ids=self.token_ids,
            out=ours,
            steps=STEPS,
            batch_size=BATCH_SIZE,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            padding_idx=self.case.padding_idx,
            metrics=metrics,
        )
        model, self.usual_warnings = reference.new_adapter(self.case.model, self.case.tokens)
        start = reference.rows_of(model)
        losses = reference.train(
            model,
            self.examples,
            self.pad_id,
            steps=STEPS,
            batch_size=BATCH_SIZE,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
        )
        model.save_pretrained(theirs)
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        our_losses = [step["loss"] for step in steps if "step" in step]
        self.report.equal(self.what("training: steps"), len(our_losses), len(losses))
        relative = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(our_losses, losses))
        self.report.within(self.what("training: losses"), relative, LOSS_WHILE_TRAINING)
        our_rows = reference.rows_of(self.load(ours))
        rows = reference.rows_of(model)
        self.report.close(self.what("training: rows"), our_rows, rows, TRAINED_ROWS)
        moved = (rows - start).abs().max().item()
        self.report.line(moved > 0.05, self.what("training: rows moved"), f"{moved:.2e} (above 5e-02)")
        return ours, theirs

    def check_loading(self, origin: str, adapter: Path):
        """PEFT finds all that it looks for, and nothing else; the program takes the adapter as fitting."""
        model, warnings = reference.load_adapter(self.case.model, adapter)
        in_file, looked_for = set(reference.read_tensors(adapter)), reference.adapter_keys(model)
        new = [warning for warning in warnings if warning not in self.usual_warnings]
        self.report.none(self.what(f"{origin}: PEFT's warnings on loading"), new)
        self.report.none(self.what(f"{origin}: keys that PEFT misses"), looked_for - in_file)
        self.report.none(self.what(f"{origin}: keys that PEFT ignores"), in_file - looked_for)
        config = model.peft_config["default"]
        self.report.equal(self.what(f"{origin}: token_indices in PEFT"), config.token_indices, self.case.tokens)
        verified = self.cli("verify", model=self.case.model, adapter=adapter)
        self.report.equal(self.what(f"{origin}: fits, says verify"), verified["fits"], True)

    def check_forward(self, origin: str, adapter: Path | None):
        exact = None
        for name, dtype in self.dtypes():
            theirs = reference.forward(self.load(adapter, dtype), self.ids)
            ours = self.cli.forward(self.work, self.case.model, self.ids, adapter=adapter, dtype=name)
            what = self.what(f"{origin}: {name} ")
            self.report.equal_bits(what + "embeddings", ours["embeddings"], theirs["embeddings"].float())
            if name == "f32":
                exact = theirs["logits"]
                self.report.close(what + "logits", ours["logits"], exact, LOGITS)
            else:
                # Each rounds at its own places, so the measure is what rounding does to transformers' own.
                limit = 1.5 * root_mean_square(theirs["logits"].float() - exact)
                self.report.within(what + "logits (rms)", root_mean_square(ours["logits"] - theirs["logits"]), limit)

    def load(self, adapter: Path | None, dtype=torch.float32):
        if adapter is None:
            return reference.load_model(self.case.model, dtype)
        return reference.load_adapter(self.case.model, adapter, dtype)[0]

    def dtypes(self):
        yield "f32", torch.float32
        if self.case.config["dtype"] == "bfloat16":
            yield "bf16", torch.bfloat16

    def check_merge(self, origin: str, adapter: Path):
        ours, theirs = self.work / "merged-ours", self.work / "merged-theirs"
        self.cli("merge", model=self.case.model, adapter=adapter, out=ours, force=True)
        reference.save_merged(self.case.model, adapter, theirs)
        stored = reference.read_tensors(ours)
        names = set(stored) ^ set(reference.read_tensors(self.case.model))
        self.report.none(self.what(f"{origin}: merged tensors by other names"), names)
        tensors = self.case.named(stored)
        self.report.equal_tensors(self.what(f"{origin}: merged tensors"), tensors, reference.read_tensors(theirs))
        model, info = AutoModelForCausalLM.from_pretrained(
            ours, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        complaints = [f"{kind}: {names}" for kind, names in info.items() if names]
        self.report.none(self.what(f"{origin}: transformers on loading the merged model"), complaints)
        logits = reference.forward(model.eval(), self.ids)["logits"]
        expected = reference.forward(reference.load_model(theirs), self.ids)["logits"]
        self.report.close(self.what(f"{origin}: merged logits in transformers"), logits, expected, LOSS)
        own = self.cli.forward(self.work, ours, self.ids)["logits"]
        self.report.close(self.what(f"{origin}: merged logits"), own, expected, LOGITS)

    def check_round_trip(self, origin: str, adapter: Path):
        """Through PEFT and back: the same rows, ids, and outputs."""
        again = self.work / "again"
        self.load(adapter).save_pretrained(again)
        before, after = reference.read_tensors(adapter), reference.read_tensors(again)
        self.report.equal_tensors(self.what(f"{origin}: rows after PEFT saved them"), before, after)
        indices = [json.loads((at / "adapter_config.json").read_text())["token_indices"] for at in (again, adapter)]
        self.report.equal(self.what(f"{origin}: token_indices after PEFT saved them"), *indices)
        outputs = [self.cli.forward(self.work, self.case.model, self.ids, adapter=at) for at in (again, adapter)]
        self.report.equal_tensors(self.what(f"{origin}: outputs after PEFT saved it"), *outputs)

    @torch.no_grad()
    def check_eval(self, origin: str, adapter: Path | None):
        data = write_lines(self.work / "held-out.jsonl", self.held_out)
        ours = self.cli("eval", model=self.case.model, adapter=adapter, data=data, batch_size=4)
        theirs = reference.loss(self.load(adapter), self.held_out, self.pad_id).item()
        self.report.within(self.what(f"{origin}: eval, loss {theirs:.4f}"), abs(ours["loss"] - theirs), LOSS)

    def check_init(self):
        """A new adapter changes nothing in PEFT, bit for bit."""
        adapter = self.work / "init"
        self.cli("init", model=self.case.model, token_ids=self.token_ids, out=adapter)
        self.check_loading("init", adapter)
        for name, dtype in self.dtypes():
            before = reference.forward(self.load(None, dtype), self.ids)
            after = reference.forward(self.load(adapter, dtype), self.ids)
            self.report.equal_bits(self.what(f"init: {name} logits in PEFT"), after["logits"], before["logits"])


def check_tokenizer(cli: Cli, report: Report, work: Path):
    model = FIXTURES / "llama_untied" / "base"
    tokenizer = AutoTokenizer.from_pretrained(model)
    strings = {id: tokenizer.convert_ids_to_tokens(id) for id in range(len(tokenizer))}
    single = {
        id: string
        for id, string in strings.items()
        if "," not in string and tokenizer.encode(string, add_special_tokens=False) == [id]
    }
    report.line(len(single) > 200, "tokenizer: tokens that their strings encode to", f"{len(single)} (above 200)")
    made = cli("init", model=model, tokens=",".join(single.values()), out=work / "by-strings")
    wrong = [string for (id, string), ours in zip(single.items(), made["token_indices"]) if id != ours]
    report.equal("tokenizer: tokens resolved", len(made["token_indices"]), len(single))
    report.none("tokenizer: tokens resolved to another id", wrong)
    named = zip(made["tokens"], single.values())
    report.none("tokenizer: tokens named otherwise", [ours for ours, theirs in named if ours != theirs])
    several = f"{single[12]} {single[13]}"
    for string in ("no-such-token", several):
        said = cli.refusal("init", model=model, tokens=string, out=work / "refused")
        report.line(string in said, f"tokenizer: '{string}' refused", said.splitlines()[0].removeprefix("error: "))
    check_text(cli, report, work, model, tokenizer, list(single.values()))


@torch.no_grad()
def check_text(cli: Cli, report: Report, work: Path, model: Path, tokenizer, words: list[str]):
    """Text means the same ids to both."""
    texts = [" ".join(words[start : start + 9 + start % 5]) for start in range(0, len(words) - 14, 14)]
    data = write_lines(work / "text.jsonl", [{"text": text} for text in texts])
    ours = cli("eval", model=model, data=data, batch_size=5)
    examples = [{"input_ids": tokenizer(text).input_ids} for text in texts]
    theirs = reference.loss(reference.load_model(model), examples, tokenizer.pad_token_id).item()
    report.within(f"tokenizer: eval of text, loss {theirs:.4f}", abs(ours["loss"] - theirs), LOSS)
    report.equal("tokenizer: targets", ours["tokens"], sum(len(e["input_ids"]) - 1 for e in examples))
    check_truncation(cli, report, work, model, texts)


def check_truncation(cli: Cli, report: Report, work: Path, model: Path, texts: list[str]):
    """Texts are cut where transformers cuts them, before the token that the tokenizer appends."""
    ending = work / "ending"
    shutil.copytree(model, ending)
    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.convert_ids_to_tokens(2)
    processor = TemplateProcessing(single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, 2)])
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.backend_tokenizer.save(str(ending / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(ending)
    longest = max(len(tokenizer(text).input_ids) for text in texts)
    data = write_lines(work / "long.jsonl", [{"text": text} for text in texts])
    for length in (5, longest - 1):
        ours = cli("eval", model=ending, data=data, batch_size=5, max_length=length)
        cut = [tokenizer(text, truncation=True, max_length=length).input_ids for text in texts]
        ends = all(ids[-1] == 2 for ids in cut) and max(map(len, cut)) == length
        report.equal(f"tokenizer: texts cut at {length} end with {end}", ends, True)
        pad = tokenizer.pad_token_id
        theirs = reference.loss(reference.load_model(ending), [{"input_ids": ids} for ids in cut], pad).item()
        difference = abs(ours["loss"] - theirs)
        report.within(f"tokenizer: eval of texts cut at {length}, loss {theirs:.4f}", difference, LOSS)


def guarded(report: Report, name: str, check):
    """What raises counts as one failed check, and the others go on."""
    try:
        check()
    except Exception as error:
        traceback.print_exc()
        report.line(False, name, f"{type(error).__name__}: {error}")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("binary", type=Path)
    arguments.add_argument("adapters", type=Path, help="the example of crates/format")
    arguments.add_argument("cases", nargs="*", metavar="CASE", help="only these, by name [default: all]")
    options = arguments.parse_args()
    started = time.monotonic()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    report, cli = Report(), Cli(options.binary.resolve())
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        cases = make_cases(work / "models", FIXTURES)
        groups = {}
        for case in cases:
            (work / case.name).mkdir()
            groups[case.name] = lambda case=case: CaseChecks(case, cli, report, work / case.name).run()
        groups["tokenizer"] = lambda: check_tokenizer(cli, report, work)
        groups["base-models"] = lambda: check_base_models(cli, report, work / "base-models", cases)
        groups["add-tokens"] = lambda: check_add_tokens(cli, report, work / "add-tokens")
        groups["decoders"] = lambda: check_decoders(cli, report, work / "decoders")
        groups["extract"] = lambda: check_extract(cli, report, work / "extract")
        groups[ENCODERS] = lambda: check_encoders(cli, report, work / ENCODERS)
        groups["encoder-lora"] = lambda: check_encoder_lora(cli, report, work / "encoder-lora")
        groups["split"] = lambda: check_split(cli, report, work / "split")
        groups[LORA] = lambda: check_lora(cli, report, work / LORA)
        groups["round-trips"] = lambda: check_round_trips(options.adapters.resolve(), report, work / "trips", guarded)
        unknown = set(options.cases) - set(groups)
        if unknown:
            arguments.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
        for name, check in groups.items():
            if not options.cases or name in options.cases:
                guarded(report, name, check)
    print(f"{report.passed} passed, {report.failed} failed ({time.monotonic() - started:.0f} s)")
    return 1 if report.failed or not report.passed else 0


if __name__ == "__main__":
    sys.exit(main())
