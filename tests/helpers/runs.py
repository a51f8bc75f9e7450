"""What a run leaves in its folder: whole files, and the same ones as another run."""
import csv
import json
from pathlib import Path

from mixer.models.weights import load_checkpoint
from mixer.runtime.files import read_csv

TIMING = {"images_per_s", "data_wait", "memory_mib"}


def read_json(path: Path):
    return json.loads(path.read_text())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, their values as text."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def is_finite(path: Path) -> bool:
    """Whether all weights of a checkpoint are."""
    weights = load_checkpoint(path)["state_dict"].values()
    return all(tensor.isfinite().all() for tensor in weights)


def assert_whole_files(folder: Path):
    """Every file under its final name is whole: checkpoints by their checksums, json and csv by
    their grammar."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix == ".pt":
            load_checkpoint(path)
        elif path.suffix == ".json":
            read_json(path)
        elif path.name == "log.csv":
            assert path.read_text().count("step") == 1
            steps = [row["step"] for row in read_csv(path)]
            assert steps == sorted(set(steps))
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def assert_same_run(a: Path, b: Path):
    """Two folders hold one run, bit for bit: weights, optimizer, log and best checkpoint, except
    for what was timed."""
    one, other = (load_checkpoint(folder / "last.pt") for folder in (a, b))
    assert_same_weights(one, other)
    states = one["optimizer"]["state"].values(), other["optimizer"]["state"].values()
    for s, t in zip(*states, strict=True):
        assert all(s[k].equal(t[k]) for k in s)
    assert one["scaler"] == other["scaler"]
    assert one["state"]["confusion"] == other["state"]["confusion"]
    assert without_timing(one["state"]["log"]) == without_timing(other["state"]["log"])

    logs = [read_csv(folder / "log.csv") for folder in (a, b)]
    assert without_timing(logs[0]) == without_timing(logs[1])
    assert len(logs[0]) == len(one["state"]["log"])

    if (a / "best.pt").exists():
        one, other = (load_checkpoint(folder / "best.pt") for folder in (a, b))
        assert_same_weights(one, other)
        assert without_timing([one["entry"]]) == without_timing([other["entry"]])
    assert (a / "summary.json").exists() == (b / "summary.json").exists()


def assert_same_weights(one: dict, other: dict):
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(one["state_dict"][k].equal(other["state_dict"][k]) for k in one["state_dict"])


def without_timing(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
