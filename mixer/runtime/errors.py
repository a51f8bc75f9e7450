"""What a command can say when it stops, and with which exit code.

0 done, 1 failed while running, 2 wrong usage or input, 3 diverged; stopped by Ctrl-C 130, by SIGTERM 143, by SIGHUP 129.
"""
import signal


class InputError(ValueError):
    """The arguments or the data are wrong; the message names the flag or the file and how to put it right."""

    exit_code = 2


class UsageError(InputError):
    """The arguments alone are wrong, in every process of a run alike; each of `wrong` is a line of its own."""

    def __init__(self, wrong):
        super().__init__("\n".join(map(printable, wrong)))


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""

    exit_code = 3


class Interrupted(BaseException):
    """Stopped by a signal; what there was to save is saved. No Exception: nothing that catches those may swallow it."""

    def __init__(self, signum, message=""):
        super().__init__(f"stopped by {signal.Signals(signum).name}{message}")
        self.exit_code = 128 + signum


def printable(text):
    """Text in which nothing moves a cursor, starts a line or fails to encode: file names may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def listed(words, most=10):
    """`a, b, c and 7 more`: a readable list of any length."""
    words = list(words)
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(printable(word) for word in words[:most]) + more
