"""What every test starts from."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs begin
    signal.signal(signal.SIGINT, signal.default_int_handler)
