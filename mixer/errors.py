"""What a command can say when it stops, and with which exit code.

0 done, 1 failed while running, 2 wrong usage or input, 3 diverged, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""


class InputError(ValueError):
    """The arguments or the data are wrong; the message names the flag or the file and how to put it right."""

    exit_code = 2


class Diverged(RuntimeError):
    """The loss is no longer finite."""

    exit_code = 3


class Interrupted(Exception):
    """Stopped by a signal, after saving."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.exit_code = 128 + signum


def listed(words, most=10):
    """`a, b, c and 7 more`: a readable list of any length."""
    words = list(words)
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(str(word) for word in words[:most]) + more
