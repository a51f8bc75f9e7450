"""Standard streams that a long run can rely on: closed, full, or a pipe whose reader has gone, they never end it.

Imports nothing slow, as signals.py.
"""
import os
import sys


class _Lasting:
    """A text stream; where it can no longer be written to, it goes silent, and says so on `elsewhere`."""

    def __init__(self, stream, elsewhere=None):
        self.stream, self.elsewhere = stream, elsewhere
        self.lost = False

    def write(self, text):
        return self._tried(self.stream.write, text)

    def flush(self):
        self._tried(self.stream.flush)

    def _tried(self, f, *args):
        try:
            return f(*args)
        except OSError as e:  # a broken pipe, a full disk, a terminal that was closed
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # what the stream still holds goes there
            os.close(null)
            if self.elsewhere and not self.lost:
                print(f"standard output is gone ({e.strerror}): going on without it", file=self.elsewhere, flush=True)
            self.lost = True

    def __getattr__(self, name):  # isatty, encoding, fileno
        return getattr(self.stream, name)


def make_lasting(silent=False):
    """Replace sys.stdout and sys.stderr by streams whose loss is no error; silent: nothing goes to stdout.

    A descriptor 0, 1 or 2 that was closed is opened on the null device: else the next file to be opened would get its
    number, and with it what libraries write to "standard error".
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    streams = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None or (number == 1 and silent):
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be text in the terminal's encoding
        streams.append(stream)
    sys.stderr = _Lasting(streams[1])
    sys.stdout = _Lasting(streams[0], sys.stderr)
