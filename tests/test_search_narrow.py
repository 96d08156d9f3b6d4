from __future__ import annotations

from typing import Any

import pytest

from autotune.errors import AutotuneError, InvalidRequest, UsageError
from autotune.search.climb import climb
from autotune.search.dimensions import SEARCHED
from autotune.search.narrow import Narrowing, read_narrowing
from autotune.search.space import SearchSpace, build_space
from autotune.search.study import Search
from autotune.tuner import request_id
from autotune.values import MIB, Attention, Device, FitRequest, Upcast, from_json, to_json
from strategies import LADDER
from tests.fakes import Law, a_cpu, a_gpu, a_request, observe

EVERYTHING = ("flash_attn", "liger_kernel")


def narrowed(*fix: str, exclude: tuple[str, ...] = (), space: dict[str, Any] | None = None) -> Narrowing:
    return read_narrowing(fix, exclude, space or {})


def a_space(
    *fix: str,
    exclude: tuple[str, ...] = (),
    space: dict[str, Any] | None = None,
    device: Device | None = None,
    installed: tuple[str, ...] = EVERYTHING,
    **changes: Any,
) -> SearchSpace:
    narrowing = narrowed(*fix, exclude=exclude, space=space)
    request = a_request(fixed=narrowing.fixed, excluded=narrowing.excluded, **changes)
    return build_space(request, device or a_gpu(), installed=installed)


def values_of(space: SearchSpace, name: str) -> set[Any]:
    return {getattr(config, name) for config in space.configs()}


@pytest.mark.parametrize(
    ("text", "name", "value", "changes"),
    [
        ("micro_batch_size=4", "micro_batch_size", 4, {}),
        ("micro-batch-size = 3", "micro_batch_size", 3, {"allow_near": True}),
        ("gradient_checkpointing=full", "gradient_checkpointing", "full", {}),
        ("gradient_checkpointing=every_6", "gradient_checkpointing", "every_6", {}),
        ("attention=flash_attention_2", "attention", Attention.FLASH_ATTENTION_2, {}),
        ("attention=eager", "attention", Attention.EAGER, {}),
        ("loss=liger", "loss", "liger", {}),
        ("optimizer=paged_adamw_32bit", "optimizer", "paged_adamw_32bit", {}),
        ("optimizer=adamw_bnb_8bit", "optimizer", "adamw_bnb_8bit", {"allow_near": True}),
        ("upcast=norms", "upcast", Upcast.NORMS, {}),
        ("allocator=expandable_segments", "allocator", "expandable_segments", {}),
        ("double_quant=False", "double_quant", False, {"allow_near": True}),
        ("packing=false", "packing", False, {}),
    ],
)
def test_a_fixed_field_has_one_value_and_the_others_stay_free(
    text: str, name: str, value: Any, changes: dict[str, Any]
) -> None:
    space, free = a_space(text, **changes), a_space(**changes)
    assert values_of(space, name) == {value}
    assert getattr(space.start, name) == value
    assert [space.legal(config) for config in space.configs() if space.legal(config)] == []
    for other in set(SEARCHED) - {name}:
        assert values_of(space, other) == values_of(free, other)


@pytest.mark.parametrize("text", ["loss=liger", "micro_batch_size=4", "gradient_checkpointing=off", "attention=sdpa"])
def test_an_excluded_value_is_not_proposed_and_not_legal(text: str) -> None:
    name, _, value = text.partition("=")
    space, free = a_space(exclude=(text,)), a_space()
    assert {str(one) for one in values_of(free, name)} - {str(one) for one in values_of(space, name)} == {value}
    with_it = next(config for config in free.configs() if str(getattr(config, name)) == value)
    assert space.legal(with_it) == f"{text} is excluded"


def test_what_is_not_fixed_is_not_legal_and_says_so() -> None:
    space = a_space("micro_batch_size=4", "loss=chunked")
    free = a_space()
    assert space.legal(free.config_at(2)) == "micro_batch_size is fixed to 4"
    assert space.legal(free.config_at(4)) == "loss is fixed to chunked"


def test_a_file_lists_the_values_of_a_field_and_fix_chooses_among_them() -> None:
    file: dict[str, Any] = {"gradient_checkpointing": [False, "full"], "micro_batch_size": [2, 4], "upcast": "none"}
    space = a_space(space=file, upcast=Upcast.FP32)
    assert values_of(space, "gradient_checkpointing") == {"off", "full"}  # YAML reads a bare off as False
    assert values_of(space, "micro_batch_size") == {2, 4}
    assert space.start.micro_batch_size == 2
    assert values_of(space, "upcast") == {Upcast.NONE}
    assert values_of(a_space("micro_batch_size=4", space=file), "micro_batch_size") == {4}


def test_a_file_may_say_fix_and_exclude_as_the_command_line_does() -> None:
    assert narrowed(space={"fix": ["attention=sdpa"], "exclude": "loss=liger"}) == narrowed(
        "attention=sdpa", exclude=("loss=liger",)
    )


def test_what_is_said_twice_or_in_another_order_is_the_same_request() -> None:
    one = narrowed("loss=full", "attention=sdpa", exclude=("micro_batch_size=8", "micro_batch_size=1"))
    other = narrowed("attention=sdpa", "loss=full", "loss=full", exclude=("micro_batch_size=1", "micro_batch_size=8"))
    assert one == other
    ids = {request_id(a_request(fixed=each.fixed, excluded=each.excluded), 0) for each in (one, other)}
    assert len(ids) == 1


def test_narrowing_makes_another_request_and_none_leaves_its_id_as_it_was() -> None:
    plain = a_request()
    ids = {request_id(plain, 5)} | {
        request_id(a_request(**{name: (("loss", "full"),)}), 5) for name in ("fixed", "excluded")
    }
    assert len(ids) == 3
    assert request_id(plain, 5) == "d65c90262e4195cf"  # of a request stored before there was any narrowing


def test_a_narrowed_request_is_the_same_after_a_round_trip() -> None:
    narrowing = narrowed("micro_batch_size=4", exclude=("double_quant=false", "loss=liger"))
    request = a_request(fixed=narrowing.fixed, excluded=narrowing.excluded)
    assert from_json(FitRequest, to_json(request)) == request


@pytest.mark.parametrize(
    ("fix", "exclude", "space", "error", "words"),
    [
        (["atention=sdpa"], (), {}, UsageError, "did you mean attention?"),
        (["attention=flash"], (), {}, UsageError, "attention must be one of eager, sdpa, flash_attention_2"),
        (["micro_batch_size=0"], (), {}, UsageError, "micro_batch_size must be from 1"),
        (["sequence_length=64"], (), {}, UsageError, "--min-sequence-length"),
        ([], ("lora_rank=8",), {}, UsageError, "--min-lora-rank"),
        (["loss=full", "loss=chunked"], (), {}, UsageError, "contradict each other"),
        (["loss=full"], ("loss=full",), {}, UsageError, "is fixed and excluded"),
        ([], ("loss=full", "loss=liger"), {"loss": ["full", "liger"]}, UsageError, "loss=full or liger is fixed and"),
        (["loss=full"], (), {"loss": ["chunked"]}, UsageError, "contradicts --space, which allows chunked"),
        ([], (), {"losss": ["full"]}, InvalidRequest, "--space: 'losss' is no field of a search; did you mean loss?"),
        ([], (), {"loss": []}, InvalidRequest, "loss has no values"),
        ([], (), {"fix": ["loss"]}, InvalidRequest, "--space, fix loss: give a field and a value"),
        ([], (), {"double_quant": "no"}, InvalidRequest, "double_quant must be true or false"),
    ],
)
def test_what_cannot_be_meant_says_what_to_do(
    fix: list[str], exclude: tuple[str, ...], space: dict[str, Any], error: type[AutotuneError], words: str
) -> None:
    with pytest.raises(error) as caught:
        read_narrowing(fix, exclude, space)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fix", "exclude", "options", "words"),
    [
        (["attention=flash_attention_2"], (), {"installed": ()}, "but flash_attn is not installed"),
        (["loss=liger"], (), {"installed": ()}, "but liger_kernel is not installed"),
        (["loss=liger"], (), {"device": a_cpu()}, "but Liger's kernels do not run on cpu"),
        (["allocator=expandable_segments"], (), {"device": a_cpu()}, "does not run on cpu"),
        (["optimizer=adamw_bnb_8bit"], (), {}, "needs --allow near"),
        (["optimizer=sgd"], (), {}, "so give --optimizer sgd"),
        (["double_quant=true"], (), {"double_quant": False}, "needs --allow near"),
        (["packing=true"], (), {"allow_near": True}, "--dataset"),
        ([], ("loss=full", "loss=chunked"), {"device": a_cpu()}, "every value of loss that can run here is excluded"),
        (["micro_batch_size=3"], (), {}, "give one of 1, 2, 4, 8, or --allow near: 3 then"),
        (["micro_batch_size=5"], (), {"allow_near": True}, "does not divide the 8 samples"),
        ([], tuple(f"micro_batch_size={n}" for n in (1, 2, 4, 8)), {}, "leave one of 1, 2, 4, 8 in"),
    ],
)
def test_an_empty_space_says_which_restriction_left_nothing_and_why(
    fix: list[str], exclude: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match="nothing is left to try") as caught:
        a_space(*fix, exclude=exclude, **options)
    assert words in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("fix", "exclude"),
    [
        (("micro_batch_size=2",), ()),
        (("gradient_checkpointing=full",), ("loss=chunked",)),
        ((), ("gradient_checkpointing=every_2", "gradient_checkpointing=off")),
        (("attention=eager", "upcast=fp32"), ()),
        (("optimizer=paged_adamw_32bit",), ("micro_batch_size=1",)),
    ],
)
def test_a_climb_obeys_too(fix: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    space = a_space(*fix, exclude=exclude)
    search = Search(space, climb(space, LADDER, space.request, space.device))
    asked = []
    while (proposal := search.ask()) is not None:
        asked.append(proposal.config)
        search.tell(proposal, observe(Law(), proposal.config, 1500 * MIB))
    assert len(asked) > 1
    assert [space.legal(config) for config in asked] == [None] * len(asked)
    assert search.outcome().best is not None
