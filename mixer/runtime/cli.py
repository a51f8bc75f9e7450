"""From a dataclass to a command line; from an exception to lines on stderr and an exit code."""
import argparse
import contextlib
import dataclasses
import difflib
import math
import operator
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterable

from . import signals, system
from .distributed import lost_another, rank_and_size
from .errors import Diverged, InputError, Interrupted, UsageError, first_line, printable
from .processes import TORCHRUN
from .streams import lasting

# the bounds of an option, in words and as a comparison
BOUNDS = {"least": ("at least", operator.ge), "most": ("at most", operator.le),
          "above": ("above", operator.gt), "below": ("below", operator.lt)}


def option(default, help: str, *, choices=None, least=None, most=None, above=None, below=None):
    """A dataclass field with its help and its limits, which `invalid_values` checks."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, least=least, most=most, above=above, below=below))


def option_types(config_class: type) -> dict[str, type]:
    """{field name: int, float, str or bool}; `int | None` counts as int."""
    hints = typing.get_type_hints(config_class)
    return {name: (typing.get_args(hint) or (hint,))[0] for name, hint in hints.items()}


def invalid_values(config) -> list[str]:
    """One sentence for each value of a config that its option does not allow."""
    problems = [_problem(getattr(config, field.name), flag(field.name), field.metadata)
                for field in dataclasses.fields(config)]
    return [problem for problem in problems if problem]


def _problem(value, name, limits):
    if value is None:
        return None
    if value == "":  # a variable that the shell does not know
        return f"{name} is empty"
    if isinstance(value, int) and value >= 2**63:
        return f"{name} must be below 2^63, not {value}"
    choices = limits["choices"]
    if choices and value not in choices:
        hint = did_you_mean(value, choices)
        return f"{name} {value}: choose from {', '.join(choices)}{hint}"
    for limit, (words, fits) in BOUNDS.items():
        bound = limits[limit]
        if bound is not None and not (math.isfinite(value) and fits(value, bound)):
            return f"{name} must be {words} {bound:g}, not {value}"
    return None


def parse(config_class: type, argv: list[str], description: str,
          words: str | None = None) -> tuple[dict, list[str]]:
    """argv -> ({option: value} for the flags in it, one sentence for each problem).

    words: the field that takes the words without a flag, as a list of str. Raises UsageError if
    argparse cannot read it.
    """
    types = option_types(config_class)
    # argparse drops a value "--" (Python issue 59317), and no file needs this name
    if word := next((word for word in argv if re.fullmatch("--.*=--", word)), None):
        raise UsageError([f"{word}: write ./-- if this is a file's name"])
    parser = _parser(config_class, types, description, words)
    texts, unknown = parser.parse_known_intermixed_args(argv)
    options = {words: vars(texts).pop(words, [])} if words else {}
    problems = _unknown_arguments(unknown, [flag(name) for name in types if name != words])
    for name, text in vars(texts).items():
        if types[name] is str and text.split("/")[0] == "~":  # shells do not look behind an =
            text = os.path.expanduser(text)
            if text.startswith("~"):
                problems.append(f"{flag(name)} {text}: this user has no home folder")
        try:
            options[name] = types[name](text)
        except ValueError:
            kind = "a whole number" if types[name] is int else "a number"
            problems.append(f"{flag(name)} must be {kind}, not {text!r}")
    return options, problems


def _parser(config_class, types, description, words):
    """An ArgumentParser that keeps the flags and words in argv alone, as text."""
    package = getattr(sys.modules["__main__"], "__package__", None)  # of python -m
    parser = argparse.ArgumentParser(prog=f"python -m {package}" if package else None,
                                     description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _raise_usage_error
    for field in dataclasses.fields(config_class):
        text = field.metadata["help"].replace("%", "%%")
        if field.name == words:
            parser.add_argument(words, nargs="*", metavar=words.upper(), help=text)
            continue
        if types[field.name] is bool:
            parser.add_argument(flag(field.name), action="store_true", help=text)
            continue
        if field.metadata["choices"]:
            text += f" ({', '.join(field.metadata['choices'])})"
        if field.default is not None:
            text += f" [{field.default}]"
        parser.add_argument(flag(field.name), metavar=field.name.split("_")[-1].upper(), help=text)
    return parser


def _raise_usage_error(message):
    if message.endswith("expected one argument"):
        message += " (one that begins with - is written as --flag=value)"
    raise UsageError([message])


def _unknown_arguments(words, flags):
    """One sentence for each unknown flag or word. The word after an unknown flag is its value."""
    problems = []
    after_flag = False
    for word in words:
        is_flag = word.startswith("-")
        if is_flag or not after_flag:
            hint = did_you_mean(word.split("=")[0], flags)
            problems.append(f"unknown argument {word}{hint}")
        after_flag = is_flag
    return problems


def whole_numbers(name: str, text: str, least: int) -> tuple[list[int], list[str]]:
    """The numbers of an option as `0,1,2`, each once, and one sentence for each problem."""
    numbers, problems = [], []
    for word in text.split(","):
        if not re.fullmatch(r"-?\d{1,18}", word):
            problems.append(f"{flag(name)} must be a whole number, or several as 1,2, not {text!r}")
        elif int(word) < least:
            problems.append(f"{flag(name)} must be at least {least}, not {word}")
        else:
            numbers.append(int(word))
    return list(dict.fromkeys(numbers)), list(dict.fromkeys(problems))


def chosen(name: str, text: str | None, choices: dict[str, object]) -> tuple[list, list[str]]:
    """The choices that an option names, as `a,b`, or all; and one sentence for each problem."""
    names = list(choices) if text is None else list(dict.fromkeys(text.split(",")))
    problems = [f"{flag(name)} {word}: choose from {', '.join(choices)}"
                f"{did_you_mean(word, choices)}" for word in names if word not in choices]
    return [choices[word] for word in names if word in choices], problems


def flag(name: str) -> str:
    """The flag of an option: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing if no choice is similar."""
    near = [choice for choice in choices if len(word) > 2 and choice.startswith(word)]
    near = near or difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def run(main: Callable[[list[str]], object], argv: list[str]) -> typing.NoReturn:
    """Run `main(argv)` and exit. An error becomes one line per problem on stderr.

    --debug adds the traceback. In a run of several ranks, only rank 0 prints to stdout, and only
    rank 0 reports what all ranks would report. Streams, signals and their state are given back:
    the caller may be a notebook that lives on.
    """
    if reason := system.why_not_here():
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    rank, exit_code = rank_and_size()[0], 0
    with (lasting(silent=rank > 0), _workers_die_with_torchrun(), system.freed_memory_kept()):
        try:
            with signals.listening():
                exit_code = _exit_code(main, argv, rank)
        except Interrupted as e:  # the signal came before `main`, or after it
            exit_code = e.exit_code
            if rank == 0:
                _report(e, rank)
    sys.exit(exit_code)


def _exit_code(main, argv, rank):
    try:
        main(argv)
        return 0
    except (Exception, Interrupted) as e:
        with signals.deferred():
            if "--debug" in argv:
                traceback.print_exc()
            if signals.was_raised() and not isinstance(e, Interrupted):
                e = Interrupted(signals.pending())
            if rank == 0 or not isinstance(e, (UsageError, Diverged, Interrupted)):
                _report(e, rank)
            return getattr(e, "exit_code", 1)


@contextlib.contextmanager
def _workers_die_with_torchrun():
    """If torchrun is killed, its workers must not keep GPUs and folder."""
    if TORCHRUN not in os.environ:
        yield
        return
    before = signals.die_with_parent(os.getppid(), signal.SIGTERM)
    try:
        yield
    finally:
        system.set_death_signal(before)


def _report(e, rank):
    prefix = f"error (rank {rank}): " if rank else "error: "
    for message in _messages(e):
        print(message if isinstance(e, Interrupted) else prefix + message, file=sys.stderr)


def _messages(e):
    """The lines to print for an exception: all of ours, the first one of a library's."""
    if isinstance(e, UsageError):
        return str(e).splitlines()
    if isinstance(e, (InputError, Interrupted)):
        return [printable(e)]
    if lost_another(e):
        return ["another process of this run has died, and may have printed why; "
                "--resume auto continues from the last checkpoint"]
    return [printable(first_line(e))]
