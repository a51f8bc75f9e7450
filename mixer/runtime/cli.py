"""From a dataclass to a command line; from an exception to a line on stderr and an exit code."""
import argparse
import dataclasses
import difflib
import math
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable

from .device import keep_freed_memory
from .distributed import rank_and_size
from .errors import Diverged, InputError, Interrupted, message


def option(default, help: str, *, choices=None, least=-math.inf, above=-math.inf, below=math.inf):
    """A dataclass field with its help, its choices, or limits: least <= n, above < n < below."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices,
                                                            limits=(least, above, below)))


def parse(config_class: type, argv: list[str], description: str, words: str | None = None) -> dict:
    """argv -> {option: value} for the flags in it. Raises InputError if one is wrong.

    words: the field that takes the positional arguments, as a list of str.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def refuse(message):
        raise InputError(message.removeprefix("argument ").replace(": ", " ", 1))
    parser.error = refuse

    # from each field an argument
    for field in dataclasses.fields(config_class):
        name, help = flag(field.name), field.metadata["help"]
        kind = (typing.get_args(field.type) or (field.type,))[0]  # `int | None` counts as int
        how = dict(type=_value(kind, *field.metadata["limits"]), choices=field.metadata["choices"])
        if field.name == words:
            name, how = words, dict(type=_value(str), nargs="*", metavar=words.upper())
        elif kind is bool:
            how = dict(action="store_true")
        elif field.default is not None:
            help += f" [{field.default}]"
        parser.add_argument(name, help=help.replace("%", "%%"), **how)

    # the values; a close flag for an unknown one
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = [flag(field.name) for field in dataclasses.fields(config_class)]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        raise InputError(f"unknown argument {unknown[0]}"
                         + (f"; did you mean {close[0]}?" if close else ""))
    return vars(options)


def _value(kind, least=-math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a string that is not empty, or a number within its limits."""
    def read(text):
        value = kind(text)
        if text == "":  # as of an unset shell variable
            raise argparse.ArgumentTypeError("is empty")
        if kind in (int, float) and not (least <= value < below and above < value):
            start = f"({above}" if above > least else f"[{least}"
            raise argparse.ArgumentTypeError(f"must be in {start}, {below}), not {text}")
        return value
    read.__name__ = kind.__name__  # as in argparse's `invalid int value`
    return read


def whole_numbers(name: str, text: str, least: int) -> list[int]:
    """The numbers of an option as `0,1,2`, each once. Raises InputError."""
    try:
        return list(dict.fromkeys(map(_value(int, least), text.split(","))))
    except (ValueError, argparse.ArgumentTypeError) as e:
        raise InputError(f"{flag(name)} {e}") from None


def parse_names(name: str, text: str | None, choices: dict[str, object]) -> list:
    """The choices that an option names, as `a,b`, or all. Raises InputError."""
    words = list(choices) if text is None else list(dict.fromkeys(text.split(",")))
    if wrong := [word for word in words if word not in choices]:
        raise InputError(f"{flag(name)} {wrong[0]}: choose from {', '.join(choices)}")
    return [choices[word] for word in words]


def flag(name: str) -> str:
    """The flag of an option: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def run(main: Callable[[list[str]], object], argv: list[str]) -> typing.NoReturn:
    """Run `main(argv)` and exit. An error becomes one line on stderr; --debug adds the traceback.

    Of several ranks, only rank 0 prints to stdout, and reports a divergence or a signal.
    """
    # the command
    rank, size = rank_and_size()
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        keep_freed_memory()
        main(argv)
    except (Exception, KeyboardInterrupt) as e:
        if "--debug" in argv:
            traceback.print_exc()

        # one line; of a divergence or a signal from rank 0 only
        e = Interrupted(signal.SIGINT) if isinstance(e, KeyboardInterrupt) else e
        if rank == 0 or not isinstance(e, (Diverged, Interrupted)):
            prefix = f"error (rank {rank}): " if rank else "error: "
            prefix = "" if isinstance(e, Interrupted) else prefix
            print(prefix + message(e), file=sys.stderr)
        sys.exit(getattr(e, "exit_code", 1))
    # success
    if size > 1:  # gloo's threads sometimes abort the process during Python's normal exit
        sys.stdout.flush()
        os._exit(0)
    sys.exit(0)
