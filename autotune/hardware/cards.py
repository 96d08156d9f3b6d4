"""The catalogue of GPU cards one may not own, and which of them a name means."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from autotune.errors import InvalidRequest
from autotune.values import MIB

_RATES = ("fp32", "tf32", "fp16", "bf16")
_LISTED = 8  # names in one message
_LONGEST_NAME = 200  # characters; no card's name is near it
_LONGEST_SHOWN = 60  # characters of what was asked for, in a message

#: Words that say which variant of a model a card is: without them the plain card is meant.
_VARIANTS = frozenset({"ti", "super", "laptop", "maxq", "d", "xt", "xtx", "gre", "nvl", "sff", "server"})
#: Words that do not tell one model from another.
_NOISE = re.compile(r"nvidia|geforce|amd|radeon|tesla|intel|gpu|sxm\d*|pcie|hbm\w*|\d+gb|edition|generation")
_ANY_CARD = frozenset({"gpu", "graphics", "card"})
_SAME_WORD = {"mobile": "laptop", "notebook": "laptop", "gen": "generation"}
_SIZE = r"(?<!\d)(\d{1,4})\s*g(?:i?b)?\b"
#: How people write → how the catalogue writes, on lower case.
_SPELLING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\((?:r|tm|c)\)|[®™©]", " "),
        (r"\bmax[-\s]?q\b", "maxq"),
        (r"\bpci-?e\b", "pcie"),
        (r"tisuper\b", "ti super"),
        (r"\b(geforce|quadro|tesla|radeon|rtx|gtx|rx|arc)(?=(?:rtx|rx)?[abw]?\d)", r"\1 "),
        (r"\b(rtx|rx)(?=[abw]?\d)", r"\1 "),
        (r"(?<=\d)(?=(?:ti|super|xtx|xt|gre|nvl|d)\b)", " "),
        (_SIZE, r"\1gb"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernels:
    """Which attention kernels run on a card in 16 bits, forward and backward, with torch 2.13's defaults."""

    sdpa_flash: bool
    sdpa_efficient: bool
    sdpa_math: bool
    sdpa_cudnn_first: bool  # torch's SDPA tries cuDNN's kernel before the others
    flash_attention_2: bool  # the flash_attn package


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as a program sees it. A module of two dies that a program sees as two devices is half of it."""

    name: str  # NVML's, with the memory size where a model has several
    aliases: tuple[str, ...]
    vendor: Literal["nvidia", "amd", "intel"]
    segment: Literal["desktop", "laptop", "workstation", "server"]
    architecture: str  # "ampere"
    compute_capability: str | None  # "8.6"; AMD: gfx target; None: Intel has none
    memory_bytes: int  # what torch gives as total, on Linux and with a recent driver
    memory_nominal_gib: int  # as the card is sold, in its seller's "GB"
    bandwidth_bytes_per_s: int
    fp32_flops_per_s: float  # of a matrix product without TF32; all rates are dense, accumulating in float32
    tf32_flops_per_s: float | None
    fp16_flops_per_s: float
    bf16_flops_per_s: float | None  # None: no units for it, torch makes do with float32
    sm_count: int  # AMD: compute units; Intel: Xe cores
    boost_clock_mhz: int | None  # the one that its rates are stated for
    l2_bytes: int | None
    dtypes: tuple[str, ...]  # torch's names of what its matrix units multiply
    attention: AttentionKernels
    bitsandbytes: bool  # 4-bit weights and 8-bit optimizers
    bus: str
    sources: Mapping[str, str] = field(compare=False)  # of every field but the names

    @property
    def memory_is_measured(self) -> bool:
        """False: derived from other cards by the rule that its source states."""
        return not self.sources["memory_bytes"].startswith("derived")


_AS_WRITTEN = (
    *("name", "vendor", "segment", "architecture", "compute_capability", "memory_nominal_gib", "sm_count"),
    *("boost_clock_mhz", "bitsandbytes", "bus"),
)
_SOURCED = tuple(one.name for one in fields(Card) if one.name not in ("name", "aliases", "sources"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CardChoice:
    """The card that a name means, the names of the matches passed over, and a sentence to print about it."""

    card: Card
    others: tuple[str, ...]
    reason: str


@functools.cache
def cards() -> tuple[Card, ...]:
    """Every card, in the catalogue's order."""
    text = importlib.resources.files(__package__).joinpath("cards.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return tuple(_card(raw, data) for raw in data["cards"])


def find_card(name: str) -> CardChoice:
    """The card that `name` means, every word of which must be a word of the card's.

    Of several matches the one without a suffix that was not asked for, then the one with most memory; cards equal in
    model and memory are one for memory, and the faster is taken. Raises `InvalidRequest` with up to 8 names.
    """
    words = _words(name) if len(name) <= _LONGEST_NAME else frozenset()
    if not words:
        raise InvalidRequest(f'"{_shown(name)}" names no card: give a name like "RTX 3060" or "A100 80GB"')
    found = [card for card in cards() if words <= _words_of(card)]
    if not found:
        raise InvalidRequest(_unknown(name, words))
    if not _names_a_model(words):
        raise InvalidRequest(f'"{_shown(name)}" names no model: name one in full, such as {_listed(found)}')
    plain = [card for card in found if not (_model(card) & _VARIANTS) - words]
    if not plain:
        raise InvalidRequest(
            f'"{_shown(name)}" alone means the card without suffix, and the catalogue has {_listed(found)}: name it'
        )
    if len({_model(card) for card in plain}) > 1:
        also = [card for card in cards() if card in plain or _is_namesake(card, words)]
        raise InvalidRequest(f'"{_shown(name)}" could be any of {_listed(also)}: name one of them in full')
    chosen = max(plain, key=lambda card: (card.memory_nominal_gib, card.bandwidth_bytes_per_s))
    others = tuple(card.name for card in found if card is not chosen)
    return CardChoice(card=chosen, others=others, reason=_reason(name, chosen, plain, found))


def _card(raw: Mapping[str, Any], data: Mapping[str, Any]) -> Card:
    """A card with what its family and its architecture say of it, sources resolved."""
    family = data["families"][raw["family"]]
    architecture = data["architectures"][family["architecture"]]
    facts: dict[str, Any] = {**architecture, **family, **raw}
    values: dict[str, Any] = {f"{name}_flops_per_s": _rate(name, facts) for name in _RATES}
    stated = {**architecture["sources"], **family.get("sources", {}), **raw["sources"]}
    sources = {
        key: _resolved(stated.get(key) or (stated["rates"] if key in values else raw["source"]), data["sources"])
        for key in _SOURCED
    }
    for key in (key for key, value in values.items() if value is None):
        sources[key] = f"None: no units for it; {sources[key]}"
    return Card(
        **values,
        **{key: facts[key] for key in _AS_WRITTEN},
        aliases=tuple(facts.get("aliases", ())),
        memory_bytes=facts["memory_mib"] * MIB,
        bandwidth_bytes_per_s=round(facts["bandwidth_gb_per_s"] * 10**9),
        l2_bytes=None if facts["l2_mib"] is None else round(facts["l2_mib"] * MIB),
        dtypes=tuple(facts["dtypes"]),
        attention=AttentionKernels(**facts["attention"]),
        sources=MappingProxyType(sources),
    )


def _rate(name: str, facts: Mapping[str, Any]) -> float | None:
    """FLOP/s: as stated for the card, else FLOP per clock and SM × SMs × clock."""
    if name in facts.get("rates_tflops", {}):
        return float(facts["rates_tflops"][name]) * 1e12
    per_clock = facts["flops_per_clock_per_sm"][name]
    return None if per_clock is None else float(per_clock * facts["sm_count"] * facts["boost_clock_mhz"]) * 1e6


def _resolved(text: str, shared: Mapping[str, str]) -> str:
    """ "@wikipedia_nvidia; …": the shared source of that name, and what is added to it."""
    match = re.match(r"@(\w+)", text)
    return shared[match[1]] + text[match.end() :] if match else text


def _words(text: str) -> frozenset[str]:
    """ "RTX3060Ti 12 GiB" → rtx, 3060, ti, 12gb."""
    spelled = text.lower()
    for pattern, replacement in _SPELLING:
        spelled = pattern.sub(replacement, spelled)
    return frozenset(_SAME_WORD.get(word, word) for word in re.findall(r"[^\W_]+", spelled))


@functools.cache
def _words_of(card: Card) -> frozenset[str]:
    """All that a name may say of this card."""
    words = _words(" ".join((card.name, *card.aliases, f"{card.memory_nominal_gib}GB", card.vendor))) | _ANY_CARD
    return words | {"sxm"} if any(word.startswith("sxm") for word in words) else words


@functools.cache
def _model(card: Card) -> frozenset[str]:
    """The words that tell this model from others."""
    return frozenset(word for word in _words(card.name) if not _NOISE.fullmatch(word))


def _names_a_model(words: Iterable[str]) -> bool:
    """Brand, size and suffix alone are no model; every model but the Titan has a number."""
    return any(word == "titan" or (re.search(r"\d", word) and not _NOISE.fullmatch(word)) for word in words)


def _is_namesake(card: Card, words: Iterable[str]) -> bool:
    """An RTX A6000, for "6000": not a match, but one that may have been meant."""
    numbers = [word for word in words if re.fullmatch(r"\d{4}", word)]
    return any(re.fullmatch(rf"[a-z]{number}", word) for number in numbers for word in _model(card))


def _reason(name: str, chosen: Card, plain: Sequence[Card], found: Sequence[Card]) -> str:
    why: list[str] = []
    if len(plain) < len(found):
        why.append(f"the {'desktop ' if chosen.segment == 'desktop' else ''}card without suffix")
    if any(card.memory_nominal_gib < chosen.memory_nominal_gib for card in plain):
        why.append("the largest memory")
    if sum(card.memory_nominal_gib == chosen.memory_nominal_gib for card in plain) > 1:
        why.append("of those with that memory the fastest")
    explained = f": {', '.join(why)}" if why else ""
    return f'"{_shown(name)}" means {chosen.name}{explained}.'


def _unknown(name: str, words: frozenset[str]) -> str:
    nearest = _nearest(words)
    hint = f"nearest are {_listed(nearest)}" if nearest else "docs/cards.md lists them"
    return f'"{_shown(name)}" is none of the {len(cards())} cards of the catalogue: name one of them; {hint}'


def _nearest(words: frozenset[str]) -> list[Card]:
    """Up to 8 cards with a word like one that was asked for, most alike first."""
    asked = [word[:_LONGEST_SHOWN] for word in sorted(words) if re.search(r"\d", word)]

    def likeness(card: Card) -> float:
        models = [word for word in _model(card) if re.search(r"\d", word)]
        ratios = [difflib.SequenceMatcher(None, one, other).ratio() for one in asked for other in models]
        return max(ratios, default=0.0) + 0.01 * len(words & _words_of(card))

    ranked = sorted(((likeness(card), card) for card in cards()), key=lambda pair: -pair[0])
    return [card for score, card in ranked[:_LISTED] if score >= 0.7]


def _listed(found: Sequence[Card]) -> str:
    names = ", ".join(card.name for card in found[:_LISTED])
    return f"{names} and {len(found) - _LISTED} more" if len(found) > _LISTED else names


def _shown(text: str) -> str:
    """What was asked for, on one line and not too long."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _LONGEST_SHOWN else line[: _LONGEST_SHOWN - 1] + "…"
