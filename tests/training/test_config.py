import pytest

from mixer.experiments import ROWS
from mixer.runtime.errors import InputError
from mixer.training.config import DEMO, as_arguments, read_config


@pytest.mark.parametrize("arguments, message", [
    ("--arch resnet18 --patch 24", "resnet18 has no patch"),
    ("--arch resnet18 --kernel-size 9 --depth 2",
     "resnet18 has no depth; resnet18 has no kernel_size"),
    ("--arch convmixer --qkv-bias", "convmixer has no qkv_bias"),
    ("--arch all --patch 24", "--patch: only with one --arch"),
    ("--arch all --init-from x.pt", "--init-from: only with one --arch"),
    ("--arch all --rows resnet", "--rows resnet: choose from resnet18, "),
    ("--rows resnet18", "--rows needs --arch all"),
    ("--seeds 0,one", "--seeds invalid literal for int() with base 10: 'one'"),
    ("--seeds 1,2 --seed 0", "--seed and --seeds exclude each other"),
    ("--seeds 1,2 --resume last.pt", "--resume must be auto"),
    ("--dim 100", "dim 100 does not divide into 8 heads"), ("--data=", "--data is empty"),
    ("--resume auto", "--resume auto needs --out"),
    ("--step 3", "unknown argument --step; did you mean --steps?"),
    *((f"{flag} {value}", f"{flag} must be in {bounds}, not {value}") for flag, value, bounds in (
        ("--steps", 0, "[1, inf)"), ("--depth", 0, "[1, inf)"), ("--lr", "inf", "(0, inf)"),
        ("--lr", 0, "(0, inf)"), ("--seed", 2**64, f"[0, {2**64})"),
        ("--clip-grad", 0, "(0, inf)"), ("--val-fraction", 1, "[0, 1)")))])
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError) as e:
        read_config(arguments.split(), "")
    assert message in str(e.value)


def config_of(*argv):
    return read_config(argv, "")[0]


def test_the_demo_takes_its_own_settings_and_the_command_line_comes_first():
    assert {key: getattr(config_of(), key) for key in DEMO} == DEMO
    assert config_of("--steps", "7").steps == 7
    config = config_of("--data", "x")
    assert (config.batch_size, config.steps, config.lr, config.image_size) == (250, 5000, 1e-4, 192)
    assert (config.patch, config.dim, config.depth, config.heads) == (24, 512, 4, 8)
    assert config.kernel_size is None


def test_what_differs_from_the_defaults():
    assert sorted(str(config_of()).split(", ")) == sorted(f"{k} {v}" for k, v in DEMO.items())
    assert str(config_of("--data", "x")) == "data x"
    argv = "--data", "x", "--arch", "convmixer", "--patch", "16"
    assert str(config_of(*argv)) == "arch convmixer, patch 16, data x"
    assert str(config_of("--arch", "all", "--data", "x")) == "arch all, data x"


def planned(*argv):
    _, runs = read_config(["--data", "x", *argv], "")
    return [(title, folder, config_of(*arguments)) for title, folder, arguments in runs]


def test_runs_are_planned_seed_by_seed():
    runs = planned("--arch", "all", "--rows", "convmixer-p16-d8,resnet18", "--seeds", "0,3")
    assert [(title, folder) for title, folder, _ in runs] == [
        ("ConvMixer 16/8, seed 0", "convmixer-p16-d8"), ("ResNet-18, seed 0", "resnet18"),
        ("ConvMixer 16/8, seed 3", "convmixer-p16-d8-seed3"),
        ("ResNet-18, seed 3", "resnet18-seed3")]
    config = runs[2][2]
    assert (config.arch, config.patch, config.depth, config.seed) == ("convmixer", 16, 8, 3)
    assert (config.rows, config.seeds, config.data) == (None, None, "x")


def test_the_nine_rows_of_one_seed_keep_their_folders():
    for argv in ((), ("--seed", "5")):
        runs = planned("--arch", "all", *argv)
        assert [folder for _, folder, _ in runs] == [row.name for row in ROWS]
        assert {config.seed for _, _, config in runs} == {5 if argv else 0}


def test_one_model_with_several_seeds_keeps_its_options():
    runs = planned("--arch", "convmixer", "--dim", "8", "--seeds", "1,0,1")
    assert [folder for _, folder, _ in runs] == ["convmixer-p24-seed1", "convmixer-p24"]
    one = runs[0][2]
    assert (one.seed, one.seeds, one.dim) == (1, None, 8)
    assert read_config(as_arguments(one), "") == (one, [])  # a single run


def test_as_arguments_gives_the_same_config_back():
    for argv in ("--data x --compile --clip-grad 1", "--arch convmixer --patch 8 --act relu",
                 "--arch vit_cnn --qkv-bias --norm-eps 1e-6"):
        config = config_of(*argv.split())
        arguments = as_arguments(config) + (["--data", "x"] if config.data is None else [])
        again = config_of(*arguments)
        assert {**vars(again), "data": config.data} == vars(config)


@pytest.mark.parametrize("text", ["-dall", "--data", "-", "--steps=3", "a b", "it's", 'a"b', "a\nb",
                                  "é", "\udcff", "end/", "=", "a=b", "$HOME", "*", "@file", " "])
def test_odd_words_reach_the_nine_rows_as_they_are(text):
    config = config_of(*(f"--{name}={text}" for name in ("data", "out", "cache", "resume")))
    again = config_of(*as_arguments(config))
    assert again == config and again.out == text
