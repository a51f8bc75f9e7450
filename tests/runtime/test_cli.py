import sys
from dataclasses import dataclass

import pytest
import torch

from mixer.runtime import cli
from mixer.runtime.cli import option, parse, parse_names, whole_numbers
from mixer.runtime.errors import Diverged, InputError, Interrupted

OUT_OF_MEMORY = ("error: out of memory ({}): try a smaller --batch-size, --image-size or model\n")


@dataclass(frozen=True)
class Options:
    size: int = option(8, "side in pixels", least=1)
    val_rate: float | None = option(None, "100 % is 1", above=0, below=1)
    mode: str = option("fast", "how", choices=("fast", "slow"))
    out: str | None = option(None, "where")
    quiet: bool = option(False, "print nothing, not even 1 %")
    files: tuple = option((), "what")


def test_types_and_values_of_a_command_line():
    argv = ["--size", "3", "a", "--val-rate=0.5", "--quiet", "b", "--out=-x"]
    assert parse(Options, argv, "", words="files") == {
        "size": 3, "val_rate": 0.5, "quiet": True, "files": ["a", "b"], "out": "-x"}
    assert parse(Options, [], "", words="files") == {}


@pytest.mark.parametrize("argv, message", [
    (["--siz", "3"], "unknown argument --siz; did you mean --size?"),  # no abbreviations
    (["--a=1"], "unknown argument --a=1"), (["--size"], "--size expected one argument"),
    (["--size", "2.5"], "--size invalid int value: '2.5'"),
    (["--size", "0"], "--size must be in [1, inf), not 0"),
    (["--size", "9" * 5000], f"--size invalid int value: '{'9' * 5000}'"),
    (["--val-rate", "y"], "--val-rate invalid float value: 'y'"),
    (["--val-rate", "1"], "--val-rate must be in (0, 1), not 1"),
    (["--val-rate", "0"], "--val-rate must be in (0, 1), not 0"),
    (["--val-rate", "nan"], "--val-rate must be in (0, 1), not nan"),
    (["--mode", "slwo"], "--mode invalid choice: 'slwo' (choose from 'fast', 'slow')"),
    (["--out", ""], "--out is empty"), (["photo.jpg", ""], "FILES is empty")])
def test_a_wrong_argument_is_refused(argv, message):
    with pytest.raises(InputError) as e:
        parse(Options, argv, "", words="files")
    assert str(e.value).lower() == message.lower()


def test_several_numbers_or_choices_in_one_option():
    assert whole_numbers("seeds", "2,0,2", least=0) == [2, 0]
    choices = {"one": 1, "three": 3}
    assert parse_names("rows", None, choices) == [1, 3]
    assert parse_names("rows", "three,three", choices) == [3]
    for call, message in ((lambda: whole_numbers("all_seeds", "1,", 0), "--all-seeds invalid"),
                          (lambda: whole_numbers("seeds", "-1", 0), "--seeds must be in .0, inf"),
                          (lambda: parse_names("rows", "one,tree", choices),
                           "--rows tree: choose from one, three")):
        with pytest.raises(InputError, match=message):
            call()


def test_help_shows_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Options, ["--help"], "what it does")
    assert e.value.code == 0
    text = capsys.readouterr().out
    for words in ("what it does", "--val-rate", "side in pixels [8]", "{fast,slow}", "how [fast]",
                  "100 % is 1", "not even 1 %"):
        assert words in text


@pytest.fixture
def run(capsys):
    """run(error, *argv) -> what a command that raises `error` leaves: exit code, stdout, stderr."""
    def leaves(error, *argv):
        def main(argv):
            print("started with", *argv)
            if error:
                raise error
        with pytest.raises(SystemExit) as e:
            cli.run(main, list(argv))
        return e.value.code, *capsys.readouterr()
    return leaves


@pytest.mark.parametrize("error, exit_code, message", [
    (None, 0, ""),
    (InputError("no\nsuch file"), 2, "error: no\\nsuch file\n"),
    (Diverged("loss is nan"), 3, "error: loss is nan\n"),
    (Interrupted(15, " at step 3"), 143, "stopped by SIGTERM at step 3\n"),
    (KeyboardInterrupt(), 130, "stopped by SIGINT\n"),
    (RuntimeError("\nfirst\x1b line\nsecond"), 1, "error: first\\x1b line\n"),
    (MemoryError(), 1, OUT_OF_MEMORY.format("MemoryError")),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more"), 1,
     OUT_OF_MEMORY.format("CUDA out of memory. Tried to allocate 2 GiB.")),
])
def test_exit_code_and_message_of_a_command(run, error, exit_code, message):
    assert run(error, "--x") == (exit_code, "started with --x\n", message)


def test_debug_adds_the_traceback(run):
    _, _, err = run(RuntimeError("why"), "--debug")
    assert err.startswith("Traceback") and err.endswith("error: why\n")


def test_rank_1_prints_only_what_it_alone_knows(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # comes back
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(InputError("other images")) == (2, "", "error (rank 1): other images\n")
    for error, code in ((Diverged("b"), 3), (Interrupted(2), 130)):
        assert run(error) == (code, "", "")
