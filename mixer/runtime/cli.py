"""From a dataclass to a command line, and from exceptions to one line on stderr and an exit code."""
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

from . import signals
from .distributed import lost_another, rank_and_size
from .errors import Diverged, InputError, Interrupted, UsageError, printable
from .processes import TORCHRUN
from .streams import make_lasting


def option(default, help, *, choices=None, least=None, most=None, above=None, below=None):
    """A dataclass field with what the command line must know about it; bounds are checked by `invalid_values`."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most, above=above, below=below))


def _flag(field):
    return "--" + field.name.replace("_", "-")


def option_types(config_class):
    """{field name: int, float, str or bool}; `int | None` counts as int."""
    hints = typing.get_type_hints(config_class)
    return {name: (typing.get_args(hint) or (hint,))[0] for name, hint in hints.items()}


def invalid_values(config):
    """What is out of bounds in a config, one sentence each."""
    wrong = []
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        if value is None:
            continue
        if value == "":  # as of a variable that a shell does not know
            wrong.append(f"{_flag(field)} is empty")
        elif isinstance(value, int) and value >= 2**63:
            wrong.append(f"{_flag(field)} must be below 2^63, not {value}")
        if rule["choices"] and value not in rule["choices"]:
            wrong.append(f"{_flag(field)} {value}: there are {', '.join(rule['choices'])}"
                         + did_you_mean(str(value), rule["choices"]))
        for bound, text, fits in (("least", "at least", operator.ge), ("most", "at most", operator.le), ("above", "above", operator.gt),
                                  ("below", "below", operator.lt)):
            if rule[bound] is not None and not (math.isfinite(value) and fits(value, rule[bound])):
                wrong.append(f"{_flag(field)} must be {text} {rule[bound]:g}, not {value}")
                break
    return wrong


def parse(config_class, argv, description):
    """argv -> {option: value} of those given, and what is wrong with the rest, one sentence each."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, add_help=True)
    parser.error = _raise_usage_error
    types = option_types(config_class)
    for field in dataclasses.fields(config_class):
        rule = field.metadata
        if types[field.name] is bool:
            parser.add_argument(_flag(field), action="store_true", default=argparse.SUPPRESS, help=rule["help"])
            continue
        choices = f" ({', '.join(rule['choices'])})" if rule["choices"] else ""
        shown = "" if field.default is None else f" [{field.default}]"
        parser.add_argument(_flag(field), metavar=field.name.split("_")[-1].upper(), default=argparse.SUPPRESS,
                            help=(rule["help"] + choices + shown).replace("%", "%%"))
    known, unknown = parser.parse_known_args(argv)
    flags = [_flag(field) for field in dataclasses.fields(config_class)]
    wrong = [f"unknown argument {word}{did_you_mean(word.split('=')[0], flags)}" for before, word in zip([""] + unknown, unknown)
             if word.startswith("-") or not before.startswith("-")]  # not the value behind an unknown flag
    given = {}
    for name, text in vars(known).items():
        try:
            given[name] = types[name](text)
        except ValueError:
            what = "a whole number" if types[name] is int else "a number"
            wrong.append(f"--{name.replace('_', '-')} must be {what}, not {text!r}")
    return given, wrong


def _raise_usage_error(message):
    raise UsageError([message])


def run(main, argv):
    """Call `main(argv)` and leave with an exit code; what is wrong goes to stderr, a line each, the traceback with --debug.

    Of several processes (torchrun), the first alone speaks on stdout, and says what all of them would say.
    """
    rank = rank_and_size()[0]
    make_lasting(silent=rank > 0)
    signals.start_raising()
    if TORCHRUN in os.environ:  # killed, it shall leave no processes behind that hold GPUs and folder
        signals.die_with_parent(os.getppid(), signal.SIGTERM)
    code, said = 0, []
    try:
        main(argv)
    except (Exception, Interrupted, KeyboardInterrupt) as e:
        if "--debug" in argv:
            traceback.print_exc()
        if signals.was_raised() and not isinstance(e, Interrupted):
            e = Interrupted(signals.pending())
        code = getattr(e, "exit_code", 130 if isinstance(e, KeyboardInterrupt) else 1)
        said = [] if rank and isinstance(e, (UsageError, Diverged, Interrupted)) else _in_lines(e)
    for line in said:
        print(line if code > 128 else f"error{f' (rank {rank})' if rank else ''}: {line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.exit(code)


def _in_lines(e):
    """What to say of an exception: of ours all, of other people's the first line."""
    if isinstance(e, UsageError):
        return str(e).splitlines()
    if isinstance(e, (InputError, Interrupted)):
        return [printable(e)]
    if lost_another(e):
        return ["another process of this run is gone, and may have said why; --resume auto goes on from the last checkpoint"]
    return [printable((str(e).strip() or type(e).__name__).splitlines()[0])]


def did_you_mean(word, choices):
    """` (did you mean X?)`, or nothing where no choice is near."""
    near = [choice for choice in choices if len(word) > 2 and choice.startswith(word)] or difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
