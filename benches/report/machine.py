"""What the figures were measured on."""
import os
import subprocess
from importlib.metadata import version
from pathlib import Path


def describe():
    """The machine and the versions of what runs on it."""
    def line(file, name):
        for text in Path(file).read_text().splitlines():
            if text.startswith(name):
                return text.split(":", 1)[1].strip()
        return None

    def said(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    memory = line("/proc/meminfo", "MemTotal") or "0 kB"
    packages = ["peft", "torch", "transformers"]
    return {
        "cpu": line("/proc/cpuinfo", "model name") or os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory.split()[0]) / 2**20, 1),
        "system": f"{os.uname().sysname} {os.uname().release}",
        "rustc": said("rustc", "--version"),
        "commit": said("git", "describe", "--always", "--dirty"),
        "load_before": os.getloadavg()[0],
        "versions": {**{name: version(name) for name in packages}, **crates()},
    }


def crates():
    """The versions of the frameworks in the lock file."""
    names = {f'name = "{name}"': name for name in ["ndarray", "candle-core", "burn", "dfdx"]}
    lines = Path("Cargo.lock").read_text().splitlines()
    found = {}
    for text, following in zip(lines, lines[1:]):
        if text in names:
            found[names[text]] = following.split('"')[1]
    return found
