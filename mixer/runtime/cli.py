"""From a dataclass to a command line; from an exception to a line on stderr and an exit code."""
import argparse
import dataclasses
import difflib
import math
import operator
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterable

from .device import freed_memory_kept
from .distributed import rank_and_size
from .errors import Diverged, InputError, Interrupted, UsageError, first_line, printable
from .processes import out_of_memory

# the limits of an option, in words and as a comparison
LIMITS = {"least": ("at least", operator.ge), "above": ("above", operator.gt),
          "below": ("below", operator.lt)}


def option(default, help: str, *, choices=None, **limits):
    """A dataclass field with its help, its choices and its LIMITS, as `least=1`."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices,
                                                            limits=limits))


def option_types(config_class: type) -> dict[str, type]:
    """{field name: int, float, str or bool}; `int | None` counts as int."""
    hints = typing.get_type_hints(config_class)
    return {name: (typing.get_args(hint) or (hint,))[0] for name, hint in hints.items()}


def parse(config_class: type, argv: list[str], description: str, words: str | None = None) -> dict:
    """argv -> {option: value} for the flags in it. Raises UsageError if one is wrong.

    words: the field that takes the words without a flag, as a list of str.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _raise_usage_error

    # from each field an argument
    types = option_types(config_class)
    for field in dataclasses.fields(config_class):
        name, kind, help = flag(field.name), types[field.name], field.metadata["help"]
        how = dict(type=_word if kind is str else _number(kind, field.metadata["limits"]),
                   choices=field.metadata["choices"])
        if field.name == words:
            name, how = words, dict(type=_word, nargs="*", metavar=words.upper())
        elif kind is bool:
            how = dict(action="store_true")
        elif field.default is not None:
            help += f" [{field.default}]"
        parser.add_argument(name, help=help.replace("%", "%%"), **how)

    # read them
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        hint = did_you_mean(unknown[0].split("=")[0], map(flag, types))
        raise UsageError([f"unknown argument {unknown[0]}{hint}"])
    return vars(options)


def _raise_usage_error(message):
    raise UsageError([message.removeprefix("argument ").replace(": ", " ", 1)])


def _word(text):
    if not text:  # a variable that the shell does not know
        raise argparse.ArgumentTypeError("is empty")
    return text


def _number(kind, limits):
    """An argparse type: the number in a word, within its limits."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"must be a {whole}number, not {text!r}") from None
        for limit, bound in limits.items():
            words, fits = LIMITS[limit]
            if not (fits(value, bound) and value < math.inf):
                raise argparse.ArgumentTypeError(f"must be {words} {bound:g}, not {text}")
        return value
    return read


def whole_numbers(name: str, text: str, least: int) -> list[int]:
    """The numbers of an option as `0,1,2`, each once. Raises UsageError."""
    try:
        return list(dict.fromkeys(map(_number(int, {"least": least}), text.split(","))))
    except argparse.ArgumentTypeError as e:
        raise UsageError([f"{flag(name)} {e}"]) from None


def chosen(name: str, text: str | None, choices: dict[str, object]) -> list:
    """The choices that an option names, as `a,b`, or all. Raises UsageError."""
    words = list(choices) if text is None else list(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in choices:
            raise UsageError([f"{flag(name)} {word}: choose from {', '.join(choices)}"
                              f"{did_you_mean(word, choices)}"])
    return [choices[word] for word in words]


def flag(name: str) -> str:
    """The flag of an option: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing if no choice is similar."""
    choices = list(choices)
    near = [choice for choice in choices if len(word) > 2 and choice.startswith(word)]
    near = near or difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def run(main: Callable[[list[str]], object], argv: list[str]) -> typing.NoReturn:
    """Run `main(argv)` and exit. An error becomes one line on stderr; --debug adds the traceback.

    In a run of several ranks, only rank 0 prints to stdout, and only rank 0 reports what all ranks
    would report.
    """
    rank, _ = rank_and_size()
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        with freed_memory_kept():
            main(argv)
    except (Exception, KeyboardInterrupt) as e:
        if "--debug" in argv:
            traceback.print_exc()

        # one line, from rank 0 if all ranks have it
        e = Interrupted(signal.SIGINT) if isinstance(e, KeyboardInterrupt) else e
        if rank == 0 or not isinstance(e, (UsageError, Diverged, Interrupted)):
            prefix = f"error (rank {rank}): " if rank else "error: "
            line = printable(e if isinstance(e, InputError) else first_line(e))
            if out_of_memory(e):
                line = f"out of memory ({line}): try a smaller --batch-size, --image-size or model"
            print(line if isinstance(e, Interrupted) else prefix + line, file=sys.stderr)
        sys.exit(getattr(e, "exit_code", 1))
    sys.exit(0)
