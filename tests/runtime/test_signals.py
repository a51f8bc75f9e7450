import signal
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from mixer.runtime import signals
from mixer.runtime.errors import Interrupted

pytestmark = pytest.mark.usefixtures("listening")


def test_the_first_signal_raises_and_the_next_does_not_disturb_the_cleaning_up():
    signals.check()
    with pytest.raises(Interrupted, match="stopped by SIGHUP"):
        signal.raise_signal(SIGHUP)
    signal.raise_signal(SIGTERM)
    assert signals.pending() == SIGHUP and signals.was_raised()


def test_a_deferred_signal_waits_for_a_check():
    calls = []
    with signals.deferred(calls.append):
        with signals.deferred():
            signal.raise_signal(SIGTERM)
        assert calls == []
        signal.raise_signal(SIGTERM)
    assert calls == [SIGTERM] and signals.pending() == SIGTERM and not signals.was_raised()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        signals.check()


def test_a_blocked_signal_arrives_at_the_end():
    with signals.blocked():
        signal.raise_signal(SIGINT)
        assert signals.pending() is None
    assert signals.pending() == SIGINT and not signals.was_raised()


def test_signals_blocked_by_the_parent_arrive_when_the_process_listens():
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
    signal.raise_signal(SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        signals.listen()


def test_ignored_signals_stay_ignored():
    signal.signal(SIGHUP, signal.SIG_IGN)
    signals.listen()
    signal.raise_signal(SIGHUP)
    assert signals.pending() is None
