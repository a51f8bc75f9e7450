"""python -m mixer.predict as a user starts it: answers, files, messages, exit codes."""
import functools
import math
import shutil
from types import SimpleNamespace

import pytest

import mixer
import train
from mixer.predict.__main__ import kaggle_ids, labels_for
from mixer.runtime.errors import InputError
from mixer.runtime.files import read_csv
from tests.helpers.commands import TINY, assert_error, succeeded
from tests.helpers.pictures import copied, zipped
from tests.helpers.runs import read_json, read_rows

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def a_run(pictures, tmp_path_factory):
    """The folder of a finished run on the pictures, in float32."""
    out = tmp_path_factory.mktemp("run")
    train.main([*TINY, f"--data={pictures}", "--steps=12", "--log-every=4", f"--out={out}",
                "--lr=0.003", "--amp=off", f"--cache={tmp_path_factory.mktemp('cache')}"])
    return out


@pytest.fixture
def predict(command):
    def run(*arguments, **options):
        return command("mixer.predict", *arguments, **options).wait()
    run.start = functools.partial(command, "mixer.predict")
    return run


def kaggles_zip(pictures, path):
    """A zip like Kaggle's: test1.zip with test1/N.png in it. Returns which are dogs."""
    files = sorted(pictures.iterdir())
    test = zipped({f"test1/{i}.png": file.read_bytes() for i, file in enumerate(files, start=1)})
    path.write_bytes(zipped({"test1.zip": test, "train.zip": b"not read"}))
    return [file.name.startswith("dog") for file in files]


def test_files_folders_and_zips_are_answered_as_the_model_answers(predict, a_run, pictures,
                                                                  tmp_path, out):
    one = next(pictures.iterdir())
    kaggles_zip(pictures, tmp_path / "kaggle.zip")
    result = succeeded(predict(a_run, one, pictures, tmp_path / "kaggle.zip", "--out", out,
                               fresh=True))
    assert result.stderr == "", result
    rows = read_rows(out / "predictions.csv")
    assert len(rows) == 1 + 40 - 1 + 40, "an image that is named twice counts once"
    assert {path.name for path in out.iterdir()} == {"filters.png", "predictions.csv"}
    assert f"of {a_run / 'best.pt'} (its best validation), 32x32 pixels" in result.stdout
    assert_error(predict(a_run, one, "--out", out), 2, "is not empty; choose a new folder")

    model = mixer.load_model(a_run / "best.pt")
    want = model(model.preprocess(one)).softmax(1)[0]
    assert rows[0]["file"] == str(one)
    assert rows[0]["class"] == model.classes[want.argmax()]
    for name, p in zip(model.classes, want.tolist(), strict=True):
        # six digits are written; another batch size rounds differently in float32
        assert float(rows[0][f"p_{name}"]) == pytest.approx(p, rel=2e-5)


def test_one_image_is_answered_on_the_terminal_beside_the_run(predict, a_run, pictures):
    one = next(pictures.iterdir())
    calls = [predict.start(a_run / "last.pt", one) for _ in range(2)]
    for result in [succeeded(call.wait()) for call in calls]:
        assert f"\n{one}: cat 0." in result.stdout or f"\n{one}: dog 0." in result.stdout
    folders = list(a_run.glob("predictions-*"))
    assert len(folders) == 2, "each call has its own, also in one second"
    for folder in folders:
        assert (folder / "predictions.csv").exists()
        shutil.rmtree(folder)


def test_a_submission_has_the_log_loss_of_the_model(predict, a_run, pictures, tmp_path, out):
    kaggle, submission = tmp_path / "kaggle.zip", tmp_path / "new" / "submission.csv"
    dogs = kaggles_zip(pictures, kaggle)
    succeeded(predict(a_run, kaggle, "--submission", submission, "--out", tmp_path / "o"))
    rows = read_rows(submission)
    assert [int(row["id"]) for row in rows] == list(range(1, 41))
    log_loss = -sum(math.log(float(row["label"]) if dog else 1 - float(row["label"]))
                    for row, dog in zip(rows, dogs, strict=True)) / len(rows)

    other = copied(pictures, tmp_path / "other", lambda i, name: f"{name[:3]}.{1000 + i}.png")
    succeeded(predict(a_run, "--evaluate", other, "--out", out))
    loss = read_json(out / "evaluation.json")["loss"]
    assert log_loss == pytest.approx(loss, rel=1e-6)  # float32 losses, summed in float64


@pytest.mark.parametrize("name,row", [("last.pt", -1), ("best.pt", None)])
def test_the_split_of_a_run_gives_the_numbers_of_the_run(predict, a_run, pictures, tmp_path,
                                                         out, name, row):
    result = succeeded(predict(a_run / name, "--evaluate", "--split", "val", "--out", out))
    found = read_json(out / "evaluation.json")
    log, summary = read_csv(a_run / "log.csv"), read_json(a_run / "summary.json")
    if row is None:
        row = [int(line["step"]) for line in log].index(summary["best_step"])
        assert found["accuracy"] == summary["best_val_acc"]
    else:
        assert found["confusion"] == summary["confusion"]
        assert (found["accuracy"], found["loss"]) == (summary["val_acc"], summary["val_loss"])
    assert (found["accuracy"], found["loss"]) == (log[row]["val_acc"], log[row]["val_loss"])
    assert found["images"] == 4
    assert f"accuracy {found['accuracy']:.4f} (95 % interval" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "predictions.csv", "evaluation.json", "filters.png", "mistakes.png"}
    truths = [row["truth"] for row in read_rows(out / "predictions.csv")]
    assert sorted(truths) == ["cat", "cat", "dog", "dog"]

    # the same images at another place
    copy, place = shutil.copytree(pictures, tmp_path / "copy"), ("--evaluate", tmp_path / "copy")
    again = predict(a_run / name, *place, "--split", "val", "--out", tmp_path / "again")
    assert result.stdout.splitlines()[4:-1] == again.stdout.splitlines()[4:-1], again
    next(copy.iterdir()).unlink()
    fewer = predict(a_run / name, *place, "--split", "val", "--out", tmp_path / "none")
    assert_error(fewer, 2, "does not hold the run's val images")


def test_the_val_images_of_a_place_whose_train_images_have_equal_names(predict, pictures, tmp_path):
    data = copied(pictures, tmp_path / "data", lambda i, name: (
        f"{('train', 'val')[i % 2]}/{name[:3]}/{i // 2}.png"))
    out, run = tmp_path / "out", tmp_path / "run"
    train.main([*TINY, f"--data={data}", "--steps=1", f"--out={run}", f"--cache={out}"])
    result = predict(run, "--evaluate", "--split", "val", "--out", tmp_path / "new")
    assert "over 20 images" in result.stdout, result


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val")])
def test_of_a_place_with_splits_test_is_evaluated_alone(predict, a_run, pictures, tmp_path, splits):
    data = copied(pictures, tmp_path / "data",
                  lambda i, name: f"{splits[i // 4 % 2]}/{name[:3]}/{name}")
    shutil.make_archive(data, "zip", data)
    result = predict(a_run, data, "--evaluate", "--out", tmp_path / "out")
    if "test" in splits:
        assert f"20 images of {data / 'test'}" in succeeded(result).stdout, result
        result = predict(a_run, f"{data}.zip", "--evaluate", "--out", tmp_path / "new")
    assert_error(result, 2, "has splits: give the folder of one")


def test_damaged_images_are_named_get_no_row_and_fail_the_command(predict, a_run, pictures,
                                                                  tmp_path, out):
    folder = shutil.copytree(pictures, tmp_path / "images")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "phone.heic").write_bytes(b"x")
    result = predict(a_run, folder, "--out", out)
    assert result.returncode == 1
    assert "left out: .heic 1" in result.stdout
    assert "broken.jpg (" in result.stdout
    assert result.stderr.startswith("error: 1 images do not decode and have no row")
    files = [row["file"] for row in read_rows(out / "predictions.csv")]
    assert len(files) == 40 and not any("broken" in file for file in files)


@pytest.mark.parametrize("arguments,message", [
    (("{run}",), "name a run's folder or a checkpoint, and then images"),
    (("{run}", "--evaluate"), "name a run's folder or a checkpoint, and then images"),
    (("{run}", "--evaluate", "{pictures}", "{pictures}"), "with --evaluate one folder or zip"),
    (("{run}", "--split", "val", "{pictures}", "{pictures}"), "one folder or zip of labelled"),
    (("{run}", "--evaluate", "{pictures}"), "holds the run's own images: add --split val"),
    (("{run}", "--evaluate", "--split", "test"), "--split invalid choice: 'test'"),
    (("{tmp}", "{pictures}"), "is not a readable checkpoint: [Errno 2]"),
    (("{run}", "{tmp}/absent"), "absent does not exist"),
    (("{run}", "{run}/log.csv"), "no image decodes"),
    (("{run}", "{pictures}", "--submission", "{tmp}/s.csv"), "needs files named by id"),
])
def test_a_wrong_argument_is_named(predict, a_run, pictures, tmp_path, out, arguments, message):
    places = {"run": a_run, "pictures": pictures, "tmp": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(**places) for argument in arguments]
    result = predict(*arguments, "--out", out)
    assert_error(result, 1 if "decodes" in message else 2, message)
    assert "--data" not in result.stderr, "a flag of another command"
    assert not (out / "predictions.csv").exists()


def test_labels_are_in_the_order_of_the_models_classes():
    images = SimpleNamespace(path="data", classes=["CAT", "dog"], labels=[0, 1, 1])
    assert labels_for(images, ["dog", "cat"]) == [1, 0, 0]
    with pytest.raises(InputError, match="that the model does not know: dog; it knows cat, bird"):
        labels_for(images, ["cat", "bird"])


@pytest.mark.parametrize("classes, dog", [(["cat", "dog"], 1), (["Dogs", "cats"], 0)])
def test_the_ids_of_a_submission_and_the_label_of_dogs(classes, dog):
    assert kaggle_ids(["test1/12.jpg", "7.png"], classes) == ([12, 7], dog)
    for files, others in ((["cat.1.jpg"], classes), (["1.jpg"], [*classes, "fox"]),
                          (["1.jpg", "b/01.png"], classes)):
        with pytest.raises(InputError, match="--submission"):
            kaggle_ids(files, others)
