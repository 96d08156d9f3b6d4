"""Where autotune keeps its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Where autotune keeps its files: $AUTOTUNE_HOME, or the platform's data folder of the user."""
    if stated := environ.get("AUTOTUNE_HOME"):
        return Path(stated).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("autotune"))
