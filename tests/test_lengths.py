"""A dataset's lengths are counted as they are, guessed where nothing counts them, and a broken sample is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidRequest
from autotune.lengths import END_TOKENS, TEMPLATE_TOKENS, NoText, read_lengths


def rows(path: Path, *content: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of a token a word, that would truncate and pad if it were let."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"?": 0, "a": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ({"text": "a a a a a"}, 5 + END_TOKENS),
        ({"prompt": "a a", "completion": "a"}, 3 + END_TOKENS),
        ({"instruction": "a a", "input": "", "output": "a a"}, 4 + END_TOKENS),
        ({"instruction": "a a", "output": "a a"}, 4 + END_TOKENS),
        ({"instruction": "a", "input": "a", "response": "a"}, 3 + END_TOKENS),
        ({"messages": [{"role": "user", "content": "a a"}, {"content": "a"}]}, 3 + END_TOKENS + 2 * TEMPLATE_TOKENS),
        ({"conversations": [{"from": "human", "value": "a a"}]}, 2 + END_TOKENS + TEMPLATE_TOKENS),
        ({"messages": [{"content": [{"type": "text", "text": "a a"}]}]}, 2 + END_TOKENS + TEMPLATE_TOKENS),
        ({"prompt": [{"content": "a"}], "completion": [{"content": "a"}]}, 2 + END_TOKENS + 2 * TEMPLATE_TOKENS),
        ({"text": "a \ud800 a"}, 3 + END_TOKENS),
        ({"input_ids": [1, 2, 3], "text": "a"}, 3),
        ({"length": 7}, 7),
    ],
)
def test_a_sample_has_the_tokens_that_its_fields_hold(
    tmp_path: Path, words: str, row: dict[str, Any], tokens: int
) -> None:
    found = read_lengths(rows(tmp_path / "a.jsonl", row, row), words)
    assert list(found.tokens) == [tokens, tokens]
    assert found.counted == ("tokens" if "input_ids" in row or "length" in row else "tokenizer")


def test_every_format_of_text_is_counted_alike(tmp_path: Path, words: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["a a", "a", "a a a"]
    table = arrow.table({"label": [1, 2, 3], "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    with arrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    rows(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "a.csv").write_text("label,text\n" + "".join(f"1,{text}\n" for text in texts))
    found = {path.name: list(read_lengths(path, words).tokens) for path in tmp_path.iterdir()}
    assert set(map(tuple, found.values())) == {(2, 3, 4)}
    assert len(found) == 6


@pytest.mark.parametrize("kind", ["list_", "large_list"])
def test_tokenised_arrow_is_counted_without_a_tokenizer(tmp_path: Path, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    ids = arrow.array([[1] * 5, [], [1] * 900, None], getattr(arrow, kind)(arrow.int32()))
    table = arrow.table({"text": ["x" * 1000] * 4, "input_ids": ids})
    with arrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = read_lengths(tmp_path / "a.arrow")
    mix = found.mix(512)
    assert (list(found.tokens), found.empty, found.counted) == ([5, 900], 2, "tokens")
    assert (mix.longest, mix.longest_untruncated, mix.truncated, mix.samples) == (512, 900, 1, 2)
    assert mix.quantiles == (5.0, 512.0)


def test_lengths_of_arrow_are_read_from_their_column(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"length": [3, 0, 5]})
    with arrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = read_lengths(tmp_path)
    assert (list(found.tokens), found.empty, found.counted) == ([3, 5], 1, "tokens")


def test_without_a_tokenizer_bytes_are_a_guess(tmp_path: Path) -> None:
    found = read_lengths(rows(tmp_path / "a.jsonl", {"text": "é" * 6}, {"text": ""}))
    assert (list(found.tokens), found.empty, found.counted) == ([3], 1, "estimate")
    assert not found.mix(2048).is_exact


def test_many_samples_become_64_slices_that_keep_the_mean(tmp_path: Path) -> None:
    mix = read_lengths(rows(tmp_path / "a.jsonl", *({"length": n} for n in range(1, 1001)))).mix(10_000)
    assert len(mix.quantiles) == 64
    assert mix.mean_tokens == pytest.approx(500.5, abs=0.01)
    assert mix.longest == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"label": 1}], r"line 1: has neither input_ids nor a text that is known \(text; messages;.*rename"),
        ([{"text": "a"}, {"label": 1}], "line 2: has neither"),
        ([{"text": 3}], "line 1: text must be text or a list of messages, not int"),
        ([{"messages": "a"}, {"messages": [1]}], "line 2: messages must be text or a list of messages, not list"),
        ([{"messages": [{"content": 1}]}], "a message's content must be text, not int"),
        ([{"input_ids": 3}], "line 1: input_ids must be a list of tokens, not int"),
        ([{"input_ids": [1]}, {"text": "a"}], "line 2: input_ids must be a list of tokens, not NoneType"),
        ([{"length": -1}], "line 1: length must be a number of tokens, not -1"),
        ([{"length": 1.5}], "length must be a number of tokens, not 1.5"),
        ([{"length": 10**30}], "length must be a number of tokens, not 1000"),
        ([{"length": "9" * 5000}], "length must be a number of tokens, not '999"),
        ([{"text": ""}, {"text": None}], "not one of its 2 samples holds a token"),
        ([{"input_ids": []}], "not one of its 1 samples holds a token"),
        ([{"length": 0}], "not one of its 1 samples holds a token"),
        ([], "holds no samples"),
    ],
)
def test_what_cannot_be_counted_is_named(tmp_path: Path, content: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_lengths(rows(tmp_path / "a.jsonl", *content))
    assert isinstance(caught.value, NoText) == ("has neither" in message)


def test_a_column_that_is_no_list_is_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"input_ids": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidRequest, match="input_ids must hold lists of tokens, not string"):
        read_lengths(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(NoText, match=r"b\.parquet, row 1: has neither"):
        read_lengths(tmp_path / "b.parquet")


def test_a_tokenizer_that_is_not_there_or_broken_is_named(tmp_path: Path) -> None:
    data = rows(tmp_path / "a.jsonl", {"text": "a"})
    for name in ("no/such-tokenizer", "./nowhere", "a b"):
        with pytest.raises(InvalidRequest, match="no such folder, and no such tokenizer in the Hugging Face cache"):
            read_lengths(data, name)
    with pytest.raises(InvalidRequest, match=r"the folder has no tokenizer\.json"):
        read_lengths(data, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_lengths(data, str(tmp_path))


def test_a_tokenizer_is_taken_from_the_cache_by_its_id(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: str(Path(words) / file) if name == "me/it" else None,
    )
    assert list(read_lengths(rows(tmp_path / "a.jsonl", {"text": "a a"}), "me/it").tokens) == [3]


def test_counting_imports_no_torch(tmp_path: Path, words: str) -> None:
    data = rows(tmp_path / "a.jsonl", {"text": "a a"})
    program = (
        "import sys\nfrom pathlib import Path\nfrom autotune.lengths import read_lengths\n"
        f"assert list(read_lengths(Path({str(data)!r}), {words!r}).tokens) == [3]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
