"""Any words after train.py and bench.py: refused in readable lines with exit code 2, or right."""
import dataclasses
import random
import typing

import pytest

import bench
import train as script
from mixer.runtime.errors import InputError
from mixer.training.config import Config, read_config
from tests.helpers.commands import TINY, assert_error

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FLAGS = ["--" + field.name.replace("_", "-")
         for config in (Config, bench.Config) for field in dataclasses.fields(config)]


@st.composite
def misspelt_flags(draw):
    flag = draw(st.sampled_from(FLAGS))
    cut = draw(st.integers(2, len(flag)))
    return flag[:cut] + flag[cut + 1:]


NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats()).map(str)
KNOWN_WORDS = st.sampled_from(["auto", "cpu", "cuda", "cuda:99", "fp16", "all", "convmixer",
                               "vit_cnn", "resnet18", "cosine", "192", "24", "", "-", "--"])
WORDS = st.one_of(st.sampled_from(FLAGS), misspelt_flags(), NUMBERS, KNOWN_WORDS,
                  st.text(max_size=8))
ARGUMENTS = st.lists(WORDS, max_size=6).filter(lambda words: not {"-h", "--help"} & set(words))
SETTINGS = dict(deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.too_slow])  # no test of speed


def readable(message):
    """One line that moves no cursor."""
    message = message.removesuffix("\n")
    return bool(message.strip()) and message.isprintable()


@settings(max_examples=400, **SETTINGS)
@given(ARGUMENTS)
@example(["--batch-size", "9" * 5000])
@example(["--patch", "0"])
@example(["--lr=nan", "--clip-grad=-inf", "--weight-decay", "1e400"])
@example(["--image-size", str(10**9), "--patch", "7"])
def test_any_arguments_give_a_config_or_a_readable_refusal(argv):
    for read in (lambda: read_config(argv, ""), lambda: bench.read_config(argv)):
        try:
            assert read() is not None
        except InputError as e:
            assert e.exit_code == 2 and str(e)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("main", [script.main, bench.main], ids=["train.py", "bench.py"])
def test_any_arguments_to_the_command_itself(call, tmp_path, tally, main, count):
    """Always beside a flag that does not exist, so that nothing is trained: exit code 2, one line,
    nothing made."""
    tried = 0

    @settings(max_examples=count, **SETTINGS)
    @given(ARGUMENTS)
    def run(argv):
        nonlocal tried
        tried += 1
        argv = [word for word in argv if word != "--debug"]  # which asks for a traceback
        result = call(main, "--out", tmp_path / "out", "--no-such-flag", "-1", *argv)
        assert result.returncode == 2 and result.stdout == "", (argv, result)
        assert readable(result.stderr), (argv, result)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    run()
    tally(f"arguments of {main.__module__}.py", tried, tried)


EXTREMES = {int: ["0", "1", "2", "7", "9", str(2**63 - 1)],
            float: ["0", "-0.0", "5e-324", "1e-30", "0.9999999999999999", "1", "1e30", "1.7e308"]}


def extreme_options():
    """[(name, value)] of train.py, without those that would take for ever."""
    kinds = {field.name: (typing.get_args(field.type) or (field.type,))[0]
             for field in dataclasses.fields(Config) if field.name not in ("steps", "depth")}
    return [(name, value) for name, kind in kinds.items() for value in EXTREMES.get(kind, [""])]


@pytest.mark.parametrize("count", [
    24, pytest.param(len(extreme_options()), marks=pytest.mark.campaign)])
def test_the_smallest_and_largest_values(train, pictures, tmp_path, tally, count):
    """Of each option by itself, in a run of two steps: refused in words, or trained with; exit
    code 1 is left for memory."""
    for i, (name, value) in enumerate(random.Random(1).sample(extreme_options(), count)):
        result = train.start(*TINY, "--data", pictures, "--steps", 2, "--out", tmp_path / f"run{i}",
                             f"--{name.replace('_', '-')}={value}").wait()
        assert result.returncode in (0, 2, 3) or "out of memory" in result.stderr, (name, value,
                                                                                    result)
        if result.returncode == 0:
            assert result.stderr == "", (name, value, result)
        else:
            assert readable(result.stderr), (name, value, result)
    tally("smallest and largest values of options of train.py", count, count)


@pytest.mark.parametrize("argv, message", [
    (["--data", "no\nsuch\x1b[2Jfolder"], r"no\nsuch\x1b[2Jfolder does not exist"),
    (["--image-size", "1", "--patch", "2"], "(these do: only 1)"),
])
def test_what_is_wrong_is_named_in_one_line(train, out, argv, message):
    result = train("--out", out, *argv)
    assert_error(result, 2, message)
    assert readable(result.stderr), result.stderr
