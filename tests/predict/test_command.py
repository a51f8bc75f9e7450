"""python -m mixer.predict as a user starts it: answers, files, messages, exit codes."""
import csv
import json
import math
import shutil
import signal
import zipfile

import pytest

import mixer
from mixer.runtime.files import read_csv
from tests.helpers.commands import ROOT, TINY
from tests.helpers.plants import Plant

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def a_run(pictures, tmp_path_factory):
    """The folder of a finished run on the pictures, in float32."""
    import train
    out = tmp_path_factory.mktemp("run")
    cache = tmp_path_factory.mktemp("cache")
    train.main([*TINY, f"--data={pictures}", "--steps=12", "--log-every=4", f"--out={out}",
                "--lr=0.003", "--amp=off", f"--cache={cache}"])
    return out


@pytest.fixture
def predict(command):
    def run(*arguments, **options):
        return command("mixer.predict", *arguments, **options).wait()
    return run


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def renamed(pictures, path, nested=None):
    """A zip of the pictures as Kaggle's test1.zip: test1/N.png, and the label of each N."""
    labels = {}
    with zipfile.ZipFile(path, "w") as file:
        for number, picture in enumerate(sorted(pictures.iterdir()), start=1):
            file.write(picture, f"test1/{number}.png")
            labels[number] = picture.name.startswith("dog")
    if nested:
        with zipfile.ZipFile(nested, "w") as file:
            file.write(path, "test1.zip")
            file.writestr("train.zip", "not read")
    return labels


def test_files_folders_and_zips_are_answered_as_the_model_answers(predict, a_run, pictures,
                                                                  tmp_path):
    one = next(pictures.iterdir())
    renamed(pictures, tmp_path / "test1.zip")
    result = predict(a_run, one, pictures, tmp_path / "test1.zip", "--out", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == "", result
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 1 + 40 - 1 + 40, "an image that is named twice counts once"
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "filters.png", "predictions.csv"]

    model = mixer.load_model(a_run / "best.pt")
    want = model(model.preprocess(one)).softmax(1)[0]
    assert rows[0]["file"] == str(one)
    assert rows[0]["class"] == model.classes[want.argmax()]
    for name, p in zip(model.classes, want.tolist(), strict=True):
        # six digits are written; the fused model rounds differently in float32
        assert float(rows[0][f"p_{name}"]) == pytest.approx(p, rel=2e-5)


def test_one_image_is_answered_on_the_terminal_beside_the_run(predict, a_run, pictures):
    one = next(pictures.iterdir())
    result = predict(a_run / "last.pt", one)
    assert result.returncode == 0, result.stderr
    assert f"\n{one}: cat 0." in result.stdout or f"\n{one}: dog 0." in result.stdout
    folder, = a_run.glob("predictions-*")
    assert (folder / "predictions.csv").exists()
    shutil.rmtree(folder)


@pytest.mark.parametrize("kaggle", ["test1.zip", "dogs-vs-cats.zip"])
def test_a_submission_has_the_log_loss_of_the_model(predict, a_run, pictures, tmp_path, kaggle):
    labels = renamed(pictures, tmp_path / "test1.zip", tmp_path / "dogs-vs-cats.zip")
    submission = tmp_path / "new" / "submission.csv"
    result = predict(a_run, tmp_path / kaggle, "--submission", submission, "--out", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    rows = rows_of(submission)
    assert [int(row["id"]) for row in rows] == sorted(labels)
    log_loss = -sum(math.log(float(row["label"]) if labels[int(row["id"])] else
                             1 - float(row["label"])) for row in rows) / len(rows)

    result = predict(a_run, "--evaluate", pictures, "--out", tmp_path / "evaluation")
    assert result.returncode == 0, result.stderr
    loss = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["loss"]
    assert log_loss == pytest.approx(loss, rel=1e-6)  # float32 losses, summed in float64


@pytest.mark.parametrize("name,row", [("last.pt", -1), ("best.pt", None)])
def test_the_split_of_a_run_gives_the_numbers_of_the_run(predict, a_run, tmp_path, name, row):
    result = predict(a_run / name, "--evaluate", "--split", "val", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    log, summary = read_csv(a_run / "log.csv"), json.loads((a_run / "summary.json").read_text())
    if row is None:
        row = [int(line["step"]) for line in log].index(summary["best_step"])
        assert found["accuracy"] == summary["best_val_acc"]
    else:
        assert found["confusion"] == summary["confusion"]
        assert (found["accuracy"], found["loss"]) == (summary["val_acc"], summary["val_loss"])
    assert (found["accuracy"], found["loss"]) == (log[row]["val_acc"], log[row]["val_loss"])
    assert found["images"] == 4
    assert f"accuracy {found['accuracy']:.4f} (95 % interval" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predictions.csv", "evaluation.json", "filters.png", "mistakes.png"}
    truths = [row["truth"] for row in rows_of(tmp_path / "out" / "predictions.csv")]
    assert sorted(truths) == ["cat", "cat", "dog", "dog"]


def test_another_place_of_the_same_images_serves_the_split(predict, a_run, pictures, tmp_path):
    copy = shutil.copytree(pictures, tmp_path / "copy")
    result = predict(a_run, "--evaluate", copy, "--split", "val", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    next(copy.iterdir()).unlink()
    result = predict(a_run, "--evaluate", copy, "--split", "val", "--out", tmp_path / "out")
    assert result.returncode == 2 and "does not hold the images of the run" in result.stderr


def test_damaged_images_are_named_get_no_row_and_fail_the_command(predict, a_run, pictures,
                                                                  tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "images")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "phone.heic").write_bytes(b"x")
    result = predict(a_run, folder, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "1 files of other formats ignored: .heic 1" in result.stdout
    assert "broken.jpg (" in result.stdout
    assert result.stderr.startswith("error: 1 images do not decode and have no row")
    files = [row["file"] for row in rows_of(tmp_path / "out" / "predictions.csv")]
    assert len(files) == 40 and not any("broken" in file for file in files)

    result = predict(a_run, folder / "broken.jpg", "--out", tmp_path / "none")
    assert result.returncode == 1 and "no image decodes" in result.stderr
    assert not (tmp_path / "none" / "predictions.csv").exists()


@pytest.mark.parametrize("arguments,message", [
    ((), "name a run's folder or a checkpoint"),
    (("{run}",), "name images, folders or zips"),
    (("{run}", "--evaluate"), "--evaluate needs one folder or zip"),
    (("{run}", "--split", "val", "{pictures}"), "--split needs --evaluate"),
    (("{run}", "--evaluate", "--split", "test"), "--split test: choose from val, train"),
    (("{run}", "{pictures}", "--batchsize", "4"), "did you mean --batch-size?"),
    (("{tmp}", "{pictures}"), "holds neither best.pt nor last.pt"),
    (("{tmp}/no.pt", "{pictures}"), "there is no checkpoint"),
    (("{run}/config.json", "{pictures}"), "is not a readable checkpoint"),
    (("{run}", "{tmp}/absent"), "absent does not exist"),
    (("{run}", "{run}/log.csv"), "no image decodes"),
    (("{run}", "{pictures}", "--submission", "{tmp}/s.csv"), "the id is the file's name"),
    (("{run}", "{pictures}", "--evaluate", "--submission", "{tmp}/s.csv"), "leave out --evaluate"),
    (("{run}", "{tmp}", "--evaluate"), "no images in"),
])
def test_a_wrong_argument_is_named(predict, a_run, pictures, tmp_path, arguments, message):
    places = {"run": a_run, "pictures": pictures, "tmp": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(**places) for argument in arguments]
    result = predict(*arguments, "--out", tmp_path / "out")
    assert result.returncode == (1 if "decodes" in message else 2), result
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert "--data" not in result.stderr, "a flag of another command"
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_classes_that_the_model_does_not_know_are_refused(predict, a_run, pictures, tmp_path):
    other = tmp_path / "other"
    for number, picture in enumerate(sorted(pictures.iterdir())):
        folder = other / ("CAT" if number % 2 else "Bird")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / f"{number}.png")
    result = predict(a_run, other, "--evaluate", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "classes that the model does not know: Bird; it knows cat, dog" in result.stderr


@pytest.mark.parametrize("signum,code", [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command(predict, a_run, pictures, tmp_path, signum, code):
    result = predict(a_run, pictures, "--out", tmp_path / "out", "--batch-size", 4, plants=[
        Plant("mixer.training.recipe.logits_of", signum, call=3)])
    assert result.returncode == code, result
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_a_fresh_python_runs_the_module_and_helps(command, a_run, pictures, tmp_path):
    result = command("mixer.predict", "--help", fresh=True).wait()
    assert result.returncode == 0 and "usage: python -m mixer.predict" in result.stdout
    assert "--submission" in result.stdout and "PATHS" in result.stdout
    result = command("mixer.predict", a_run, pictures, "--out", tmp_path / "out", fresh=True).wait()
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert ROOT.joinpath("mixer/predict/__main__.py").exists()
