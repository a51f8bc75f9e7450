"""A log as a line, and the runs in a folder."""
from mixer.report.runs import find_runs, log_line
from tests.helpers.finished import finished_run

ROW = {"step": 100, "train_loss": 0.6, "train_acc": 0.6, "val_loss": 0.69, "val_acc": 0.5,
       "lr": 1e-4, "images_per_s": 100.0, "data_wait": 0.03, "memory_mib": 900.0, "skipped": 0}


def test_a_line_of_the_log():
    assert "val loss 0.6900 acc 0.500 | 100 images/s | 900 MiB" in log_line(ROW)
    longest = log_line({**ROW, "step": 5000, "images_per_s": 1234.0, "memory_mib": 12345.0})
    assert len(longest) <= 100
    assert "val" not in log_line({**ROW, "val_loss": None, "val_acc": None})


def test_runs_are_found_by_row_and_seed(tmp_path):
    finished_run(tmp_path, "convmixer-p24", 10)
    finished_run(tmp_path, "convmixer-p24", 0)
    finished_run(tmp_path, "resnet18")
    (tmp_path / "resnet18-seed1").mkdir()  # not finished
    finished_run(tmp_path, "vit_cnn-p24").rename(tmp_path / "vit_cnn-p24-20261125-120000")
    runs = find_runs(tmp_path)
    assert {name: [run.summary["seed"] for run in seeds] for name, seeds in runs.items()} == {
        "resnet18": [0], "convmixer-p24": [0, 10]}
    assert runs["resnet18"][0].log[-1]["images"] == 125_000


def test_a_single_seed_given_by_seed_keeps_its_folder(tmp_path):
    finished_run(tmp_path, "resnet18", 7).rename(tmp_path / "resnet18")
    assert [run.summary["seed"] for run in find_runs(tmp_path)["resnet18"]] == [7]


def test_a_log_that_went_on_after_the_summary_is_cut_there(tmp_path):
    folder = finished_run(tmp_path, "resnet18", steps=500)
    text = (folder / "summary.json").read_text().replace('"steps": 500', '"steps": 300')
    (folder / "summary.json").write_text(text)
    assert [row["step"] for row in find_runs(tmp_path)["resnet18"][0].log] == [100, 200, 300]
