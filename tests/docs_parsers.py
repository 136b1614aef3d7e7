"""The parsers of the programs that the documentation calls, for commands that a test cannot run: those that need GPUs or a network.

`check(statement)` takes a line of shell apart, finds the program in it and gives its words to the program's own parser. What a program
refuses is an error; so is a program that is not known here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from docs_pages import ROOT

sys.path.insert(0, str(ROOT))

import bookcorpus
import ckpt_merger
import create_mini_model
from seqloom import arguments
from seqloom.trainer.config import CompileConfig, TrainConfig, parse

SHELL = {
    "export",
    "set",
    "cd",
    "mkdir",
    "echo",
    "trap",
    "exit",
    "sbatch",
    "scancel",
    "scp",
    "rsync",
    "module",
    "source",
    "wait",
    "ls",
    "test",
    "kill",
    "scontrol",
}
"""Words of the shell and tools of a cluster, which are not ours to check."""
COMMANDS = {
    "compile": CompileConfig,
    "explain": arguments.ExplainArguments,
    "sweep": arguments.SweepArguments,
    "dryrun": arguments.DryRunArguments,
    "rehearse": arguments.RehearseArguments,
    "report": arguments.ReportArguments,
    "generate": arguments.GenerateArguments,
    "verify": arguments.VerifyArguments,
    "check-op": arguments.CheckOpArguments,
    "magi": arguments.MagiArguments,
    "profile": arguments.ProfileArguments,
}


def _tyro(cls: type) -> Callable[[list[str]], object]:
    return lambda words: tyro.cli(cls, args=words, use_underscores=True)


def _seqloom(words: list[str]) -> object:
    if words[0] == "checkpoint":
        cls = arguments.DiffArguments if words[1] == "diff" else arguments.FolderArguments
        return parse(cls, "checkpoint", words[2:])
    return parse(COMMANDS[words[0]], words[0], words[1:])


def _example(name: str) -> Callable[[list[str]], object]:
    """The flags of an example: its class `Arguments`, without the imports that the example itself needs."""

    def read(words: list[str]) -> object:
        tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments"]
        names = {"dataclass": dataclass, "Path": Path, "__name__": __name__}
        exec(compile(tree, name, "exec"), names)
        return tyro.cli(names["Arguments"], args=words, use_underscores=True)

    return read


PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "train.py": lambda words: parse(TrainConfig, "train.py", words),
    "bookcorpus.py": lambda words: _tyro(bookcorpus.Arguments)(bookcorpus._with_rows(words)),
    "create_mini_model.py": _tyro(create_mini_model.Arguments),
    "ckpt_merger.py": _tyro(ckpt_merger.MergerConfig),
    "examples/check_merged.py": _example("check_merged"),
    "examples/fsdp2_magi.py": _example("fsdp2_magi"),
    "examples/trainer_magi.py": _example("trainer_magi"),
}


def check(statement: str) -> None:
    """Parse every command of a statement. Raises `AssertionError` with what its program says."""
    for part in commands(_without_substitutions(statement.replace("\\\n", " "))):
        words = _program(part)
        if words:
            _check_words(words, statement)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a line of shell, without redirections and without the words that join commands."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        target = False  # of a redirection
        for word in lexer:
            if set(word) <= set(";&|"):
                found.append([])
            elif set(word) <= set("<>&"):
                found[-1] = found[-1][:-1] if found[-1][-1:] in (["1"], ["2"]) else found[-1]
                target = True
            elif target:
                target = False
            else:
                found[-1].append(word)
        found.append([])
    return [words for words in found if words]


def _without_substitutions(text: str) -> str:
    """Variables and `$(...)` stand for the number 1."""
    text = re.sub(r"\$\([^()]*(\([^()]*\))*[^()]*\)", "1", text)
    return re.sub(r"\$\{\w+[^}]*\}|\$\w+", "1", text)


def _program(words: list[str]) -> list[str]:
    """The words from the program on: without assignments, `exec`, and srun with its flags."""
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in ("exec", "if", "while", "do", "done", "then", "fi", "!")):
        words = words[1:]
    if words and words[0] == "srun":
        inner = next((i for i, word in enumerate(words) if word in ("torchrun", "python")), None)
        return words[inner:] if inner is not None else []
    return words


def _check_words(words: Sequence[str], statement: str) -> None:
    name, rest = words[0], list(words[1:])
    if name in SHELL:
        return
    if name == "torchrun":
        rest = _torchrun(rest, statement)
    elif name != "python":
        raise AssertionError(f"no parser for `{name}` in\n{statement}")
    if rest[:2] == ["-m", "seqloom"]:
        _parses(_seqloom, rest[2:], statement)
    elif rest[0] in PROGRAMS:
        _parses(PROGRAMS[rest[0]], rest[1:], statement)
    else:
        raise AssertionError(f"no parser for `{rest[0]}` in\n{statement}")


def _torchrun(words: list[str], statement: str) -> list[str]:
    """What torchrun would start."""
    from torch.distributed.run import get_args_parser

    found = _parses(get_args_parser().parse_args, words, statement)
    assert isinstance(found, argparse.Namespace)
    return [*(["-m"] if found.module else []), found.training_script, *found.training_script_args]


def _parses(read: Callable[[list[str]], object], words: list[str], statement: str) -> object:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return read(words)
    except SystemExit as end:
        raise AssertionError(f"exit code {end.code} of the parser for\n{statement}\n{said.getvalue()}") from None
    except Exception as error:
        raise AssertionError(f"{error} in\n{statement}") from error
