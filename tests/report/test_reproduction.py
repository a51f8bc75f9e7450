"""Made-up runs whose curves are the published ones, shifted."""
import math

import pytest

from mixer.experiments import published_curves
from mixer.report.reproduction import compare_curves, is_original
from mixer.report.runs import Run, find_runs
from mixer.training.config import read_config
from tests.helpers.finished import finished_run

NAME = "convmixer-p24"


def judged(out):
    return compare_curves(find_runs(out))


def test_the_published_curve_itself_is_inside_at_every_point(tmp_path):
    finished_run(tmp_path, NAME)
    points = judged(tmp_path)
    assert [point["step"] for point in points] == [100, 200, 300, 400, 500]
    assert all(point["acc_inside"] and point["loss_inside"] for point in points)
    assert {(point["row"], point["seeds"]) for point in points} == {(NAME, 1)}
    assert [point["published_acc"] for point in points] == [
        acc for _, _, acc in published_curves()[NAME][:5]]


def test_the_range_of_one_seed_is_the_binomial_error(tmp_path):
    """At step 100 the published accuracy is about 0.66: the error of 25,000 draws is 0.0059."""
    acc = published_curves()[NAME][0][2]
    error = 1.96 * math.sqrt(acc * (1 - acc) / 25_000)
    finished_run(tmp_path / "near", NAME, shift=0.9 * error)
    finished_run(tmp_path / "far", NAME, shift=1.1 * error)
    near, far = judged(tmp_path / "near")[0], judged(tmp_path / "far")[0]
    assert near["acc_inside"] and not far["acc_inside"]
    assert (near["acc_high"] - near["acc_low"]) / 2 == pytest.approx(error)
    assert (near["loss_high"] - near["loss_low"]) / 2 == pytest.approx(
        error * math.log(acc / (1 - acc)))


def test_a_point_between_two_seeds_is_inside(tmp_path):
    for seed, shift in enumerate((-0.05, 0.05)):
        finished_run(tmp_path, NAME, seed, shift=shift)
    points = judged(tmp_path)
    assert all(point["acc_inside"] and point["loss_inside"] for point in points)
    assert {point["seeds"] for point in points} == {2}
    assert points[0]["acc"] == pytest.approx(points[0]["published_acc"])


@pytest.mark.parametrize("change", [
    {"lr": 2e-4}, {"batch_size": 32}, {"schedule": "cosine"}, {"clip_grad": 1.0}, {"dim": 256},
    {"log_every": 50}, {"qkv_bias": True}, {"norm_eps": 1e-6}, {"randaugment": 2},
    {"images": 4000}, {"classes": ("Abyssinian", "Bengal", "Birman")},
])
def test_other_recipes_are_not_compared(tmp_path, change):
    finished_run(tmp_path, NAME, **change)
    (run,), = find_runs(tmp_path).values()
    assert not is_original(run) and judged(tmp_path) == []


def test_train_pys_defaults_are_the_originals():
    """A new option must be off by default, or stand in ORIGINAL_OPTIONS."""
    config, _ = read_config(["--data", "x", "--arch", "convmixer"], "")
    summary = {"classes": ["cat", "dog"], "data": "25,000 images"}
    assert is_original(Run(summary, vars(config), {}, []))


def test_seed_dtype_and_number_of_steps_are_free(tmp_path):
    finished_run(tmp_path, NAME, 3, steps=200, dtype="float16", kernel_size=None)
    assert len(judged(tmp_path)) == 2
