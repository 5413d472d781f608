"""A training step of a whole model: ours, PEFT's, LoRA on the embedding, and the embedding as a whole."""
import math

from processes import Failure, bench, by_turns, peft, run

NUMBERS = ["step_s", "extra_mb"]
OTHERS = ["peft", "lora", "full"]
SHAPES = ["llama", "gemma2"]


def model(rounds, smoke, out):
    """A row for each shape of model and each system, all from one checkpoint and one batch."""
    tokens = "1990-1999" if smoke else "255000-255015"
    sizes = ["--vocab-size", 2000, "--hidden", 64, "--layers", 2, "--batch", 2, 16] if smoke else []
    built = bench("model", smoke, "-p", "trainable-tokens-trainer")
    rows = []
    for shape in SHAPES:
        checkpoint = out / "models" / shape
        if not (checkpoint / "input_ids.json").exists():
            made = peft("checkpoint", checkpoint, "--arch", shape, "--token-ids", tokens, *sizes)
            run(made, [], arch=shape)
        flags = [
            "--model", checkpoint, "--input-ids", checkpoint / "input_ids.json", "--token-ids", tokens,
            "--steps", 2 if smoke else 4, "--lr", 1e-3,
        ]
        ours = [built, *map(str, flags)]
        cases = [lambda: run(ours, NUMBERS, system="trainable-tokens")]
        for mode in ["peft"] if smoke else OTHERS:
            cases.append(lambda mode=mode: run(peft("model", "--mode", mode, *flags), NUMBERS, system=mode))
        results = by_turns(max(1, rounds - 1), cases)
        check(results, 1e-3)
        rows += [{"shape": shape, **result} for result in results]
    return rows


def check(results, tolerance):
    """All of them begin with the same model and batch, and so with the same loss."""
    first = {result["system"]: result["loss"][0] for result in results}
    expected = first["peft"]
    for system, loss in first.items():
        if not math.isclose(loss, expected, rel_tol=tolerance):
            raise Failure(f"the first loss of {system} is {loss}, that of PEFT is {expected}: not the same step")
