import signal
import subprocess
import sys
import time

import pytest

from mixer.runtime.signals import STOPPING, Stop
from tests.helpers.commands import ROOT

SECOND = """
import signal
from mixer.runtime.signals import Stop
for signum in (signal.{0}, signal.{1}):
    signal.signal(signum, signal.SIG_DFL)
with Stop() as stop:
    for signum in (signal.{0}, signal.{1}):
        signal.raise_signal(signum)
    print("here", stop.signum)
"""


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """As nohup, or a shell's &, would have it for pytest."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in STOPPING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", STOPPING, ids=lambda signum: signum.name)
def test_the_first_signal_is_kept_for_the_loop(signum):
    before = [signal.getsignal(each) for each in STOPPING]
    with Stop() as stop:
        assert stop.signum == 0
        signal.raise_signal(signum)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signum
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_a_signal_that_the_parent_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signum == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("names, code, printed", [
    (("SIGINT", "SIGINT"), 130, ""), (("SIGTERM", "SIGINT"), 130, ""),
    (("SIGTERM", "SIGTERM"), 0, "here 15\n"), (("SIGINT", "SIGHUP"), 0, "here 2\n")])
def test_a_second_ctrl_c_ends_at_once(names, code, printed):
    """`timeout` and a terminal that closes send a signal twice: these still let the run save."""
    result = subprocess.run([sys.executable, "-c", SECOND.format(*names)], cwd=ROOT, text=True,
                            capture_output=True)
    assert (result.returncode, result.stdout) == (code, printed), result.stderr


def test_a_command_has_an_exit_code_and_gets_the_signals():
    with Stop() as stop:
        assert stop.exit_code_of([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        assert stop.exit_code_of(["sh", "-c", "kill -9 $$"]) == 137
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            assert stop.exit_code_of(["sleep", "300"]) == 143 and stop.signum == signal.SIGTERM
        finally:
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - start < 200, "it was stopped"
        assert stop.exit_code_of(["sleep", "300"]) == 143, "a signal that came before it"
