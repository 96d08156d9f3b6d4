"""Contexts taken for cards, against what out-of-memory messages of such cards say."""

from __future__ import annotations

import statistics

import pytest

from autotune.hardware.cards import Card, cards, find_card
from autotune.predict.context import SPREAD, Context, context_of
from autotune.values import MIB
from benchmarks.contexts import MESSAGES, read_contexts, unseen_bytes, unseen_text

PUBLISHED = read_contexts(MESSAGES)


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_every_published_context_lies_in_its_cards_interval(card: Card) -> None:
    taken, found = context_of(card), PUBLISHED[card]
    margin = 15 * MIB  # the messages' rounding
    assert taken.low_bytes - margin <= found[0] <= found[-1] <= taken.high_bytes + margin
    assert taken.likely_bytes == pytest.approx(statistics.median(found), rel=0.2)


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_a_card_that_the_fit_has_not_seen_lies_within_a_sixth_of_it(card: Card) -> None:
    unseen, found = unseen_bytes(card, PUBLISHED), PUBLISHED[card]
    margin = 15 * MIB
    assert statistics.median(found) == pytest.approx(unseen, rel=0.17)
    assert SPREAD[0] * unseen - margin <= found[0] <= found[-1] <= SPREAD[1] * unseen + margin


def test_a_cards_own_messages_do_not_move_what_is_said_of_it_unseen() -> None:
    card = find_card("RTX 3090").card
    moved = {**PUBLISHED, card: [10 * size for size in PUBLISHED[card]]}
    assert unseen_bytes(card, moved) == unseen_bytes(card, PUBLISHED)
    assert unseen_bytes(find_card("T4").card, moved) != unseen_bytes(find_card("T4").card, PUBLISHED)


def test_the_table_says_how_far_unseen_cards_are() -> None:
    words = unseen_text(PUBLISHED)
    assert "0.84 (NVIDIA RTX 6000 Ada Generation)" in words
    assert "1.14 (NVIDIA GeForce RTX 3090)" in words
    assert "47 of 49 messages" in words


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_every_card_has_a_context_with_its_source(card: Card) -> None:
    taken = context_of(card)
    assert 0 < taken.low_bytes <= taken.likely_bytes <= taken.high_bytes
    assert taken.source


def of(name: str) -> Context:
    return context_of(find_card(name).card)


def test_a_card_with_more_multiprocessors_has_a_larger_context() -> None:
    small, large = of("RTX 3060"), of("RTX 3090")
    assert 100 * MIB < small.likely_bytes < large.likely_bytes / 2


def test_a_card_that_nobody_measured_has_the_usual_one_and_says_so() -> None:
    assert "not measured" in of("RX 9070").source
