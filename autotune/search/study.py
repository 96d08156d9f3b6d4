"""The search as an Optuna study in memory: ask for the next config, tell what it gave, or rebuild it from trials.

What is asked for next is decided by a generator (`climb`, `seek`); the study holds every trial, with its constraint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotune.search.climb import Observation, Outcome, Proposal, Steps, conclude
from autotune.search.space import SearchSpace
from autotune.values import AllocatorSetting, Attention, LossPath, TrainingConfig, Upcast, to_json

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution


class Search:
    """One fit's search. `steps` proposes; configs of `recorded` are answered from there and never proposed.

    `known` were measured before and are only put into the study: `steps` was given them.
    """

    def __init__(
        self,
        space: SearchSpace,
        steps: Steps[Outcome | None],
        recorded: Mapping[TrainingConfig, Observation] | None = None,
        *,
        known: Iterable[Observation] = (),
        allowed_bytes: int | None = None,
    ) -> None:
        self.space = space
        self.study = _quiet_study()  # of tokens per second; out of memory is a failed trial with its attributes
        self._recorded = recorded or {}
        self._allowed_bytes = allowed_bytes
        self._observed: list[Observation] = []
        self._distributions = _distributions(space)
        self._steps = steps
        self._pending: Proposal | None = None
        self._trial: Trial | None = None  # the pending proposal's
        self._outcome: Outcome | None = None
        for observation in known:
            self._add(Proposal(observation.config, "measured before", ()), observation)
        self._advance(None)

    def ask(self) -> Proposal | None:
        """The next config to measure, the same one until it is told; None when the search is over."""
        if self._pending is not None and self._trial is None:
            distributions = self._covering(self._pending.config)
            self.study.enqueue_trial(_parameters(self._pending.config, distributions))
            self._trial = self.study.ask(distributions)
        return self._pending

    def tell(self, proposal: Proposal, observation: Observation) -> None:
        """What measuring `proposal` gave. Raises ValueError for any other than the one asked last."""
        from optuna.trial import TrialState

        if self._trial is None or proposal != self._pending or observation.config != proposal.config:
            raise ValueError(f"only the proposal asked last can be told: {self._pending}, not {proposal}")
        for name, value in self._attributes(proposal, observation).items():
            self._trial.set_user_attr(name, value)
        set_constraint(self._trial, self._over_allowed(observation))
        if observation.cut_short:
            self._trial.report(observation.speed, step=0)
            self.study.tell(self._trial, state=TrialState.PRUNED)
        elif observation.fits:
            self.study.tell(self._trial, observation.speed)
        else:
            self.study.tell(self._trial, state=TrialState.FAIL)
        self._observed.append(observation)
        self._advance(observation)

    def stop(self, reason: str) -> None:
        """End the search here, for a reason that it does not know of."""
        self._steps.close()
        self._pending = self._trial = None
        self._outcome = conclude(self.space, self._observed, reason)

    @property
    def result(self) -> Outcome | None:
        """The outcome once the search is over; None before, and where it could not be made."""
        return self._outcome

    def outcome(self) -> Outcome:
        """What was found; while the search is not over, what was found so far."""
        return self._outcome or conclude(self.space, self._observed, "not finished")

    def _advance(self, observation: Observation | None) -> None:
        """To the next proposal that is not recorded, or to the outcome."""
        self._pending = self._trial = None
        try:
            proposal = next(self._steps) if observation is None else self._steps.send(observation)
            while (known := self._recorded.get(proposal.config)) is not None:
                self._add(proposal, known)
                proposal = self._steps.send(known)
        except StopIteration as end:
            self._outcome = end.value
        else:
            self._pending = proposal

    def _add(self, proposal: Proposal, known: Observation) -> None:
        """A recorded trial into the study."""
        from optuna.trial import TrialState, create_trial

        distributions = self._covering(proposal.config)
        self.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if known.fits else TrialState.FAIL,
                value=known.speed if known.fits else None,
                params=_parameters(proposal.config, distributions),
                distributions=distributions,
                user_attrs={**self._attributes(proposal, known), "recorded": True},
            )
        )
        self._observed.append(known)

    def _attributes(self, proposal: Proposal, observation: Observation) -> dict[str, Any]:
        """All that is known of a trial, as JSON data: Optuna's parameters leave out what does not vary."""
        return {
            "config": to_json(observation.config),
            "reason": proposal.reason,
            "moves": list(proposal.moves),
            "verdict": "fits" if observation.fits else "out_of_memory" if observation.out_of_memory else "failed",
            "peak_bytes": observation.peak_bytes,
            "spread": observation.spread,
            "memory_over_allowed": self._over_allowed(observation),
        }

    def _over_allowed(self, observation: Observation) -> float:
        """As a fraction of what is allowed; of one that ran out of memory it is not known by how much."""
        needed, allowed = observation.needed_bytes or observation.peak_bytes, self._allowed_bytes
        over = needed / allowed - 1.0 if needed and allowed and observation.fits else 0.0
        return max(over, 1e-6) if observation.out_of_memory else min(over, 0.0)

    def _covering(self, config: TrainingConfig) -> dict[str, BaseDistribution]:
        """Those that know `config`'s value. A value that only a new strategy knows is in the attributes alone."""
        return {
            name: distribution
            for name, distribution in self._distributions.items()
            if getattr(config, name) in getattr(distribution, "choices", (getattr(config, name),))
        }


def _quiet_study() -> Study:
    """An empty study. Nothing is sampled: each trial's parameters are given to it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))


def set_constraint(trial: Trial, over_allowed: float) -> None:
    """Memory beyond what is allowed as a fraction of it, in Optuna's form: above 0 where a trial is not feasible."""
    if hasattr(trial, "set_constraint"):
        trial.set_constraint("memory", over_allowed)
    else:  # before Optuna 5, whose samplers read it there
        trial.storage.set_trial_system_attr(trial._trial_id, "constraints", (over_allowed,))


_PARTIAL = ("every_2", "every_3", "every_4")


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """One for each setting that a fit or its ladder may change; they stay the same for all trials, as Optuna wants."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    checkpointing = dict.fromkeys((space.start.gradient_checkpointing, "off", *_PARTIAL, "full", "offload"))
    choices: dict[str, Sequence[Any]] = {
        "gradient_checkpointing": tuple(checkpointing),
        "attention": [item.value for item in Attention],
        "loss": [item.value for item in LossPath],
        "upcast": [item.value for item in Upcast],
        "allocator": [item.value for item in AllocatorSetting],
        "double_quant": (False, True),
        "packing": (False, True),
        "optimizer": tuple(dict.fromkeys((space.start.optimizer, *space.joint["optimizer"]))),
    }
    return {
        "micro_batch_size": IntDistribution(1, space.samples),
        "sequence_length": IntDistribution(1, space.start.sequence_length),
        "lora_rank": IntDistribution(1, space.start.lora_rank),
        **{name: CategoricalDistribution(values) for name, values in choices.items()},
    }


def _parameters(config: TrainingConfig, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_json(getattr(config, name)) for name in names}
