"""How entry points end: one sentence for a user's mistake, a traceback for a bug or with --debug."""

import subprocess
import sys

import pytest

from seqloom.entry import run
from seqloom.errors import UserError


def ended(main, capsys, monkeypatch, *flags):
    """Exit code and stderr of a run."""
    monkeypatch.setattr(sys, "argv", ["prog", *flags])
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_what_main_returns(capsys, monkeypatch, returned, code):
    assert ended(lambda: returned, capsys, monkeypatch) == (code, "")


def test_user_error_is_one_sentence(capsys, monkeypatch):
    def main():
        raise UserError("the flag is wrong: mend it")

    assert ended(main, capsys, monkeypatch) == (2, "error: the flag is wrong: mend it\n")


def test_interrupt_is_one_sentence(capsys, monkeypatch):
    def main():
        raise KeyboardInterrupt

    assert ended(main, capsys, monkeypatch) == (130, "error: interrupted before the end\n")


@pytest.mark.parametrize("error", [UserError("wrong"), KeyboardInterrupt()])
def test_debug_shows_the_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["prog", "--name", "x", "--debug"])

    def main():
        assert sys.argv == ["prog", "--name", "x"]
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_bugs_are_never_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_importing_it_is_cheap():
    code = "import sys, seqloom.entry; print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
