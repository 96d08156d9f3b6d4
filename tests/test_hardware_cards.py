"""The catalogue of cards: complete, sourced, consistent, and found by what people call a card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import AutotuneError, InvalidRequest
from autotune.hardware.cards import Card, cards, find_card
from autotune.values import MIB
from benchmarks.card_table import card_table

ROOT = Path(__file__).parent.parent
CARDS = cards()
BY_NAME = {card.name: card for card in CARDS}
RAW = json.loads((ROOT / "autotune/hardware/cards.json").read_text(encoding="utf-8"))
EACH_CARD = pytest.mark.parametrize("card", CARDS, ids=list(BY_NAME))
G = "NVIDIA GeForce RTX "


def tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


# Completeness


def test_the_catalogue_covers_what_people_train_on() -> None:
    assert len(CARDS) == len(BY_NAME) >= 140
    counted = Counter((card.vendor, card.segment) for card in CARDS)
    assert counted["nvidia", "desktop"] >= 35
    assert counted["nvidia", "laptop"] >= 20
    assert counted["nvidia", "workstation"] >= 20
    assert counted["nvidia", "server"] >= 25
    assert counted["amd", "desktop"] >= 12
    assert counted["amd", "server"] >= 8
    assert counted["intel", "desktop"] >= 6


@EACH_CARD
def test_every_field_has_a_source(card: Card) -> None:
    without = {"name", "aliases", "sources"}
    assert set(card.sources) == {key for key in Card.__slots__ if key not in without}
    for key, text in card.sources.items():
        assert len(text) > 10, key
        assert not text.startswith("@"), key
    unknown = [key for key in card.sources if getattr(card, key) is None]
    assert all(card.sources[key].startswith("None: ") for key in unknown)


@EACH_CARD
def test_a_source_says_whether_it_was_opened(card: Card) -> None:
    origins = r"opened|public|^derived|^PyTorch|^torch|^device properties|^None: |as in the source|Ollama|hashcat"
    assert all(re.search(origins, text) for text in card.sources.values())


def test_nothing_in_the_file_is_unused() -> None:
    text = json.dumps(RAW)
    assert all(f'"@{name}' in text for name in RAW["sources"])
    assert {card["family"] for card in RAW["cards"]} == RAW["families"].keys()
    assert {family["architecture"] for family in RAW["families"].values()} == RAW["architectures"].keys()


@EACH_CARD
def test_numbers_are_in_their_units(card: Card) -> None:
    sold = card.memory_nominal_gib * 2**30
    assert 0.87 * sold < card.memory_bytes <= sold
    assert 100e9 < card.bandwidth_bytes_per_s <= 8000e9
    assert 2e12 < card.fp32_flops_per_s <= card.fp16_flops_per_s < 3e15
    assert card.tf32_flops_per_s is None or card.fp32_flops_per_s <= card.tf32_flops_per_s * 1.001
    assert 8 <= card.sm_count <= 304
    assert card.boost_clock_mhz is None or 1100 <= card.boost_clock_mhz <= 3200
    assert card.l2_bytes is None or 2 * MIB <= card.l2_bytes <= 204 * MIB


# Memory


@EACH_CARD
def test_memory_is_the_number_that_its_source_states(card: Card) -> None:
    source, mib = card.sources["memory_bytes"], card.memory_bytes // MIB
    stated = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", source.replace(",", ""))]
    if same := re.match(r"derived: the (\d+) MiB of the (.+?), same (architecture and )?size", source):
        other = find_card(same[2]).card
        assert other.memory_is_measured
        assert other.memory_nominal_gib == card.memory_nominal_gib
        assert not same[3] or other.architecture == card.architecture
        assert int(same[1]) == mib
        assert other.memory_bytes == card.memory_bytes
    elif scaled := re.match(r"derived: (\d+) MiB × (\d+)/(\d+) of the", source):
        assert abs(mib - int(scaled[1]) * int(scaled[2]) / int(scaled[3])) < 1
    elif less := re.match(r"derived: (\d+) MiB less 16( MiB and 1/256)?", source):
        assert mib == int(less[1]) - 16 - (int(less[1]) // 256 if less[2] else 0)
    elif card.memory_is_measured:
        near = (mib, mib / 1024, card.memory_bytes / 1e9, card.memory_bytes)
        assert any(abs(number - wanted) <= 0.006 * wanted for number in stated for wanted in near)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("RTX 3060 12GB", 11.6),
        ("RTX 4090", 23.5),
        ("RTX 3090", 23.6),
        ("RTX 5070 Ti", 15.5),
        ("RX 9070", 15.9),
        ("T4", 14.6),
        ("A100 40GB", 39.4),
        ("A100 80GB", 79.1),
        ("H100", 79.1),
        ("H200", 139.8),
        ("B200", 178.4),
        ("L4", 22.0),
        ("MI300X", 192.0),
        ("A770 16GB", 15.1),
    ],
)
def test_memory_is_what_a_program_sees(name: str, gib: float) -> None:
    assert find_card(name).card.memory_bytes / 2**30 == pytest.approx(gib, rel=0.005)


def test_cards_of_one_model_and_size_have_the_same_memory() -> None:
    forms = re.compile(r"[- ](SXM\d?|PCIE)", re.IGNORECASE)
    groups = defaultdict(set)
    for card in CARDS:
        groups[frozenset(tokens(forms.sub(" ", card.name))), card.memory_nominal_gib].add(card.memory_bytes)
    assert all(len(sizes) == 1 for sizes in groups.values())
    assert find_card("V100 32GB SXM").card.memory_bytes == find_card("V100 32GB PCIe").card.memory_bytes


# Rates and kernels


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [  # dense, float32 accumulation, as their vendors publish them
        ("RTX 2080 Ti", "fp16", 53.8),
        ("RTX 3060", "fp16", 25.5),
        ("RTX 3090", "bf16", 71),
        ("RTX 3090", "tf32", 35.6),
        ("RTX 4090", "fp16", 165.2),
        ("RTX 5090", "fp16", 209.5),
        ("RTX A6000", "bf16", 154.8),
        ("RTX 6000 Ada", "fp16", 364.2),
        ("RTX PRO 6000", "fp16", 503.8),
        ("T4", "fp16", 65),
        ("V100 SXM2 16GB", "fp16", 125),
        ("V100 PCIe 16GB", "fp16", 112),
        ("A10", "fp16", 125),
        ("A10G", "bf16", 70),
        ("A30", "bf16", 165),
        ("A40", "bf16", 149.7),
        ("L4", "bf16", 121),
        ("L40", "bf16", 181.05),
        ("L40S", "bf16", 362.05),
        ("A100", "bf16", 312),
        ("A100", "tf32", 156),
        ("A100", "fp32", 19.5),
        ("H100", "bf16", 989.4),
        ("H100", "tf32", 494.7),
        ("H100 PCIe", "bf16", 756),
        ("H200", "fp32", 67),
        ("B200", "bf16", 2250),
        ("RX 7900 XTX", "fp16", 122.8),
        ("RX 7900 XTX", "fp32", 61.4),
        ("RX 9070", "fp16", 145),
        ("RX 9070 XT", "bf16", 195),
        ("MI100", "fp16", 184.6),
        ("MI210", "bf16", 181),
        ("MI250X", "fp16", 191.5),
        ("MI300X", "bf16", 1307.4),
        ("MI300X", "tf32", 653.7),
        ("MI300X", "fp32", 163.4),
        ("MI355X", "bf16", 2516.6),
        ("Arc A770", "fp16", 137.6),
        ("Arc B580", "fp16", 116.5),
        ("Max 1100", "bf16", 352),
    ],
)
def test_rates_are_the_published_ones(name: str, dtype: str, teraflops: float) -> None:
    rate = getattr(find_card(name).card, f"{dtype}_flops_per_s")
    assert rate / 1e12 == pytest.approx(teraflops, rel=0.015)


@EACH_CARD
def test_a_rate_is_there_for_each_dtype_that_the_units_multiply(card: Card) -> None:
    assert (card.bf16_flops_per_s is not None) == ("bfloat16" in card.dtypes)
    assert {"float32", "float16"} <= set(card.dtypes)


@pytest.mark.parametrize("card", [card for card in CARDS if card.vendor == "nvidia"], ids=lambda card: card.name)
def test_kernels_of_nvidia_cards_follow_their_compute_capability(card: Card) -> None:
    assert card.compute_capability is not None
    major, kernels = float(card.compute_capability) // 1, card.attention
    assert kernels.sdpa_efficient
    assert kernels.sdpa_math
    assert kernels.sdpa_flash == kernels.flash_attention_2 == ("bfloat16" in card.dtypes) == (major >= 8)
    assert kernels.sdpa_cudnn_first == (major in (9, 10))
    assert card.bitsandbytes


@pytest.mark.parametrize(
    ("name", "target", "flash", "flash_attention_2"),
    [
        ("RX 6800", "gfx1030", False, False),
        ("RX 7600", "gfx1102", False, True),
        ("RX 7800 XT", "gfx1101", False, True),
        ("RX 7900 XTX", "gfx1100", True, True),
        ("RX 9060 XT 16GB", "gfx1200", False, True),
        ("RX 9070", "gfx1201", True, True),
        ("MI100", "gfx908", False, False),
        ("MI210", "gfx90a", True, True),
        ("MI300X", "gfx942", True, True),
        ("MI355X", "gfx950", True, True),
        ("Arc A770", None, False, False),
        ("Arc B580", None, True, False),
        ("Arc Pro B70", None, False, False),
        ("Max 1550", None, True, False),
    ],
)
def test_kernels_of_other_cards_follow_their_target(
    name: str, target: str | None, flash: bool, flash_attention_2: bool
) -> None:
    card = find_card(name).card
    assert (card.compute_capability, card.attention.sdpa_flash) == (target, flash)
    assert card.attention.sdpa_efficient == (flash and card.vendor == "amd")
    assert card.attention.flash_attention_2 == flash_attention_2


# Names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("3060", G + "3060 12GB"),
        ("rtx 3060", G + "3060 12GB"),
        ("RTX3060", G + "3060 12GB"),
        ("geforce 3060 12gb", G + "3060 12GB"),
        ("RTX 3060 12 GiB", G + "3060 12GB"),
        ("GeForce RTX3060-12G", G + "3060 12GB"),
        ("3060 8gb", G + "3060 8GB"),
        ("3060 ti", G + "3060 Ti"),
        ("RTX3060Ti", G + "3060 Ti"),
        ("3060 laptop", G + "3060 Laptop GPU"),
        ("RTX 3060 Mobile", G + "3060 Laptop GPU"),
        ("3080", G + "3080 12GB"),
        ("3080 10GB", G + "3080 10GB"),
        ("3080 laptop", G + "3080 Laptop GPU 16GB"),
        ("NVIDIA GeForce RTX 4090", G + "4090"),
        ("4090d", G + "4090 D"),
        ("4060 ti", G + "4060 Ti 16GB"),
        ("4070 ti", G + "4070 Ti"),
        ("4070 super", G + "4070 SUPER"),
        ("4070tisuper", G + "4070 Ti SUPER"),
        ("RTX 4070 Ti Super 16GB", G + "4070 Ti SUPER"),
        ("5070 ti", G + "5070 Ti"),
        ("RTX 5070 Ti", G + "5070 Ti"),
        ("rtx5060ti 8gb", G + "5060 Ti 8GB"),
        ("5090 mobile", G + "5090 Laptop GPU"),
        ("2060", G + "2060 12GB"),
        ("titan rtx", "NVIDIA TITAN RTX"),
        ("t4", "Tesla T4"),
        ("Tesla T4", "Tesla T4"),
        ("NVIDIA T4 16GB", "Tesla T4"),
        ("p100", "Tesla P100 16GB"),
        ("Tesla P100-PCIE-16GB", "Tesla P100 16GB"),
        ("v100", "Tesla V100-SXM2-32GB"),
        ("v100 16gb pci-e", "Tesla V100-PCIE-16GB"),
        ("A100", "NVIDIA A100-SXM4-80GB"),
        ("A100 80GB", "NVIDIA A100-SXM4-80GB"),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB"),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB"),
        ("a100 sxm 40g", "NVIDIA A100-SXM4-40GB"),
        ("a10", "NVIDIA A10"),
        ("A10G", "NVIDIA A10G"),
        ("l4", "NVIDIA L4"),
        ("L40", "NVIDIA L40"),
        ("l40s", "NVIDIA L40S"),
        ("h100", "NVIDIA H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe 80GB"),
        ("H100 NVL", "NVIDIA H100 NVL 94GB"),
        ("h200", "NVIDIA H200 SXM 141GB"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 96GB"),
        ("b200", "NVIDIA B200"),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada Generation"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("RTX A6000", "NVIDIA RTX A6000"),
        ("rtxa6000", "NVIDIA RTX A6000"),
        ("a2000", "NVIDIA RTX A2000 12GB"),
        ("RTX 4000 Ada", "NVIDIA RTX 4000 Ada Generation"),
        ("RTX 4000 SFF Ada", "NVIDIA RTX 4000 SFF Ada Generation"),
        ("RTX PRO 6000 Blackwell", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("pro 6000 max-q", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
        ("RTX PRO 6000 Server", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
        ("rx 9070", "AMD Radeon RX 9070"),
        ("RX 9070", "AMD Radeon RX 9070"),
        ("9070 xt", "AMD Radeon RX 9070 XT"),
        ("9060xt", "AMD Radeon RX 9060 XT 16GB"),
        ("7900 xtx", "AMD Radeon RX 7900 XTX"),
        ("rx7900xt", "AMD Radeon RX 7900 XT"),
        ("Radeon RX 7900 GRE", "AMD Radeon RX 7900 GRE"),
        ("W7800", "AMD Radeon PRO W7800 48GB"),
        ("r9700", "AMD Radeon AI PRO R9700"),
        ("mi300x", "AMD Instinct MI300X"),
        ("AMD Instinct MI250X", "AMD Instinct MI250X (one GCD)"),
        ("arc a770", "Intel Arc A770 16GB"),
        ("Intel(R) Arc(TM) A770 Graphics", "Intel Arc A770 16GB"),
        ("arcb580", "Intel Arc B580"),
        ("b580", "Intel Arc B580"),
        ("Intel(R) Data Center GPU Max 1100", "Intel Data Center GPU Max 1100"),
    ],
)
def test_a_card_is_found_by_what_people_call_it(name: str, meant: str) -> None:
    choice = find_card(name)
    assert choice.card.name == meant
    assert f'"{name}" means {meant}' in choice.reason


@EACH_CARD
def test_a_full_name_means_that_card(card: Card) -> None:
    assert find_card(card.name).card is card
    assert find_card(card.name.lower()).card is card


def test_a_bare_name_is_the_desktop_card_with_most_memory_and_says_so() -> None:
    choice = find_card("3060")
    passed_over = (G + "3060 8GB", G + "3060 Ti", G + "3060 Laptop GPU")
    assert choice.others == passed_over
    assert "the desktop card without suffix, the largest memory" in choice.reason


def test_cards_equal_in_memory_are_one_for_memory_and_the_faster_is_taken() -> None:
    choice = find_card("A100 80GB")
    assert choice.others == ("NVIDIA A100-PCIE-80GB",)
    assert "the fastest" in choice.reason
    assert choice.card.memory_bytes == BY_NAME["NVIDIA A100-PCIE-80GB"].memory_bytes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("6000", ("could be any of", "RTX 6000 Ada", "Quadro RTX 6000", "RTX A6000", "RTX PRO 6000", "name one")),
        ("rtx 6000", ("could be any of", "RTX 6000 Ada", "Quadro RTX 6000")),
        ("4000", ("could be any of", "RTX A4000", "RTX 4000 Ada", "RTX PRO 4000")),
        ("7900", ("without suffix", "RX 7900 XT", "RX 7900 XTX", "RX 7900 GRE")),
        ("RX 9060", ("without suffix", "RX 9060 XT 16GB")),
        ("3060 6gb", ("without suffix", "RTX 3060 Laptop GPU")),
        ("nvidia", ("names no model", "and ", " more")),
        ("rtx", ("names no model",)),
        ("geforce", ("names no model",)),
        ("24gb", ("names no model", "RTX 3090")),
        ("super", ("names no model", "RTX 4080 SUPER")),
        ("gpu", ("names no model",)),
        ("", ('"" names no card', "RTX 3060")),
        ("  ", ("names no card",)),
        ("?!", ("names no card",)),
        ("3061", ("is none of", "RTX 3060 12GB")),
        ("gtx 3060", ("is none of", "RTX 3060 12GB")),
        ("3060 12", ("is none of", "RTX 3060 12GB")),
        ("3060 24gb", ("is none of", "RTX 3060 12GB")),
        ("A100 24GB", ("is none of", "A100")),
        ("radeon 4090", ("is none of", "RTX 4090")),
        ("mi300", ("is none of", "MI300X", "MI300A")),
        ("日本 3060", ("is none of", "RTX 3060")),
        ("RTX 3060\nsecond line", ("is none of", "RTX 3060")),
        ("cuda:0", ("is none of",)),
        ("potato", ("is none of", "docs/cards.md")),
        ("9" * 150, ("is none of", "…")),
        ("3060 " * 100, ("names no card", "…")),
    ],
)
def test_a_name_that_the_rule_does_not_settle_is_one_line_with_candidates(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_card(name)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert message.isprintable()
    assert sum(message.count(card) for card in ("NVIDIA ", "AMD ", "Intel ", "Quadro ", "Tesla ")) <= 9
    assert len(message) < 600


VOCABULARY = sorted(
    {word for card in CARDS for word in tokens(f"{card.name} {' '.join(card.aliases)}")}
    | {f"{card.memory_nominal_gib}gb" for card in CARDS}
    | {"gpu", "gtx", "3061", "7gb", "ultra", "plus", "x", "max", "q", "i9"}
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=4))
def test_no_word_of_a_match_is_unaccounted_for(words: list[str]) -> None:
    try:
        card = find_card(" ".join(words)).card
    except InvalidRequest:
        return
    said = tokens(f"{card.name} {' '.join(card.aliases)} {card.vendor} {card.memory_nominal_gib}gb gpu graphics card")
    assert set(words) <= said | {"sxm"}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.from_regex(r"(rtx|rx|arc|a|h|mi)? ?[0-9]{1,5} ?(ti|xt|gb)?", fullmatch=True))
def test_garbage_is_one_line_and_never_a_traceback(text: str) -> None:
    said = ""
    try:
        said = find_card(text).reason
    except AutotuneError as error:
        said = str(error)
    else:
        assert re.search(r"\d|titan", text.lower())
    assert said
    assert said.isprintable()


# The page and the imports


def test_the_page_is_what_the_function_gives() -> None:
    page = (ROOT / "docs/cards.md").read_text(encoding="utf-8")
    assert page == card_table(), "python -m benchmarks.card_table > docs/cards.md"
    assert all(page.count(f"| {card.name} |") == 2 for card in CARDS)


def test_the_catalogue_imports_nothing_heavy() -> None:
    code = "import autotune.hardware.cards as c, sys; c.cards(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "numpy", "pynvml", "transformers", "click", "rich"} & set(modules.stdout.split())
