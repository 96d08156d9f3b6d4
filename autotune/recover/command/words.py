"""Which of a command's words are a launcher's, which is the program, and which are its arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")  # before a program, of `env`
_PYTHON = re.compile(r"(python|pypy)[\d.]*w?")
_FLAGS = re.compile(r"-(?=.)([^cmWX-]*)([cmWX]?)(.*)", re.DOTALL)  # of an interpreter: switches, then one with a value
_SHELLS = ("sh", "bash", "zsh", "dash", "fish", "ksh")
_LAUNCHERS = {"torchrun": "torch", "deepspeed": "deepspeed", "accelerate-launch": "accelerate"}
_LAUNCHER_MODULES = {
    "torch.distributed.run": "torch",
    "torch.distributed.launch": "torch",
    "accelerate.commands.launch": "accelerate",
}
#: Options of launchers that take no value; every other one does, unless a script follows.
_SWITCHES = frozenset(
    {
        *("m", "module", "standalone", "no_python", "use_env", "run_path", "multi_gpu", "cpu", "use_deepspeed"),
        *("use_fsdp", "use_megatron_lm", "quiet", "q", "debug", "same_network", "tpu", "use_cpu", "no_local_rank"),
        *("dynamo_use_dynamic", "dynamo_use_fullgraph", "enable_cpu_affinity", "fp8", "use_parallelism_config"),
    }
)
#: Programs of trainers, as a command or a module, with the word that must follow, and trl's own scripts.
_CLIS = {"trl": "trl", "axolotl": "axolotl", "llamafactory-cli": "llamafactory", "lmf": "llamafactory"}
_CLI_MODULES = {
    "trl": "trl",
    "trl.cli": "trl",
    "trl.cli.main": "trl",
    "axolotl.cli.main": "axolotl",
    "axolotl.cli": "axolotl",
    "llamafactory.cli": "llamafactory",
}
_TRAINING_MODULES = {"axolotl.cli.train": "axolotl", "llamafactory.launcher": "llamafactory"}
_TRL_PROGRAMS = ("sft", "dpo", "grpo", "kto", "reward", "rloo", "distillation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Where things are in a command's words."""

    program: int  # the launcher, interpreter or program that decides which packages are used
    begin: int  # first argument of the training program
    end: int  # behind the last one: a `--`, or the end
    trainer: str | None = None  # trl | axolotl | llamafactory, where the program is theirs
    subprogram: str = ""  # trl's: sft, dpo, …
    script: str | None = None  # path of a Python file
    module: str | None = None
    shell: bool = False  # what is done with its arguments cannot be known
    world_size: int | None = None  # processes, where the words say


def split(words: Sequence[str], environ: Mapping[str, str]) -> Parts:
    """The parts of a command. An unknown program is the first word, and all else its arguments."""
    at, found = 0, None
    while at < len(words) and found is None:
        found = _known(words, at)
        at += 1
    if found is None:
        found = Parts(program=0, begin=1, end=len(words), shell=bool(words) and _base(words[0]) in _SHELLS)
    end = words.index("--", found.begin) if "--" in words[found.begin :] else len(words)
    found = replace(found, end=end)
    return found if found.world_size is not None else replace(found, world_size=_world(words, found, environ))


def is_isolated(words: Sequence[str], parts: Parts) -> bool:
    """Whether its interpreter ignores PYTHONPATH or sites, as `python -I`, `-E` and `-S` do: no hook, then."""
    if not _PYTHON.fullmatch(_base(words[parts.program])):
        return False
    at = parts.program + 1
    while at < len(words) and (match := _FLAGS.fullmatch(words[at])):
        if set(match[1]) & set("IES"):
            return True
        if match[2] in ("c", "m"):
            return False
        at += 2 if match[2] and not match[3] else 1  # -W and -X take the next word, where none is joined
    return False


def options_before(words: Sequence[str], begin: int, end: int) -> dict[str, str]:
    """A launcher's options with values, `--a b` and `--a=b`, dashes as underscores."""
    found: dict[str, str] = {}
    for at in range(begin, end):
        name, equals, value = words[at].partition("=")
        if name.startswith("-"):
            following = words[at + 1] if at + 1 < end else ""
            found[_name(name)] = value if equals else following
    return found


def _known(words: Sequence[str], at: int) -> Parts | None:
    """The parts, where the word at `at` is a program that is known."""
    name = _base(words[at])
    if name in _SHELLS:
        return Parts(program=at, begin=len(words) if "-c" in words[at + 1 : at + 3] else at + 1, end=0, shell=True)
    if _PYTHON.fullmatch(name):
        return _python(words, at)
    if name in _LAUNCHERS:
        return _launched(words, at, at + 1, _LAUNCHERS[name])
    if name == "accelerate" and words[at + 1 : at + 2] == ["launch"]:
        return _launched(words, at, at + 2, "accelerate")
    return _target(words, at, at)


def _target(words: Sequence[str], program: int, at: int) -> Parts | None:
    """A training program: a trainer's own, or a script."""
    name = _base(words[at])
    if name in _CLIS:
        return _cli(words, program, at, _CLIS[name])
    if not words[at].endswith(".py"):
        return None
    path = PurePath(words[at])
    theirs = path.parts[-3:-1] == ("trl", "scripts") and path.stem in _TRL_PROGRAMS
    return Parts(
        program=program,
        begin=at + 1,
        end=0,
        script=words[at],
        trainer="trl" if theirs else None,
        subprogram=path.stem if theirs else "",
    )


def _cli(words: Sequence[str], program: int, at: int, trainer: str) -> Parts | None:
    following = words[at + 1] if at + 1 < len(words) else ""
    if following not in (_TRL_PROGRAMS if trainer == "trl" else ("train",)):
        return None
    return Parts(program=program, begin=at + 2, end=0, trainer=trainer, subprogram=following)


def _python(words: Sequence[str], at: int) -> Parts:
    index = at + 1
    while index < len(words):
        word = words[index]
        if word == "-c":
            return Parts(program=at, begin=min(index + 2, len(words)), end=0)
        if word == "-m" and index + 1 < len(words):
            return _module(words, at, index + 1)
        if not word.startswith("-") or word == "-":
            return _target(words, at, index) or Parts(program=at, begin=index + 1, end=0, script=word)
        index += 2 if word in ("-W", "-X") else 1
    return Parts(program=at, begin=len(words), end=0)


def _module(words: Sequence[str], program: int, at: int) -> Parts:
    name = words[at]
    if name in _LAUNCHER_MODULES:
        return _launched(words, program, at + 1, _LAUNCHER_MODULES[name])
    if name in _CLI_MODULES and (found := _cli(words, program, at, _CLI_MODULES[name])):
        return found
    parent, _, last = name.rpartition(".")
    if parent == "trl.scripts" and last in _TRL_PROGRAMS:
        return Parts(program=program, begin=at + 1, end=0, trainer="trl", subprogram=last)
    return Parts(program=program, begin=at + 1, end=0, trainer=_TRAINING_MODULES.get(name), module=name)


def _launched(words: Sequence[str], program: int, begin: int, launcher: str) -> Parts:
    """Past a launcher's own options, to what it launches."""
    at, module = begin, False
    while at < len(words) and words[at].startswith("-"):
        name, equals, _ = words[at].partition("=")
        module = module or _name(name) in ("m", "module")
        following = words[at + 1] if at + 1 < len(words) else ""
        alone = equals or _name(name) in _SWITCHES or following.startswith("-") or following.endswith(".py")
        at += 1 if alone or words[at] == "--" else 2
    if at >= len(words):
        return Parts(program=program, begin=len(words), end=0)
    parts = _module(words, program, at) if module else _target(words, program, at)
    parts = parts or Parts(program=program, begin=at + 1, end=0)
    if parts.world_size is not None:
        return parts
    return replace(parts, world_size=_processes(options_before(words, begin, at), launcher))


def _processes(options: Mapping[str, str], launcher: str) -> int | None:
    if launcher == "accelerate":
        return _count(options.get("num_processes"))
    each, nodes = ("nproc_per_node", "nnodes") if launcher == "torch" else ("num_gpus", "num_nodes")
    one, many = _count(options.get(each)), _count(options.get(nodes, "1"))
    return one * many if one and many else None


def _world(words: Sequence[str], parts: Parts, environ: Mapping[str, str]) -> int | None:
    """What a trainer's own program says of the launcher that it starts."""
    if parts.trainer == "trl":
        return _count(options_before(words, parts.begin, parts.end).get("num_processes"))
    if parts.trainer == "axolotl":
        behind = options_before(words, parts.end, len(words))
        return _processes(behind, "torch") or _processes(behind, "accelerate")
    stated = dict(environ) | dict(word.split("=", 1) for word in words[: parts.program] if ASSIGNMENT.match(word))
    if parts.trainer == "llamafactory" and stated.get("FORCE_TORCHRUN", "").lower() in ("1", "true", "y"):
        return _processes(
            {"nproc_per_node": stated.get("NPROC_PER_NODE", ""), "nnodes": stated.get("NNODES", "1")}, "torch"
        )
    return None


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and 0 < int(text) < 1_000_000 else None


def _name(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _base(word: str) -> str:
    """A program's name, without folder and .exe."""
    return word.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".exe")
