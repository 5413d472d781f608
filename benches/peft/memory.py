"""The process's anonymous memory, as benches/support/memory.rs watches it."""
import threading


def anonymous_bytes():
    """Bytes now, as Linux counts them."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


class Peak:
    """Watches the peak from now on, every two milliseconds."""

    def __init__(self):
        self.before = self.highest = anonymous_bytes()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        while not self.stopping.wait(0.002):
            self.highest = max(self.highest, anonymous_bytes())

    def stop(self):
        """Stops; by how many MB the peak was above the beginning."""
        self.stopping.set()
        self.thread.join()
        return (self.highest - self.before) / 2**20
