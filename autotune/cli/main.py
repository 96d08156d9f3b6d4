"""Where the command starts. What takes time to import is imported within, so that a signal leaves no traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line. SIGINT and SIGTERM: one line and exit code 130, unless a command handles them itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & set it
            signal.signal(number, _leave)
    from autotune.cli.group import run

    sys.exit(run())


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: an exception out of here, in the middle of an import, can come out as another one."""
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":  # of `python -m`, as the daemon and its supervisors are started
    main()
