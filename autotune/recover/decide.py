"""What is done about the end of an attempt. Pure: facts, verdict and history in, one action with its reason out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from autotune.recover.facts import Action, Decision, Ended, EndedBy, Incident, Phase
from autotune.recover.policy import Policy, is_same_place, restarts_spent, since_progress
from autotune.recover.step_down import Nothing, StepDown
from autotune.recover.words import change_in_words, error_in_words, place_in_words
from autotune.values import GIB, Judgement, Verdict
from autotune.verdict.actions import gib, other_tenants_bytes

_SIGINT, _SIGKILL = 2, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What could be changed for the next attempt."""

    smaller: Callable[[], StepDown | Nothing]  # asked only where a smaller config is the answer
    can: Callable[[str, Any], bool]  # whether the command can be told a setting
    eval_micro_batch_size: int | None = None  # as it runs now
    workers: int | None = None  # of the data loader; None: as if there were none
    offloads: bool = False  # activations to system RAM


def decide(
    ended: Ended,
    judgement: Judgement,
    history: Sequence[Incident],
    policy: Policy,
    options: Options,
    *,
    now: datetime,
) -> Decision:
    """One action for this end. `history` are the run's incidents so far, oldest first; `now` is aware of its zone.

    A config that changes nothing is never run again after the same death at the same place, and restarts that bring
    no new checkpoint are limited. Out of device memory while saving stops the run, without a second try: the same
    steps would be trained again up to the same save, and what saving needs does not depend on the batch.
    """
    case = _Case(ended, judgement, history, policy, options)
    if judgement.verdict is Verdict.FITS and ended.ended_by is EndedBy.ITSELF:
        return Decision(action=Action.FINISH, why="It ended well.")
    if ended.ended_by is EndedBy.USER or case.is_stopped_by_hand:
        return _stop("It was stopped by hand.")
    found = case.answer()
    if found.action is Action.STOP:
        return found
    spent = restarts_spent(ended, history, policy, now)
    if spent:
        return _stop(f"{spent} The last one {case.what} {case.where}.")
    if not found.change and is_same_place(ended, judgement, history):
        return case.instead_of_the_same()
    return found


def taken_by_others(ended: Ended, judgement: Judgement, card_bytes: int | None = None) -> int | None:
    """Bytes of the card that others took while it ran; None: not much, not known, or this run alone is too large."""
    numbers, total = judgement.numbers, ended.progress.device_total_bytes or card_bytes
    total = numbers.get("total_bytes", total)
    own = numbers.get("process_bytes", numbers.get("reserved_bytes", ended.progress.peak_reserved_bytes))
    tried = numbers.get("tried_bytes", 0)
    others = ended.tenants_bytes if ended.tenants_bytes is not None else other_tenants_bytes(numbers)
    if others is None or total is None:
        return None
    before = max(0, total - ended.free_before_bytes) if ended.free_before_bytes is not None else 0
    alone_too_large = own is not None and own + tried > total
    return None if alone_too_large or others - before <= max(GIB, total // 10) else others


class _Case:
    """One end with what is known around it."""

    def __init__(
        self, ended: Ended, judgement: Judgement, history: Sequence[Incident], policy: Policy, options: Options
    ) -> None:
        self.ended, self.judgement, self.history, self.policy, self.options = (
            ended,
            judgement,
            history,
            policy,
            options,
        )
        self.where, self.what = place_in_words(ended), error_in_words(ended, judgement)

    @property
    def is_stopped_by_hand(self) -> bool:
        """Ctrl-C that reached the trainer itself."""
        ended = self.ended
        name = ((ended.death.exception if ended.death else None) or "").rpartition(".")[2]
        signalled = ended.signal == _SIGINT or ended.exit_code in (-_SIGINT, 128 + _SIGINT)
        return self.judgement.verdict is Verdict.INTERRUPTED and (signalled or name == "KeyboardInterrupt")

    @property
    def was_killed(self) -> bool:
        return self.ended.signal == _SIGKILL or self.ended.exit_code in (-_SIGKILL, 128 + _SIGKILL)

    @property
    def could_be_memory(self) -> bool:
        """Whether a lack of device memory may be behind a death that is not clear."""
        settle = self.judgement.settle or ""
        return self.judgement.verdict is Verdict.AMBIGUOUS and not self.was_killed and "memory" in settle

    @property
    def is_silent(self) -> bool:
        """Whether the trainer reports nothing: it may have loaded or trained, and only its end is known."""
        return self.ended.phase is Phase.START and not self.ended.progress.reporting

    @property
    def has_trained(self) -> bool:
        """Whether this run has finished a step, in this attempt or before: it can be loaded, then."""
        return bool(self.ended.progress.steps) or any(one.step for one in self.history)

    def answer(self) -> Decision:
        return {
            Verdict.DEVICE_OOM: self.device_oom,
            Verdict.SPILL: self.spill,
            Verdict.HOST_OOM: self.host_oom,
            Verdict.NOT_OOM: self.not_oom,
            Verdict.AMBIGUOUS: self.ambiguous,
            Verdict.TIMEOUT: self.stall,
            Verdict.DEVICE_LOST: self.lost,
            Verdict.INTERRUPTED: self.killed,
            Verdict.FITS: self.ambiguous,
        }[self.judgement.verdict]()

    def device_oom(self) -> Decision:
        others = taken_by_others(self.ended, self.judgement)
        if others is not None and self.policy.on_tenant == "wait":
            why = f"{self.lead('Out of device memory')}: other processes took {gib(others)} of the card, so it waits."
            return Decision(action=Action.WAIT, why=why, wait_s=self.policy.tenant_wait_s)
        phase = self.ended.phase
        if phase is Phase.EVALUATE:
            return self.smaller_evaluation("Out of device memory")
        if phase in (Phase.START, Phase.LOAD) and not self.is_silent:
            return self.loading()
        if phase is Phase.SAVE:
            return _stop(
                f"{self.lead('Out of device memory')}: a smaller batch does not change what saving needs, so free"
                " device memory for it (fewer processes on the card, a sharded or adapter-only checkpoint)."
            )
        if phase is Phase.DONE:
            return _stop(f"Training had ended; what the script does after it {self.what}.")
        return self.step_down("Out of device memory")

    def loading(self) -> Decision:
        if self.has_trained:
            why = f"{self.lead('Out of device memory')}, which this run has got through before: once more."
            return self.again(why, self.policy.ambiguous_retries)
        return _stop(
            f"{self.lead('Out of device memory')}: the model itself does not fit, whatever the batch; take a smaller or"
            " quantised one, or a larger card."
        )

    def spill(self) -> Decision:
        what = "Device memory spilled into system RAM"
        return self.smaller_evaluation(what) if self.ended.phase is Phase.EVALUATE else self.step_down(what)

    def step_down(self, what: str) -> Decision:
        found = self.options.smaller()
        if isinstance(found, Nothing) or not found.change:
            missing = found.missing_bytes if isinstance(found, Nothing) else None
            why = found.why if isinstance(found, Nothing) else "there is nothing left to change"
            short = f"; at least {gib(missing)} are missing" if missing else ""
            return _stop(f"{self.lead(what)}, and {why}{short}.")
        return Decision(
            action=Action.STEP_DOWN, why=f"{self.lead(what)}{self.cause()}: {how(found)}.", change=found.change
        )

    def cause(self) -> str:
        """What a death in training says of the config, besides that it was too large."""
        progress, death = self.ended.progress, self.ended.death
        if self.is_silent:
            return ""
        if not self.has_trained:
            return " before any step was finished, so the config was wrong from the start"
        batch, seen = death.batch if death else None, progress.longest_seen
        if batch and seen and batch.samples * batch.tokens > seen.samples * seen.tokens:
            return f", on a longer batch than any before ({seen.samples} × {seen.tokens:,} tokens)"
        return ""

    def smaller_evaluation(self, what: str) -> Decision:
        death = self.ended.death
        now = self.options.eval_micro_batch_size or (death.batch.samples if death and death.batch else None)
        what = self.lead(what)
        if now == 1:
            return _stop(
                f"{what} with one sample at a time: shorten the evaluation's samples or switch it off;"
                " a smaller training batch does not change what it needs."
            )
        size = now // 2 if now else 1
        if not self.options.can("eval_micro_batch_size", size):
            return _stop(
                f"{what}, and the command cannot be told another evaluation batch size: make it smaller there, or name"
                " it in the command."
            )
        why = f"{what}: evaluation in batches of {size} instead of {now or 'what it had'}, training is left alone."
        return Decision(action=Action.SMALLER_EVALUATION, why=why, change={"eval_micro_batch_size": size})

    def host_oom(self) -> Decision:
        what = self.lead("Out of system RAM")
        if self.ended.phase in (Phase.START, Phase.LOAD) and not self.is_silent:
            if self.has_trained:
                why = f"{what}, which this run has got through before: once more."
                return self.again(why, self.policy.ambiguous_retries)
            return _stop(f"{what}: loading takes more than this machine or job has; {_no_batch()}.")
        if self.ended.phase is Phase.DONE:
            return _stop(f"Training had ended; what the script does after it ran out of system RAM: {_no_batch()}.")
        return self.spare_host(what)

    def spare_host(self, what: str) -> Decision:
        """Fewer workers, to none in three steps at most, then nothing offloaded; never the micro batch."""
        workers = self.options.workers or 0
        fewer = workers // 4
        if workers and self.options.can("dataloader_workers", fewer):
            why = f"{what}: {fewer} data-loader workers instead of {workers}."
            return Decision(action=Action.SPARE_HOST, why=why, change={"dataloader_workers": fewer})
        if self.options.offloads and self.options.can("gradient_checkpointing", "full"):
            why = f"{what}: activations are recomputed from the card instead of offloaded to system RAM."
            return Decision(action=Action.SPARE_HOST, why=why, change={"gradient_checkpointing": "full"})
        return _stop(f"{what}, with no data-loader workers or offloading left to take away: {_no_batch()}.")

    def not_oom(self) -> Decision:
        return _stop(f"It was no lack of memory {self.where}: it {self.what}. {self.judgement.action}{self.ours()}")

    def ours(self) -> str:
        """Of a death at the start: what had just been changed may be what it did not take."""
        change = self.history[-1].decision.change if self.history else {}
        if not change or self.ended.phase not in (Phase.START, Phase.LOAD):
            return ""
        return f" It had been started with a change of autotune's ({change_in_words(change)}), which may be the reason."

    def ambiguous(self) -> Decision:
        if self.was_killed:
            return self.killed()
        why = f"It died {self.where} and {self.what}; why is not clear, so the same once more."
        return self.again(why, self.policy.ambiguous_retries)

    def killed(self) -> Decision:
        return self.again(f"It was killed from outside {self.where}: the same again.", self.policy.retries)

    def stall(self) -> Decision:
        return self.again(f"It {self.what} {self.where}: the same again.", self.policy.retries)

    def lost(self) -> Decision:
        return self.again(f"The device was lost {self.where}: the same again.", self.policy.retries)

    def again(self, why: str, limit: int) -> Decision:
        """The same config, where the same kind of death has not used up its retries."""
        idle = since_progress(self.ended, self.history)
        before = sum(one.judgement.verdict is self.judgement.verdict and not one.decision.change for one in idle)
        if before >= limit:
            times = "once" if before == 1 else f"{before} times"
            return self.give_up(f"the same config was tried {times} again")
        return Decision(action=Action.SAME_AGAIN, why=why, wait_s=self.policy.pause_s * 2**before)

    def instead_of_the_same(self) -> Decision:
        """The same death at the same place: another config where memory may be behind it, else the end."""
        found = self.another()
        return found if found is not None else self.give_up("it died there before, with the same config")

    def another(self) -> Decision | None:
        verdict = self.judgement.verdict
        training = self.ended.phase is Phase.TRAIN
        if training and (verdict is Verdict.DEVICE_OOM or self.could_be_memory):
            return self.step_down("Again out of device memory" if verdict is Verdict.DEVICE_OOM else "Dead again")
        if verdict is Verdict.DEVICE_OOM and self.ended.phase is Phase.EVALUATE:
            return self.smaller_evaluation("Again out of device memory")
        if verdict is Verdict.AMBIGUOUS and self.was_killed and self.ended.phase not in (Phase.START, Phase.LOAD):
            return self.spare_host(f"Killed again {self.where}, as the system does when RAM runs out")
        return None

    def give_up(self, why: str) -> Decision:
        settle = f" What would settle it: {self.judgement.settle}." if self.judgement.settle else ""
        return _stop(f"It {self.what} {self.where}, and {why}. {self.judgement.action}{settle}")

    def lead(self, what: str) -> str:
        return f"{what} at a step that was not reported" if self.is_silent else f"{what} {self.where}"


def how(found: StepDown) -> str:
    """The step down in words."""
    words = change_in_words(found.change)
    tokens = found.config.sequence_length
    memory = f"memory for samples of {tokens:,} tokens" if tokens > 1 else "memory for its batches"
    basis = {
        "measured": f"was measured to have {memory}",
        "predicted": f"is predicted to have {memory} and to be the fastest that has",
        "ladder": "is the next smaller step",
        "closest": "needs least of all that is left, and may not be enough",
    }[found.source]
    short = "" if found.covers_longest or found.source == "closest" else "; longer ones may still be too much"
    return f"{words} {basis}{short}"


def _stop(why: str) -> Decision:
    return Decision(action=Action.STOP, why=why)


def _no_batch() -> str:
    return "add RAM or use less of it; a smaller batch does not help"
