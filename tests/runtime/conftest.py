import signal

import pytest

from mixer.runtime import signals


@pytest.fixture
def listening(monkeypatch):
    """This process takes signals as a command does; pytest's own handlers come back afterwards."""
    handlers = {signum: signal.getsignal(signum) for signum in signals.STOPPING}
    for name, value in (("_first", None), ("_raised", False), ("_callback", None)):
        monkeypatch.setattr(signals, name, value)
    signals.listen()
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
