import pwd
import signal
import sys
import types
from dataclasses import dataclass

import pytest

from mixer.runtime import cli, signals
from mixer.runtime.cli import did_you_mean, invalid_values, option, option_types, parse
from mixer.runtime.errors import Diverged, InputError, Interrupted, UsageError
from mixer.runtime.processes import TORCHRUN
from mixer.runtime.system import set_death_signal


@dataclass(frozen=True)
class Options:
    size: int = option(8, "side in pixels", least=1)
    val_rate: float | None = option(None, "100 % is 1", above=0, below=1)
    mode: str = option("fast", "how", choices=("fast", "slow"))
    quiet: bool = option(False, "print nothing, not even 1 %")


def test_types_and_values_of_a_command_line():
    assert option_types(Options) == {"size": int, "val_rate": float, "mode": str, "quiet": bool}
    argv = ["--size", "3", "--val-rate=0.5", "--quiet"]
    assert parse(Options, argv, "") == ({"size": 3, "val_rate": 0.5, "quiet": True}, [])
    assert parse(Options, [], "") == ({}, [])


@pytest.mark.parametrize("argv, problems", [
    (["--sise", "3", "4"], ["unknown argument --sise (did you mean --size?)",
                            "unknown argument 4"]),
    (["--a", "--b=1", "2"], ["unknown argument --a", "unknown argument --b=1"]),
    (["--size", "x", "--val-rate", "y"], ["--size must be a whole number, not 'x'",
                                          "--val-rate must be a number, not 'y'"]),
])
def test_what_cannot_be_parsed(argv, problems):
    assert parse(Options, argv, "") == ({}, problems)


def test_an_argument_without_its_value():
    with pytest.raises(UsageError, match="--size: expected one argument"):
        parse(Options, ["--size"], "")


@pytest.mark.parametrize("values, problems", [
    ({}, []),
    (dict(size=0), ["--size must be at least 1, not 0"]),
    (dict(size=10**400), [f"--size must be below 2^63, not {10**400}"]),
    (dict(val_rate=1.0, mode=""), ["--val-rate must be below 1, not 1.0", "--mode is empty"]),
    (dict(val_rate=float("nan")), ["--val-rate must be above 0, not nan"]),
    (dict(mode="slwo"), ["--mode slwo: choose from fast, slow (did you mean slow?)"]),
])
def test_invalid_values(values, problems):
    assert invalid_values(Options(**values)) == problems


def test_a_value_that_begins_with_a_dash():
    for argv in (["--mode", "-slow"], ["--mode"]):
        with pytest.raises(UsageError, match="one that begins with - is written as --flag=value"):
            parse(Options, argv, "")
    assert parse(Options, ["--mode=-slow"], "") == ({"mode": "-slow"}, [])
    with pytest.raises(UsageError, match="^--mode=--: write ./-- if this is a file's name$"):
        parse(Options, ["--mode=--"], "")


def test_a_tilde_that_the_shell_left(monkeypatch):
    """Behind --flag=, bash does not look for it."""
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in (("~", "/home/me"), ("~/a b", "/home/me/a b"), ("./~", "./~"), ("~x", "~x")):
        assert parse(Options, [f"--mode={text}"], "") == ({"mode": path}, [])
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert parse(Options, ["--mode=~/x"], "")[1] == ["--mode ~/x: this user has no home folder"]


def test_help_shows_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Options, ["--help"], "what it does")
    assert e.value.code == 0
    text = capsys.readouterr().out
    for words in ("what it does", "--val-rate RATE", "side in pixels [8]",
                  "how (fast, slow) [fast]", "100 % is 1", "not even 1 %"):
        assert words in text


def test_did_you_mean():
    assert did_you_mean("resnet", ["vit", "resnet18"]) == " (did you mean resnet18?)"
    assert did_you_mean("re", ["vit", "resnet18"]) == did_you_mean("x", []) == ""


@pytest.fixture
def run(monkeypatch, capfd):
    """run(error, *argv) -> what a command that raises `error` leaves: exit code, stdout, stderr."""
    monkeypatch.setattr(signals, "listen", lambda: None)

    def leaves(error, *argv):
        def main(argv):
            print("started with", *argv)
            if error:
                raise error
        with pytest.raises(SystemExit) as e:
            cli.run(main, list(argv))
        return e.value.code, *capfd.readouterr()
    return leaves


@pytest.mark.parametrize("error, exit_code, message", [
    (None, 0, ""),
    (InputError("no\nsuch file"), 2, "error: no\\nsuch file\n"),
    (UsageError(["one", "other"]), 2, "error: one\nerror: other\n"),
    (Diverged("loss is nan"), 3, "error: loss is nan\n"),
    (Interrupted(15, " at step 3"), 143, "stopped by SIGTERM at step 3\n"),
    (RuntimeError("\nfirst\x1b line\nsecond"), 1, "error: first\\x1b line\n"),
    (MemoryError(), 1, "error: MemoryError\n"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:1] closed"), 1,
     "error: another process of this run has died, and may have printed why; "
     "--resume auto continues from the last checkpoint\n"),
])
def test_exit_code_and_message_of_a_command(run, error, exit_code, message):
    assert run(error, "--x") == (exit_code, "started with --x\n", message)


def test_debug_adds_the_traceback(run):
    _, _, err = run(RuntimeError("why"), "--debug")
    assert err.startswith("Traceback") and err.endswith("error: why\n")


def test_an_error_made_of_a_signal_is_the_signal(run, monkeypatch):
    """A library in C++ may turn Interrupted into an error of its own."""
    monkeypatch.setattr(signals, "_first", 15)
    monkeypatch.setattr(signals, "_raised", True)
    assert run(RuntimeError("unknown C++ exception"))[::2] == (143, "stopped by SIGTERM\n")


def test_rank_1_prints_only_what_it_alone_knows(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(InputError("other images")) == (2, "", "error (rank 1): other images\n")
    for error, exit_code in ((UsageError(["a"]), 2), (Diverged("b"), 3), (Interrupted(2), 130)):
        assert run(error) == (exit_code, "", "")


def taken():
    """What of this process a command takes over."""
    return (sys.stdout, sys.stderr, signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            [signal.getsignal(signum) for signum in (*signals.STOPPING, signal.SIGCHLD)],
            signals.pending(), signals.was_raised(), set_death_signal(0))


@pytest.mark.parametrize("end", [lambda argv: None, lambda argv: sys.exit(0),
                                 lambda argv: signal.raise_signal(signal.SIGTERM),
                                 lambda argv: [][0]], ids=["done", "exit", "signal", "error"])
def test_a_command_gives_back_what_it_took(monkeypatch, end):
    """A notebook, or a program that calls `run`, lives on."""
    monkeypatch.setenv(TORCHRUN, "job")
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    before = taken()

    def main(argv):
        inside = taken()
        assert inside[0] is not before[0] and inside[2] == set() and inside[6] == signal.SIGTERM
        assert inside[3][-1] == signal.SIG_DFL and signal.SIG_DFL not in inside[3][:-1]
        end(argv)
    try:
        with pytest.raises(SystemExit):
            cli.run(main, [])
        assert taken() == before
    finally:
        signal.signal(signal.SIGCHLD, old)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_help_names_the_script_wherever_it_runs(capsys, monkeypatch):
    """A script that %run or runpy runs has an empty __package__."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["some/train.py"])
    for package, name in (("", "train.py"), (None, "train.py"),
                          ("mixer.predict", "python -m mixer.predict")):
        main.__package__ = package
        with pytest.raises(SystemExit):
            parse(Options, ["--help"], "")
        assert capsys.readouterr().out.startswith(f"usage: {name} ")
