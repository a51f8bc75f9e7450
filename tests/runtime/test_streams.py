import contextlib
import io
import os
import sys

import pytest

from mixer.runtime.streams import lasting


@pytest.fixture
def streams(monkeypatch):
    """streams(): from now on, sys.stdout and sys.stderr are on the descriptors 1 and 2.

    Called by the test itself, because pytest sets its own before each test.
    """
    def start():
        for number, name in ((1, "stdout"), (2, "stderr")):
            monkeypatch.setattr(sys, name, open(number, "w", closefd=False))
    return start


def test_a_file_name_that_the_terminal_cannot_show(monkeypatch, capfd):
    with open(1, "w", encoding="ascii", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with lasting():
            print("\udcff é")
            assert sys.stdout.encoding == "ascii"
    assert capfd.readouterr().out == "\\udcff \\xe9\n"


def test_a_failed_write_is_no_error_and_neither_are_the_next(streams, capfd):
    streams()
    descriptor = os.dup(1)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    with lasting():
        print("lost" * 10_000)
        print("lost")
        os.write(1, b"a library's lines are lost, too")
    with pytest.raises(OSError, match="No space left"):  # what the program had is given back
        os.write(1, b"full")
    os.dup2(descriptor, 1)
    for number in (descriptor, full):
        os.close(number)
    print("here again", flush=True)
    assert capfd.readouterr() == ("here again\n", "")


def test_silent_is_for_stdout_alone(streams, capfd):
    streams()
    with lasting(silent=True):
        print("nothing")
        print("something", file=sys.stderr)
    assert capfd.readouterr() == ("", "something\n")


def test_the_streams_are_given_back_and_lines_keep_their_order(streams, capfd):
    streams()
    before = sys.stdout, sys.stderr
    print("one")
    with contextlib.suppress(RuntimeError), lasting():
        assert sys.stdout is not before[0] and sys.stderr is not before[1]
        print("two")
        raise RuntimeError
    print("three", flush=True)
    assert (sys.stdout, sys.stderr) == before and capfd.readouterr().out == "one\ntwo\nthree\n"


def test_a_stream_that_a_program_has_put_there_is_left_alone(capfd):
    """As Jupyter does, and contextlib.redirect_stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as text, lasting():
        print("for the program")
    assert text.getvalue() == "for the program\n" and capfd.readouterr().out == ""
