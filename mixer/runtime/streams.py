"""Standard streams that never end a run: closed, full, or a pipe whose reader has gone."""
import contextlib
import io
import os
import sys
from collections.abc import Iterator


class _Lasting(io.FileIO):
    """A descriptor that goes to the null device once a write to it fails."""

    failed = None  # a copy of what the descriptor was then

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:  # a broken pipe, a full disk, a terminal that was closed
            self.failed = self.failed or os.dup(self.fileno())
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)

    def give_back(self) -> None:
        if self.failed:
            os.dup2(self.failed, self.fileno())
            os.close(self.failed)
            self.failed = None


@contextlib.contextmanager
def lasting(silent: bool = False) -> Iterator[None]:
    """Inside, a failed write to sys.stdout or sys.stderr is no error; silent: no stdout.

    A stream that the program has put in the place of descriptor 1 or 2, as Jupyter does, is left
    alone. Descriptors 0, 1 and 2 that are closed are opened on the null device, and stay so:
    otherwise the next file would get the number, and with it what libraries write to "standard
    error".
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: setattr(sys, "stderr", before[1]))
        stack.callback(lambda: setattr(sys, "stdout", before[0]))
        out = stack.enter_context(open(os.devnull, "w")) if silent else _open(1, before[0], stack)
        sys.stdout, sys.stderr = out, _open(2, before[1], stack)
        yield


def _open(number, stream, stack):
    """A text stream on a descriptor, in the encoding of `stream`, where any file name prints."""
    if not _is_on(stream, number):
        return stream
    with contextlib.suppress(AttributeError, OSError, ValueError):  # none, full or closed
        stream.flush()
    raw = _Lasting(number, "w", closefd=False)
    stack.callback(raw.give_back)
    encoding = getattr(stream, "encoding", None)  # Python has no stream where none was open
    lasting = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace",
                               line_buffering=True)
    stack.callback(lasting.flush)
    return lasting


def _is_on(stream, number):
    if stream is None or getattr(stream, "closed", False):
        return True
    try:
        return stream.fileno() == number
    except (AttributeError, OSError, ValueError):
        return False
