"""The program under test."""

import json
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file


class CliError(Exception):
    """The program exited with a status that was not expected."""


class Cli:
    def __init__(self, binary):
        self.binary = str(binary)

    def __call__(self, command, **options):
        """Runs a command and returns the object that it prints; option names are those of the command line."""
        done = self._run(command, options)
        if done.returncode != 0:
            raise CliError(f"{command} exited with {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def refusal(self, command, **options):
        """Runs a command that must exit with 1, and returns what it says."""
        done = self._run(command, options)
        if done.returncode != 1:
            raise CliError(f"{command} exited with {done.returncode}, not 1: {done.stdout.strip()}{done.stderr.strip()}")
        return done.stderr.strip()

    def forward(self, work: Path, model, ids: torch.Tensor, **options):
        """{"embeddings": [B, L, D], "logits": [B, L, V]} of `ids` [B, L]."""
        given, written = work / "ids.json", work / "forward.safetensors"
        given.write_text(json.dumps(ids.tolist()))
        self("forward", model=model, input_ids=given, out=written, force=True, **options)
        return load_file(written)

    def merge(self, model, adapters: list, out: Path, **options):
        """Merges adapters in their order."""
        return self("merge", model=model, adapter=adapters, out=out, **options)

    def _run(self, command, options):
        args = [self.binary, "--json", command]
        for name, value in options.items():
            name = "--" + name.replace("_", "-")
            if value is True:
                args.append(name)
            elif isinstance(value, list):
                args.extend(f"{name}={item}" for item in value)
            elif value is not None:
                # With "=", so that a value may begin with a hyphen.
                args.append(f"{name}={value}")
        return subprocess.run(args, capture_output=True, text=True, check=False)
