"""The vocabulary: frozen values that flow from a request to a recommendation.

FitRequest → TrainingConfig → Prediction → ProbeReport → Judgement → TrialRecord → Recommendation
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeVar

MIB = 2**20
GIB = 2**30

T = TypeVar("T")


class Verdict(StrEnum):
    """What the facts of a probe mean."""

    FITS = "fits"
    DEVICE_OOM = "device_oom"  # the card's memory, or the CPU target's limit
    HOST_OOM = "host_oom"
    NOT_OOM = "not_oom"  # a bug, a missing kernel, a bad argument: stop, never "try smaller"
    AMBIGUOUS = "ambiguous"  # needs evidence
    TIMEOUT = "timeout"
    SPILL = "spill"  # the driver moved device memory to system RAM: no error, 10-100 times slower
    DEVICE_LOST = "device_lost"
    INTERRUPTED = "interrupted"


class Preserves(StrEnum):
    """How much of what is learned a move leaves alone."""

    EXACT = "exact"  # effective batch, sequence length and optimizer mathematics unchanged
    NEAR = "near"  # needs --allow near
    CONSENT = "consent"  # needs its own flag


class Attention(StrEnum):
    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"


class LossPath(StrEnum):
    FULL = "full"  # all logits at once, as the model's own forward does
    CHUNKED = "chunked"  # head and cross-entropy over blocks of tokens, recomputed in backward
    LIGER = "liger"  # Liger's fused linear cross-entropy


class Quantization(StrEnum):
    NF4 = "nf4"
    NONE = "none"  # 16-bit LoRA


class Upcast(StrEnum):
    """What becomes of the parameters that are not 4-bit before training."""

    NONE = "none"  # left in compute_dtype
    FP32 = "fp32"  # peft.prepare_model_for_kbit_training: all of them to float32
    NORMS = "norms"  # prepared, then cast back: only norms stay float32 (axolotl, TRL < 0.26)


class AllocatorSetting(StrEnum):
    DEFAULT = "default"
    EXPANDABLE_SEGMENTS = "expandable_segments"


class Trainer(StrEnum):
    """Whose training step is run."""

    TRANSFORMERS = "transformers"
    TRL = "trl"
    LOOP = "loop"  # a plain PyTorch loop


class Isolation(StrEnum):
    WARM = "warm"
    FRESH = "fresh"


class FitStatus(StrEnum):
    FITTED = "fitted"
    PREDICTED = "predicted"
    NOTHING_FITS = "nothing_fits"


class Origin(StrEnum):
    """Where a trial in a result came from."""

    PROBE = "probe"
    PROOF = "proof"
    DATABASE = "database"
    RUN = "run"  # a real training run, supervised: what passed, or what it died with, at its longest batch


#: Dtype handling that each trainer applies when it is not told otherwise.
#: transformers: peft's documented QLoRA recipe (prepare_model_for_kbit_training before Trainer), adapters
#: float32 (peft autocast_adapter_dtype). trl >= 0.26: no k-bit preparation, adapters of a quantised model bfloat16.
#: loop: the model as built.
TRAINER_UPCAST: dict[Trainer, Upcast] = {
    Trainer.TRANSFORMERS: Upcast.FP32,
    Trainer.TRL: Upcast.NONE,
    Trainer.LOOP: Upcast.NONE,
}
TRAINER_ADAPTER_DTYPE: dict[Trainer, str] = {
    Trainer.TRANSFORMERS: "float32",
    Trainer.TRL: "bfloat16",
    Trainer.LOOP: "float32",
}
#: trl >= 1.15 computes its default "nll" loss in chunks; the others take the model's own full-logit loss.
TRAINER_LOSS: dict[Trainer, LossPath] = {
    Trainer.TRANSFORMERS: LossPath.FULL,
    Trainer.TRL: LossPath.CHUNKED,
    Trainer.LOOP: LossPath.FULL,
}

_CHECKPOINTING = re.compile(r"off|full|offload|every_[1-9][0-9]*")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """One way to run the training step. Sizes in samples and tokens.

    Raises ValueError, naming the value, for one that no trainer could run.
    """

    sequence_length: int  # tokens of one sample after padding or packing
    micro_batch_size: int  # samples in one forward and backward on one GPU
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    gradient_checkpointing: str = "off"  # off | full | offload | every_2, every_3, … (layers)
    attention: Attention = Attention.SDPA
    optimizer: str = "adamw_torch_fused"  # transformers' own names
    loss: LossPath = LossPath.FULL
    quantization: Quantization = Quantization.NF4
    double_quant: bool = True
    compute_dtype: str = "bfloat16"  # also the dtype of what is not quantised, before upcast
    autocast: bool = True
    upcast: Upcast = Upcast.NONE
    lora_rank: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    adapter_dtype: str = "float32"
    packing: bool = False
    reentrant: bool = False  # which checkpointing
    eval_micro_batch_size: int | None = None  # None: the training one
    allocator: AllocatorSetting = AllocatorSetting.DEFAULT
    trainer: Trainer = Trainer.TRANSFORMERS

    def __post_init__(self) -> None:
        for name in ("sequence_length", "micro_batch_size", "gradient_accumulation_steps", "world_size", "lora_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.eval_micro_batch_size is not None and self.eval_micro_batch_size < 1:
            raise ValueError(f"eval_micro_batch_size must be a positive integer, not {self.eval_micro_batch_size!r}")
        if not _CHECKPOINTING.fullmatch(self.gradient_checkpointing):
            raise ValueError(
                f"gradient_checkpointing must be off, full, offload or every_N, not {self.gradient_checkpointing!r}"
            )
        for name in ("compute_dtype", "adapter_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(_DTYPES)}, not {getattr(self, name)!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if not self.target_modules:
            raise ValueError("target_modules must name at least one module, or all-linear")

    @property
    def effective_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def is_padding_free(self) -> bool:
        """Whether packed rows are laid end to end in one: FlashAttention 2 keeps them apart, the others fill rows."""
        return self.packing and self.attention is Attention.FLASH_ATTENTION_2

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, padding counted."""
        return self.sequence_length * self.effective_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Which model, as its config.json says it; weights only where asked for."""

    name: str  # a public id, or the path as given
    config: dict[str, Any]  # the parsed config.json
    folder: str | None = None  # local folder with weights, for weights="real"
    weights: Literal["random", "real"] = "random"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the config's content: two names of one shape are one model to memory and speed."""
        ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
        shape = {key: value for key, value in self.config.items() if key not in ignored}
        text = json.dumps(shape, sort_keys=True)
        return hashlib.sha256(f"{text}|{self.weights}".encode()).hexdigest()[:12]

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the config allows, in tokens; None where it does not say."""
        text = self.config.get("text_config")
        for source in (self.config, text if isinstance(text, dict) else {}):
            for name in ("max_position_embeddings", "n_positions", "max_seq_len"):  # GPT-2's and MPT's names too
                value = source.get(name)
                if isinstance(value, int) and value > 0:
                    return value
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Another process on the card."""

    pid: int
    name: str | None
    used_bytes: int | None  # None: the driver does not say (Windows, some containers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of this machine. What a driver does not tell is None."""

    kind: Literal["cuda", "rocm", "xpu", "cpu"]
    index: int | None  # PCI order; None for the CPU
    name: str
    uuid: str | None = None  # local identity only, never shared
    total_bytes: int | None = None
    free_bytes: int | None = None
    compute_capability: str | None = None  # "8.6"; gfx name on ROCm
    driver: str | None = None
    runtime: str | None = None  # CUDA or HIP version that the driver offers
    power_limit_w: float | None = None
    mig: str | None = None  # "1g.10gb" for a slice, "enabled" for a parent, None otherwise
    virtual: bool | None = None  # vGPU
    unified_memory: bool = False
    wsl: bool = False
    display_active: bool | None = None
    tenants: tuple[Tenant, ...] = ()
    problems: tuple[str, ...] = ()  # calls that failed, in words

    @property
    def id(self) -> str:
        """How torch names it: "cuda:0" (ROCm too), "xpu:0", "cpu"."""
        if self.kind == "cpu":
            return "cpu"
        return f"{'cuda' if self.kind == 'rocm' else self.kind}:{self.index}"

    @property
    def slug(self) -> str:
        """File name of its database: model and memory size, nothing that names this machine."""
        base = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if self.mig and self.mig != "enabled" and self.mig not in base:
            base += "-mig-" + re.sub(r"[^a-z0-9]+", "-", self.mig.lower())
        if self.kind == "cpu" or self.total_bytes is None:
            return base
        return f"{base}-{round(self.total_bytes / GIB)}gib"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthMix:
    """How long a dataset's samples are, in tokens. Longer ones are truncated at the sequence length that was wanted."""

    quantiles: tuple[float, ...]  # up to 64 slices of equal weight, the shortest first: the mean of each
    samples: int  # with at least one token
    longest: int  # after truncation
    longest_untruncated: int
    truncated: int  # samples that lose tokens
    empty: int = 0  # samples without a token: in nothing above
    counted: Literal["tokens", "tokenizer", "estimate"] = "tokens"  # estimate: UTF-8 bytes ÷ 4

    def __post_init__(self) -> None:
        rises = all(a <= b for a, b in itertools.pairwise(self.quantiles))
        if not self.quantiles or len(self.quantiles) > 64 or self.quantiles[0] <= 0 or not rises:
            raise ValueError(f"quantiles must be 1 to 64 lengths above 0, ascending, not {self.quantiles!r}")
        if self.samples < 1 or not self.quantiles[-1] <= self.longest <= self.longest_untruncated:
            raise ValueError(f"longest must be at least {self.quantiles[-1]}, the last quantile, not {self.longest!r}")

    @property
    def mean_tokens(self) -> float:
        return sum(self.quantiles) / len(self.quantiles)

    @property
    def is_exact(self) -> bool:
        """Whether `longest` is one that a run can meet, and not guessed."""
        return self.counted != "estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """What was asked: a start config and how far a fit may go from it. Bytes are of the whole card."""

    model: ModelSource
    start: TrainingConfig  # its sequence length, effective batch, rank and modules are the ones wanted
    min_sequence_length: int | None = None  # consent to shorten, down to here
    sequence_length_stated: bool = False  # False: ours to choose
    allow_near: bool = False  # --allow near
    min_lora_rank: int | None = None  # consent to a lower rank
    allow_fewer_modules: bool = False  # consent to fewer target modules
    memory_limit_bytes: int | None = None  # None: the whole card
    isolation: Isolation = Isolation.WARM
    lengths: LengthMix | None = None  # of the samples trained on; None: every sample is of full length
    fixed: tuple[tuple[str, Any], ...] = ()  # (field, value): only these of it may be tried; plain JSON data
    excluded: tuple[tuple[str, Any], ...] = ()  # (field, value) that may not be tried

    def __post_init__(self) -> None:
        if self.min_sequence_length is not None and self.min_sequence_length > self.start.sequence_length:
            raise ValueError(
                f"--min-sequence-length {self.min_sequence_length} is above"
                f" --sequence-length {self.start.sequence_length}: give a smaller minimum"
            )
        if self.min_lora_rank is not None and self.min_lora_rank > self.start.lora_rank:
            raise ValueError(f"--min-lora-rank {self.min_lora_rank} is above --lora-rank {self.start.lora_rank}")


#: Installed libraries that decide what a step allocates: fields of `Environment`, and their names on PyPI.
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The software that a measurement depends on. A version that is not installed is None."""

    driver: str | None
    torch: str | None
    transformers: str | None
    peft: str | None
    bitsandbytes: str | None
    accelerate: str | None
    trl: str | None
    python: str
    os: str  # "Linux", "Linux (WSL2)", "Windows"
    threads: int | None = None  # CPU targets: torch's thread count
    autotune: str | None = None

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of what decides memory and speed (autotune's own version does not)."""
        facts = {key: value for key, value in dataclasses.asdict(self).items() if key != "autotune"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLimits:
    """Seconds each phase of a probe may take; past one the whole tree is ended."""

    start_s: float = 120.0  # process up, libraries imported
    build_s: float = 300.0  # model, adapters, optimizer
    step_s: float = 300.0  # any one micro batch, optimizer step or evaluation
    checkpoint_s: float = 120.0
    heartbeat_s: float = 60.0  # silence that counts as a hang


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """One probe: a config on a device under a limit."""

    model: ModelSource
    config: TrainingConfig
    device: str  # torch's name: "cpu", "cuda:0"
    memory_limit_bytes: int | None  # CPU: of tensors and buffers; CUDA: of the whole card
    headroom_bytes: int = 0
    proof: bool = False  # real optimizer steps, nothing primed, then an evaluation and a checkpoint
    optimizer_steps: int = 1  # a proof takes at least 3: Adam's state appears after the first
    micro_batches: int = 6  # timed at most, a proof two a step; memory does not depend on more
    device_used_before_bytes: int | None = None  # on the card before the worker started: other tenants
    beat_s: float | None = None  # of a timed micro batch: a config that is surely slower is cut short (racing)
    timed_lengths: tuple[int, ...] = ()  # tokens that each timed micro batch is padded to, in turn; (): full length
    tokens_per_sample: float | None = None  # of a row, padding left out; None: rows are full. Only passed on
    seed: int = 0
    limits: ProbeLimits = field(default_factory=ProbeLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a probe died, as it was seen. Facts only."""

    phase: str  # "start", "import", "build", "forward", "backward", "optimizer", "evaluate", "checkpoint"
    exception: str | None = None  # fully qualified class
    chain: tuple[str, ...] = ()  # "class: message" of causes, outermost first
    message: str = ""
    traceback: str = ""
    at_limit: bool = False  # the parent ended it at this phase's time limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What one probe measured: facts only. `verdict.classify` says what they mean."""

    phases_s: dict[str, float] = field(default_factory=dict)  # seconds by phase name
    micro_batch_times_s: tuple[float, ...] = ()  # forward and backward, warm-up left out
    timed_lengths: tuple[int, ...] = ()  # tokens that these were padded to, in turn; (): full length
    tokens_per_sample: float | None = None  # of a row, padding left out; None: rows were full
    optimizer_times_s: tuple[float, ...] = ()  # clip, step and zero_grad, warm-up left out
    cut_short: bool = False  # it could not beat `ProbeRequest.beat_s` any more
    eval_time_s: float | None = None
    loss: float | None = None  # last training loss; None after timed steps: it was not finite
    losses: tuple[float, ...] = ()  # the finite ones, warm-up included
    optimizer_state_bytes: int | None = None
    skipped_steps: int = 0  # optimizer steps that a gradient scaler skipped
    after_load_bytes: int | None = None  # live tensors after the model, adapters and optimizer are built
    peak_allocated_bytes: int | None = None  # None: died before the first step
    peak_reserved_bytes: int | None = None  # CUDA: held by the caching allocator; CPU: growth of VmData at its peak
    device_used_bytes: int | None = None  # NVML's used memory at the peak; CPU: peak resident bytes
    device_free_bytes: int | None = None  # free on the card just after, or at death
    device_used_before_bytes: int | None = None  # NVML's used memory before the worker started: others', the display's
    limit_bytes: int | None = None  # what was enforced, in the allocator's terms
    unquantized_bytes: int | None = None  # linear weights that had to stay 16-bit (3-D experts)
    parameters: int | None = None
    trainable_parameters: int | None = None
    tenants: tuple[Tenant, ...] = ()
    failure: Failure | None = None
    exit_code: int | None = None  # None: killed at a time limit, or still running (warm)
    signal: int | None = None
    pid: int | None = None  # of the process that trained
    log_tail: str = ""  # end of what it printed
    isolation: Isolation = Isolation.FRESH
    wall_time_s: float = 0.0  # start to finish as the parent saw it
    startup_s: float = 0.0  # of that, what was not training steps

    def step_time_s(self, gradient_accumulation_steps: int) -> float | None:
        """Seconds of one optimizer step: accumulation × median micro batch + median optimizer time.

        Of several timed lengths, the mean over them of each one's median: they stand for equal shares of the batches.
        """
        lengths = max(1, len(self.timed_lengths))
        whole = self.micro_batch_times_s[: len(self.micro_batch_times_s) // lengths * lengths]  # rounds of all lengths
        if not whole or not self.optimizer_times_s:
            return None
        import statistics

        micro = statistics.fmean(statistics.median(whole[number::lengths]) for number in range(lengths))
        return gradient_accumulation_steps * micro + statistics.median(self.optimizer_times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict with what it rests on and the one action that belongs to it."""

    verdict: Verdict
    evidence: tuple[str, ...] = ()
    action: str = ""
    numbers: dict[str, int] = field(default_factory=dict)  # bytes read from the text: tried, free, total, …
    settle: str | None = None  # ambiguous only: what would settle it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is expected before measuring. Never a measurement."""

    peak_allocated_bytes: int  # of a whole run: training and an evaluation
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    step_time_s: float | None = None
    training_peak_allocated_bytes: int | None = None  # without the evaluation, as a probe runs; None: an older row
    memory_factor: float | None = None  # learned from earlier trials, and in the bytes above; None: not known
    time_factor: float | None = None  # and in the seconds
    seconds_by_kind: dict[str, float] | None = None  # of an optimizer step by kind of operator, nothing learned in it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One finished trial: a row, append only."""

    request_id: str  # `FitRequest` without what does not change the answer, hashed
    model_name: str
    model_fingerprint: str
    device_slug: str
    config: TrainingConfig
    memory_limit_bytes: int | None
    report: ProbeReport
    judgement: Judgement
    environment: Environment
    origin: Origin
    time_utc: str  # ISO 8601
    prediction: Prediction | None = None
    moves: tuple[str, ...] = ()  # strategies taken from the request's start to this config
    id: int | None = None  # the row's, once stored

    @property
    def tokens_per_second(self) -> float | None:
        """Padding counted unless the report says how much of a row is none; None unless it fits and was timed."""
        step = self.report.step_time_s(self.config.gradient_accumulation_steps)
        if self.judgement.verdict is not Verdict.FITS or not step:
            return None
        tokens = self.report.tokens_per_sample or self.config.sequence_length
        return tokens * self.config.effective_batch_size / step

    @property
    def counts_padding(self) -> bool:
        """Whether `tokens_per_second` does."""
        return self.report.tokens_per_sample is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A strategy taken on the way to the recommendation, with what it cost and saved (measured, else null)."""

    name: str
    preserves: Preserves
    changed: dict[str, tuple[Any, Any]]  # field: (from, to)
    saved_bytes: int | None = None  # peak before less peak after
    speed_ratio: float | None = None  # tokens/s after ÷ before


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierRow:
    """The fastest config at one sequence length; where nothing fits, the one that needs least."""

    config: TrainingConfig
    origin: Literal["measured", "predicted"]
    fits: bool
    tokens_per_second: float | None = None  # counted as the proof's are; None: it does not fit
    memory_bytes: int | None = None  # in use on the whole device at the peak; CPU: what the limit is compared with

    @property
    def sequence_length(self) -> int:
        return self.config.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """Where nothing fits: something that could still be allowed, and whether a config is predicted to fit with it."""

    kind: Literal["shorter_sequence", "lower_rank", "fewer_modules", "near", "wider_search", "more_memory"]
    option: str | None  # of the command line; None: no option gives it (a larger card)
    config: TrainingConfig  # the first that fits, in the order of what is given up; else the one that needs least
    needed_bytes: int  # that it is likely to need on the whole device; CPU: what the limit is compared with
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What a fit hands back."""

    status: FitStatus
    device: Device
    rehearsal: bool
    request: FitRequest
    proof: TrialRecord | None  # the proven trial; None when nothing fits
    trials: tuple[TrialRecord, ...]
    moves: tuple[Move, ...] = ()
    notes: tuple[str, ...] = ()
    from_database: bool = False
    probes: int = 0
    out_of_memory: int = 0
    wall_time_s: float = 0.0
    frontier: tuple[FrontierRow, ...] = ()  # by sequence length, ascending
    consents: tuple[Consent, ...] = ()  # where nothing fits: all that could be allowed and is not; predicted


def to_json(value: Any) -> Any:
    """A value of this module as plain JSON data: enums as text, tuples as lists, unknown and not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {**data, "config": value.config} if isinstance(value, ModelSource) else data  # a file's own numbers stay
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(kind: type[T], data: Any) -> T:
    """Read back what `to_json` wrote. Unknown keys are ignored (a newer version wrote them).

    Raises ValueError or TypeError for data that is not of this kind.
    """
    return typing.cast(T, _read(kind, data))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Field name → its type, of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _read(kind: Any, data: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _read(next(arg for arg in args if arg is not type(None)), data)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_read(args[0], item) for item in data)
        return tuple(_read(arg, item) for arg, item in zip(args, data, strict=True))
    if origin is dict:
        return {key: _read(args[1], item) for key, item in data.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise ValueError(f"expected an object for {kind.__name__}, found {type(data).__name__}")
        hints = _hints(kind)
        return kind(**{key: _read(hints[key], item) for key, item in data.items() if key in hints})
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and kind in (int, float, str, bool) and not isinstance(data, kind):
        raise ValueError(f"expected {kind.__name__}, found {data!r}")
    return data
