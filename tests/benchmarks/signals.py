"""What ends a benchmark ends what it has started."""

import signal
import sys


def end_by_signals() -> None:
    """Let a signal end this process as an exit does, so that the contestant or server at work ends with it.

    One that is ignored, as ``nohup`` has it, stays so.
    """
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_IGN:
            continue
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
