"""A supervisor without a trainer: does what the job's words say, and counts how often it was started.

`python supervisor_stand_in.py HOME ID`; the command is one of
  steps N     N steps of 10 ms each from where the row says; waits in between while HOME/hold exists
  deaf        one step, then nothing, and no ear for SIGTERM
  die         ends itself by SIGKILL at once
  leave N     ends with exit code N and says nothing
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from autotune.recover.identity import own_process_id
from autotune.recover.job import LIVE, State
from autotune.recover.jobs import open_jobs

LONGEST_S = 60.0


def main(home: Path, job_id: int) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    with (home / f"starts-{job_id}").open("a") as starts:
        starts.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
    with open_jobs(home) as store:
        if not store.attach(job_id, own_process_id()):
            return 0
        job = store.job(job_id)
        word, *rest = job.command
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "leave":
            return int(rest[0])
        step, last = job.step or 0, int(rest[0]) if rest else 10**6
        until = time.monotonic() + LONGEST_S
        while step < last and time.monotonic() < until:
            if asked and word != "deaf":
                store.interrupt(job_id, "ended by a signal")
                return 130
            if step and (word == "deaf" or (home / "hold").exists()):
                time.sleep(0.01)
                continue
            step += 1
            if store.update(job_id, state=State.RUNNING, step=step, max_steps=last) not in LIVE:
                return 1
            time.sleep(0.01)
        store.finish(job_id, State.FINISHED, exit_code=0, message="done")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
