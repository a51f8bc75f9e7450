import os
import sys

import pytest

from mixer.runtime.streams import make_lasting


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


def test_a_file_name_that_the_terminal_cannot_show(monkeypatch, capfd):
    with open(1, "w", encoding="ascii", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        make_lasting()
        print("\udcff é")
    assert sys.stdout.encoding == "ascii" and capfd.readouterr().out == "\\udcff \\xe9\n"


def test_a_failed_write_is_no_error_and_neither_are_the_next(capfd):
    descriptor = os.dup(1)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    make_lasting()
    print("lost" * 10_000)
    print("lost")
    os.write(1, b"a library's lines are lost, too")
    os.dup2(descriptor, 1)
    for number in (descriptor, full):
        os.close(number)
    print("here again")
    assert capfd.readouterr() == ("here again\n", "")


def test_silent_is_for_stdout_alone(capfd):
    make_lasting(silent=True)
    print("nothing")
    print("something", file=sys.stderr)
    assert capfd.readouterr() == ("", "something\n")
