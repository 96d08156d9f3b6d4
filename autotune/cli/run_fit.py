"""`autotune run --fit`: a fit of the command's own model, lengths and batch, before it is started."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest, ProbeFailed
from autotune.fitfile import FitFile, read_fit
from autotune.probe.bootstrap import die_with_parent
from autotune.recover.facts import Settings


def fitted(settings: Settings, options: dict[str, Any]) -> Settings:
    """The fitted config. The fit is a process of its own, so that its memory is given back before the run.

    Raises `InvalidRequest` where the command does not say what to fit, `ProbeFailed` where the fit fails.
    """
    model = settings.model or options["model"]
    length = settings.sequence_length or options["sequence_length"]
    micro = settings.micro_batch_size
    missing = [
        name
        for name, value in (("--model", model), ("--sequence-length", length), ("a micro batch", micro))
        if not value
    ]
    if missing or micro is None:
        raise InvalidRequest(
            f"--fit: the command does not say {' and '.join(missing)}: give it, or fit with autotune fit"
        )
    batch = micro * (settings.gradient_accumulation_steps or 1)
    with tempfile.TemporaryDirectory(prefix="autotune-fit-") as place:
        output = Path(place, "fit.yaml")
        words = [
            *(sys.executable, "-P", "-m", "autotune.cli.main", "fit", "--gpu", options["gpu"], "--model", str(model)),
            *("--sequence-length", str(length), "--effective-batch-size", str(batch), "--output", str(output)),
            *(("--memory-limit", options["memory_limit"]) if options["memory_limit"] else ()),
            *(("--trainer", "trl") if settings.trainer == "trl" else ()),
            *(("--lora-rank", str(settings.lora_rank)) if settings.lora_rank else ()),
        ]
        code = _run(words)
        if code:
            raise ProbeFailed(
                f"--fit: the fit ended with exit code {code} (see above); mend that, or run without --fit"
            )
        return settings_of(read_fit(output))


def settings_of(fit: FitFile) -> Settings:
    """What a fit says of a run; whose step it was fitted with says nothing of the command."""
    known = {field: getattr(fit.config, field, None) for field in Settings.__dataclass_fields__}
    return replace(Settings(**{**known, "trainer": None}), model=fit.model)


def _run(words: list[str]) -> int:
    """The exit code of a process that is stopped, with what it measured kept, when this one ends."""
    ends_with_us = functools.partial(die_with_parent, os.getpid(), signal.SIGTERM)
    return subprocess.run(words, stdout=sys.stderr, check=False, preexec_fn=ends_with_us).returncode
