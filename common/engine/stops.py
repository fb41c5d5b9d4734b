"""Counts stop signals as they arrive. The run obeys them before its next step."""

import contextlib
import os
import signal


class Stops:
    """Handles SIGINT, SIGTERM, SIGUSR1 and SIGHUP (unless nohup ignores it). count: how many arrived."""

    def __init__(self):
        self.count, self._waiting = 0, False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.count += 1
        if self.count == 1:  # it often arrives twice: sent to all processes, and again by torchrun
            with contextlib.suppress(OSError):  # stderr may be a closed pipe
                os.write(2, b"signal received: saving and stopping before the next step (Ctrl-\\ quits)\n")
        if self._waiting:
            raise KeyboardInterrupt

    def wait(self, function, *arguments):
        """Returns function(*arguments), such as next(batches), or None if a signal comes first."""
        with contextlib.suppress(KeyboardInterrupt):
            try:
                self._waiting = True
                return None if self.count else function(*arguments)
            finally:
                self._waiting = False
