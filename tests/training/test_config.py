import pytest

from mixer.experiments import ROWS
from mixer.runtime.errors import UsageError
from mixer.training.config import (
    DEMO,
    as_arguments,
    has_several_runs,
    planned_runs,
    read_config,
)


@pytest.mark.parametrize("arguments, message", [
    (["--arch", "vit_cn"], "--arch invalid choice: 'vit_cn' (choose from "),
    (["--arch", "resnet18", "--patch", "24"], "resnet18 has no patch"),
    (["--arch", "resnet18", "--kernel-size", "9", "--depth", "2"],
     "resnet18 has no depth; resnet18 has no kernel_size"),
    (["--arch", "all", "--patch", "24"], "--patch is for one model: give its --arch"),
    (["--arch", "all", "--rows", "resnet"], "--rows resnet: choose from resnet18, "),
    (["--rows", "resnet18"], "--rows needs --arch all"),
    (["--seeds", "0,one"], "--seeds must be a whole number, not 'one'"),
    (["--seeds", "0,-1"], "--seeds must be at least 0, not -1"),
    (["--seeds", "1,2", "--seed", "0"], "--seed and --seeds exclude each other"),
    (["--seeds", "1,2", "--resume", "last.pt"], "--resume must be auto"),
    (["--arch", "convmixer", "--kernel-size", "4"], "kernel_size 4 is even"),
    (["--arch", "vit_cnn", "--act", "relu"], "vit_cnn has no act"),
    (["--arch", "convmixer", "--act", "silu"], "act must be gelu or relu, not 'silu'"),
    (["--arch", "convmixer", "--qkv-bias"], "convmixer has no qkv_bias"),
    (["--norm-eps", "nan"], "norm_eps must be a positive number, not nan"),
    (["--arch", "all", "--init-from", "x.pt"], "--init-from is for one model"),
    (["--arch", "convmixer", "--depth", "0"], "depth must be a positive whole number, not 0"),
    (["--dim", "100"], "dim 100 does not divide into 8 heads"),
    (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    (["--batch-size", "many"], "--batch-size must be a whole number, not 'many'"),
    (["--steps", "0"], "--steps must be at least 1, not 0"),
    (["--lr", "-1"], "--lr must be above 0, not -1"),
    (["--lr", "inf"], "--lr must be above 0, not inf"),
    (["--val-fraction", "1"], "--val-fraction must be below 1, not 1"),
    (["--schedule", "cosin"], "--schedule invalid choice: 'cosin'"),
    (["--data", ""], "--data is empty"),
    (["--steps", "3", "--epochs", "2"], "--steps and --epochs exclude each other"),
    (["--resume", "auto"], "--resume auto needs --out"),
    (["--step", "3"], "unknown argument --step (did you mean --steps?)"),
    (["--steps"], "expected one argument"),
    (["surplus"], "unknown argument surplus"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError) as e:
        read_config(arguments, "")
    assert message in str(e.value)


def test_the_demo_takes_its_own_settings_and_the_command_line_comes_first():
    assert {key: getattr(read_config([], ""), key) for key in DEMO} == DEMO
    assert read_config(["--steps", "7"], "").steps == 7
    config = read_config(["--data", "x"], "")
    assert (config.batch_size, config.steps, config.lr, config.image_size) == (250, 5000, 1e-4, 192)
    assert (config.patch, config.dim, config.depth, config.heads) == (24, 512, 4, 8)
    assert config.kernel_size is None


def planned(*argv):
    return planned_runs(read_config(["--data", "x", *argv], ""))


def test_runs_are_planned_seed_by_seed():
    runs = planned("--arch", "all", "--rows", "convmixer-p16-d8,resnet18", "--seeds", "0,3")
    assert [(run.title, run.folder) for run in runs] == [
        ("ConvMixer 16/8, seed 0", "convmixer-p16-d8"), ("ResNet-18, seed 0", "resnet18"),
        ("ConvMixer 16/8, seed 3", "convmixer-p16-d8-seed3"),
        ("ResNet-18, seed 3", "resnet18-seed3")]
    assert runs[2].changes == {"arch": "convmixer", "patch": 16, "depth": 8, "seed": 3}


def test_the_nine_rows_of_one_seed_keep_their_folders():
    for argv in ((), ("--seed", "5")):
        runs = planned("--arch", "all", *argv)
        assert [run.folder for run in runs] == [row.name for row in ROWS]
        assert not any("seed" in run.changes for run in runs)


def test_one_model_with_several_seeds_keeps_its_options():
    config = read_config(["--data", "x", "--arch", "convmixer", "--dim", "8", "--seeds", "1,0,1"],
                         "")
    runs = planned_runs(config)
    assert [run.folder for run in runs] == ["convmixer-p24-seed1", "convmixer-p24"]
    arguments = as_arguments(config, **{**runs[0].changes, "seeds": None})
    one = read_config(arguments, "")
    assert (one.seed, one.seeds, one.dim) == (1, None, 8) and not has_several_runs(one)


def test_as_arguments_gives_the_same_config_back():
    for argv in (["--data", "x", "--compile", "--epochs", "2.5", "--clip-grad", "1"],
                 ["--arch", "convmixer", "--patch", "8", "--act", "relu"],
                 ["--arch", "vit_cnn", "--qkv-bias", "--norm-eps", "1e-6"]):
        config = read_config(argv, "")
        arguments = as_arguments(config) + (["--data", "x"] if config.data is None else [])
        again = read_config(arguments, "")
        assert {**vars(again), "data": config.data} == vars(config)


@pytest.mark.parametrize("text", ["-dall", "--data", "-", "--steps=3", "a b", "it's", 'a"b', "a\nb",
                                  "é", "\udcff", "end/", "=", "a=b", "$HOME", "*", "@file", " "])
def test_odd_words_reach_the_nine_rows_as_they_are(text):
    config = read_config([f"--{name}={text}" for name in ("data", "out", "cache", "resume")], "")
    again = read_config(as_arguments(config), "")
    assert again == config and again.out == text
