"""Stop signals: counted when they come, obeyed before the next step."""

import contextlib
import os
import signal


class Stops:
    """Takes SIGINT, SIGTERM, SIGUSR1 and SIGHUP (unless nohup ignores it): count says how many came."""

    def __init__(self):
        self.count, self._waiting = 0, False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.count += 1
        if self.count == 1:  # often it comes twice: to every process, and once more from torchrun
            with contextlib.suppress(OSError):  # nobody may read it any more
                os.write(2, b"signal received: saving and stopping before the next step (Ctrl-\\ quits)\n")
        if self._waiting:
            raise KeyboardInterrupt

    def wait(self, function, *arguments):
        """function(*arguments), such as next(batches). A signal ends the wait for it: then None."""
        with contextlib.suppress(KeyboardInterrupt):
            try:
                self._waiting = True
                return None if self.count else function(*arguments)
            finally:
                self._waiting = False
