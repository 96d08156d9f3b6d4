"""Judging on this machine, with the system's own evidence from before and after a probe: the flow's `Judge`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from autotune.values import Device, Judgement, ProbeReport, ProbeRequest
from autotune.verdict.evidence import read_evidence
from autotune.verdict.judge import Evidence, classify

_NO_LOG = Path(os.devnull)


class MachineJudge:
    """One fit's judge on one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._began: float | None = None
        self._before: Evidence | None = None

    def begin(self) -> None:
        """A probe starts now."""
        self._began = time.time()
        self._before = read_evidence(dmesg=None, kmsg=_NO_LOG)  # the counters alone: a log has times of its own

    def judge(self, report: ProbeReport, request: ProbeRequest) -> Judgement:
        """What `report` means; the kernel's log and counters are read only where something died."""
        died = report.failure is not None or report.exit_code != 0
        return classify(
            report,
            target=request.device,
            limit_bytes=request.memory_limit_bytes,
            device_total_bytes=self._device.total_bytes,
            evidence=read_evidence((report.pid,) if report.pid else (), self._began) if died else None,
            before=self._before,
        )
