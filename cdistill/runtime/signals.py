"""SIGTERM and Ctrl-C, caught while a run goes on."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cdistill.runtime.collectives import gathered

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DUPLICATE_SECONDS = 0.5  # a terminal and a launcher may both pass on the same Ctrl-C


class StopRequest:
    """The first SIGTERM or SIGINT of this process; a second one later on acts at once, as if nobody caught it."""

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._when = number, now
        elif now - self._when > DUPLICATE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> int:
        """The signal any process has received, 0 for none. Every process must call it; alone, nothing is sent."""
        return max(gathered(self.received))


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the signals while the block runs; outside the main thread, which alone can, none is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
