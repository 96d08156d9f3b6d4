"""A process of its own that sends one message to the URLs of a private file, through apprise."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """0: sent; 1: a service refused, or there is none."""
    import apprise

    name = os.environ.get("AUTOTUNE_JOB_NAME") or f"job {os.environ['AUTOTUNE_JOB']}"
    services = apprise.Apprise()
    for url in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        services.add(url)
    title = f"autotune: {name} {os.environ['AUTOTUNE_EVENT']}"
    return 0 if services.notify(title=title, body=os.environ["AUTOTUNE_MESSAGE"] or title) else 1


if __name__ == "__main__":
    sys.exit(main())
