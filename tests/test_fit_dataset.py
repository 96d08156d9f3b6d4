"""A dataset's lengths enter the request, and what was counted is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.cli.fit_dataset import Dataset, dataset_document, read_dataset, with_dataset
from autotune.cli.fit_text import print_fit, time_of_training
from autotune.errors import InvalidRequest, UsageError
from autotune.mix import packed_variant, tokens_per_row, with_mix
from autotune.recommendation import fit_document
from autotune.values import FitRequest, FitStatus, ProbeRequest, Recommendation, TrainingConfig
from tests.fakes import FakeExecutor, a_cpu, a_request
from tests.trial_records import trial


def a_dataset(folder: Path, *rows: dict[str, Any], tokenizer: str | None = None) -> Dataset:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_dataset(path, tokenizer)
    assert found is not None
    return found


def a_result(request: FitRequest, config: TrainingConfig) -> Recommendation:
    """As a fit gives it, with a proof of `config` at the request's lengths."""
    probe = ProbeRequest(model=request.model, config=config, device="cpu", memory_limit_bytes=None)
    proof = trial(config=config, report=FakeExecutor().probe(with_mix(probe, request.lengths)))
    return Recommendation(
        status=FitStatus.FITTED, device=a_cpu(), rehearsal=True, request=request, proof=proof, trials=(proof,)
    )


def test_memory_is_asked_for_at_the_longest_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = a_dataset(tmp_path, {"input_ids": [1] * 20}, {"input_ids": [1] * 101}, {"input_ids": []})
    request = with_dataset(a_request(sequence_length=256, min_sequence_length=128), dataset)
    assert (request.start.sequence_length, request.min_sequence_length) == (104, 104)
    assert request.lengths is not None
    assert request.lengths.quantiles == (20.0, 101.0)
    said = capsys.readouterr().err
    assert "2 samples, 60 tokens on average, the longest 101 (as tokenised)" in said
    assert "Memory is proven at 104 tokens, the longest batch that a run can meet, not at 256" in said
    assert "1 samples hold no token" in said


def test_longer_samples_are_truncated_at_what_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = a_dataset(tmp_path, {"length": 20}, {"length": 5000})
    request = with_dataset(a_request(sequence_length=256), dataset)
    assert request.start.sequence_length == 256
    assert "1 (50.0%) are truncated, from 5,000" in capsys.readouterr().err


def test_guessed_lengths_prove_memory_at_full_length_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = with_dataset(a_request(sequence_length=256), a_dataset(tmp_path, {"text": "x" * 100}))
    assert request.start.sequence_length == 256
    assert request.lengths is not None
    assert request.lengths.longest == 25
    said = capsys.readouterr().err
    assert "GUESSED as UTF-8 bytes ÷ 4" in said
    assert "proven at all of 256 tokens" in said
    assert "--tokenizer counts it" in said


def test_messages_say_that_no_template_is_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_dataset(a_request(), a_dataset(tmp_path, {"messages": [{"role": "user", "content": "hello"}]}))
    assert "no chat template is applied: 8 tokens a message" in capsys.readouterr().err


def test_unknown_fields_without_a_tokenizer_leave_every_sample_at_full_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = a_dataset(tmp_path, {"label": 1})
    assert dataset.lengths is None
    assert with_dataset(a_request(), dataset) == a_request()
    assert dataset_document(dataset, None)["lengths"] is None
    assert "every sample counts as one of full length" in capsys.readouterr().err


def test_what_makes_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --dataset too"):
        read_dataset(None, "somewhere")
    with pytest.raises(InvalidRequest, match="no sample has more than one token"):
        a_dataset(tmp_path, {"length": 1})
    with pytest.raises(InvalidRequest, match="no such tokenizer"):
        a_dataset(tmp_path, {"text": "a"}, tokenizer="no/such-tokenizer")
    assert read_dataset(None, None) is None


def test_the_result_says_that_padding_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = a_dataset(tmp_path, *({"length": n} for n in range(10, 210)))
    request = with_dataset(a_request(), dataset)
    config = request.start
    result = a_result(request, config)
    document = fit_document(result)
    assert document["measured"]["tokens_per_second_counts_padding"] is False
    assert document["measured"]["tokens_per_sample"] == pytest.approx(109.5, abs=0.1)
    assert len(document["measured"]["timed_lengths"]) == 4
    assert dataset_document(dataset, request.lengths)["lengths"]["counted"] == "tokens"
    json.dumps(document, allow_nan=False)
    print_fit(result, time_of_training(result, dataset.facts, 2.0))
    said = capsys.readouterr().out
    assert "padding NOT counted, at the dataset's own lengths" in said
    assert "Dataset: 200 samples, 110 tokens on average, the longest 209" in said
    assert "50 optimizer steps" in said
    assert "at the dataset's lengths." in said


def test_a_packed_result_says_its_samples_and_needs_fewer_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = a_dataset(tmp_path, *({"length": 64} for _ in range(159)), {"length": 256})
    request = with_dataset(a_request(), dataset)
    assert request.lengths is not None
    packed = packed_variant(request.start, request.lengths)
    result = a_result(request, packed)
    assert result.proof is not None
    assert result.proof.report.tokens_per_sample == tokens_per_row(packed, request.lengths) == 256
    training = time_of_training(result, dataset.facts, 1.0)
    assert training is not None
    assert training["optimizer_steps"] == 21  # 7.85 samples each
    print_fit(result, training)
    assert "Packed: about 7.85 samples an optimizer step, 8 were asked for." in capsys.readouterr().out
