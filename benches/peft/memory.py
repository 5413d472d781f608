"""The memory that a step adds, as benches/support/memory.rs watches it: of the process its anonymous memory, of a CUDA
device all that is in use there."""
import threading

import torch


def anonymous_bytes():
    """Bytes now, as Linux counts them."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


def device_bytes():
    """Bytes in use now on the first CUDA device, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


class Peak:
    """Watches the peak from now on, every two milliseconds."""

    def __init__(self, device="cpu"):
        self.bytes = anonymous_bytes
        if device == "cuda":
            # What the allocator keeps is no part of the step.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.bytes = device_bytes
        self.before = self.highest = self.bytes()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        while not self.stopping.wait(0.002):
            self.highest = max(self.highest, self.bytes())

    def stop(self):
        """Stops; by how many MB the peak was above the beginning."""
        self.stopping.set()
        self.thread.join()
        return (self.highest - self.before) / 2**20
