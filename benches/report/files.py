"""Work on files: merging beside `cp`, comparing beside `cat`, adapters, opening tables."""
from processes import bench, run_all


def files(rounds, smoke, out):
    """A row for each kind of work. The program alternates it with what it is compared with by itself."""
    built = bench("files", smoke, "-p", "trainable-tokens-format")
    if smoke:
        # Its checkpoints are of the size that the figures are about: to build it must do.
        return []
    return run_all([built, "--dir", str((out / "files").resolve()), "--rounds", str(rounds)], ["seconds", "bytes", "anon_mb"])
