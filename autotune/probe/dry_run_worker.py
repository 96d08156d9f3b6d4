"""The child that makes traces: imports the training libraries once, then one dry run a request."""

from __future__ import annotations

import gc
import signal
import socket
import warnings
from collections.abc import Callable
from typing import Any

from autotune.predict.kernels import KernelSet
from autotune.predict.trace import Trace, to_document
from autotune.probe.channel import Channel
from autotune.values import ModelSource, TrainingConfig, from_json


def main(descriptor: int) -> None:
    """Serve requests until the channel closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")
    channel = Channel(socket.socket(fileno=descriptor))
    while (message := channel.receive()) is not None:
        channel.send({**_answer(message), "number": message.get("number")})


def _make_trace() -> Callable[..., Trace]:
    """`tracing.make_trace`; the first call imports the training libraries, seconds."""
    gc.disable()  # modules by the hundred thousand are made and kept
    try:
        from autotune.predict.tracing import make_trace
    finally:
        gc.enable()
    return make_trace


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    try:
        trace = _make_trace()(
            from_json(ModelSource, message["model"]),
            from_json(TrainingConfig, message["config"]),
            KernelSet(**message["kernels"]),
            own_point=message["own_point"],
        )
        return {"trace": to_document(trace)}
    except Exception as error:  # noqa: BLE001 - the worker's outermost frame: any failure is the answer
        text, name = " ".join(str(error)[:2000].split())[:400], type(error).__name__
        said = text if name == "UnsupportedModel" else f"{name}: {text}"
        return {"error": said, "lacks": getattr(error, "lacks", None)}
