"""Standard streams that never end a run: closed, full, or a pipe whose reader has gone."""
import io
import os
import sys


class _Lasting(io.FileIO):
    """A descriptor that goes to the null device once a write to it fails."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:  # a broken pipe, a full disk, a terminal that was closed
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def make_lasting(silent: bool = False) -> None:
    """Replace sys.stdout and sys.stderr. A failed write to them is no error; silent: no stdout.

    A descriptor 0, 1 or 2 that is closed is opened on the null device. Otherwise the next file
    would get its number, and with it what libraries write to "standard error".
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = open(os.devnull, "w") if silent else _open(1, sys.stdout)
    sys.stderr = _open(2, sys.stderr)


def _open(number, stream):
    """A text stream on a descriptor, in the encoding of `stream`, where any file name prints."""
    buffer = io.BufferedWriter(_Lasting(number, "w", closefd=False))
    encoding = getattr(stream, "encoding", None)  # Python has no stream where none was open
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
