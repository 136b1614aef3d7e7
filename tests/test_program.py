"""Loading a program: a module of its own, the user's modules at hand, and one sentence where it cannot be."""

import re
from pathlib import Path

import pytest

from seqloom.errors import UserError
from seqloom.runtime.program import load_program

SP = Path(__file__).parent / "handwritten_programs" / "sp"


def copy_of(folder, change=lambda text: text):
    (folder / "program.py").write_text(change((SP / "program.py").read_text()))
    return folder


def test_two_programs_live_side_by_side(tmp_path):
    first = load_program(SP)
    second = load_program(copy_of(tmp_path, lambda text: text.replace("ZERO = 3", "ZERO = 1")))
    assert (first.ZERO, second.ZERO) == (3, 1)
    assert first.MODEL is not second.MODEL
    assert first.MODEL.__module__ != second.MODEL.__module__


def test_an_edited_program_is_loaded_anew(tmp_path):
    assert load_program(copy_of(tmp_path)).ZERO == 3
    assert load_program(copy_of(tmp_path, lambda text: text.replace("ZERO = 3", "ZERO = 0"))).ZERO == 0


@pytest.mark.parametrize(
    ("change", "sharded"),
    [(str, ("dp", "sp")), (lambda text: text.replace("ZERO = 3", "ZERO = 0"), ()), (lambda text: text + "\nSHARDED = ('sp',)\n", ("sp",))],
    ids=["unsaid", "ZeRO 0", "said"],
)
def test_storage_is_sharded_over_all_that_sum_gradients_unless_the_program_says_so(tmp_path, change, sharded):
    program = load_program(copy_of(tmp_path, change))
    assert sharded == program.SHARDED


@pytest.mark.parametrize("said", [True, False, None])
def test_a_program_that_does_not_say_so_counts_on_no_compiler(tmp_path, said):
    change = lambda text: re.sub(r"\nFUSED = .*", "", text) + ("" if said is None else f"\nFUSED = {said}\n")  # noqa: E731
    assert load_program(copy_of(tmp_path, change)).FUSED is bool(said)


def test_modules_of_the_working_directory_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "my_seqloom_operator.py").write_text("SCALE = 7\n")
    (tmp_path / "compiled").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    program = load_program(copy_of(tmp_path / "compiled", lambda text: text + "\nfrom my_seqloom_operator import SCALE\n"))
    assert program.SCALE == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "\nimport no_such_module\n", "cannot be loaded \\(ModuleNotFoundError.*no_such_module"),
        (lambda text: text + "\ndef of()\n", "cannot be loaded \\(SyntaxError"),
        (lambda text: text.replace("ZERO = 3", "ZERO = 4"), "ZERO = 4 in .*program.py is no ZeRO level: use 0, 1, 2 or 3"),
        (
            lambda text: text + "\nSHARDED = ('dp', 'tp')\n",
            r"SHARDED .* names 'tp', .* ZERO = 3 may be sharded over \('dp', 'sp'\) only",
        ),
        (lambda text: text.replace("ZERO = 3", "ZERO = 0\nSHARDED = ('dp',)"), r"names 'dp', .* ZERO = 0 may be sharded over \(\) only"),
        (lambda text: text.replace("SUM_GRADS", "OTHER").replace("TIED", "ELSE"), "lacks SUM_GRADS, TIED; compile it again"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        load_program(copy_of(tmp_path, change))


def test_a_missing_program_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="no compiled program at .*program.py; compile it first"):
        load_program(tmp_path / "nowhere")
