"""See a recovery here, on the CPU: a training that runs out of memory at a long sample and is brought to its end.

`python -m tests.real_runs.rehearse [FOLDER]` makes a small model and data set in FOLDER, trains once to see what short
samples take, then trains under `autotune run` with too little memory for the long ones.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from autotune.values import MIB
from tests.real_runs.forms import environment, trainer_command
from tests.real_runs.story import a_place, held_in_first_steps, make, undisturbed
from tests.test_recover_real import FORMS


def main(folder: Path) -> int:
    """The exit code of `autotune run`."""
    form = FORMS[0]
    print("Making a small model and its data …", flush=True)
    made = make(folder)
    print("Training once, to see what the first steps take …", flush=True)
    first = a_place(made, folder / "first")
    with undisturbed(form, first) as process:
        limit = held_in_first_steps(process, first) // MIB + form.margin_mib
    place = a_place(made, folder / "second")
    words = trainer_command(place)
    print(f"\n$ autotune run --memory-limit {limit}MiB -- {shlex.join(words)}\n", flush=True)
    command = [sys.executable, "-m", "autotune.cli.main", "run", "--gpu", "cpu", "--memory-limit", f"{limit}MiB"]
    environ = {**environment(form.venv), "AUTOTUNE_HOME": os.environ.get("AUTOTUNE_HOME") or str(folder / "home")}
    return subprocess.run([*command, "--", *words], env=environ, cwd=folder, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True)
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory(prefix="autotune-rehearsal-") as made:
        sys.exit(main(Path(made)))
