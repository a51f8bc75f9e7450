from dataclasses import replace

import pytest
import torch

from mixer.runtime.checkpoint import load_checkpoint, save_checkpoint
from mixer.runtime.distributed import World
from mixer.runtime.errors import InputError
from mixer.training.config import Config
from mixer.training.resume import (
    check_identity,
    find_checkpoint,
    open_checkpoint,
    resume_identity,
)
from tests.helpers.runs import without_timing
from tests.helpers.training import SMALL, trainer


class Stopped(Exception):
    pass


def stop_at(run, step):
    """Save after `step` steps, and stop."""
    take_step = run.take_step

    def stopping():
        if run.state.step == step:
            run.save()
            raise Stopped
        take_step()
    run.take_step = stopping
    with pytest.raises(Stopped):
        run.fit()


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_resume_equals_the_uninterrupted_run(tmp_path, amp):
    config = replace(SMALL, amp=amp)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    trainer(whole, config).fit()
    stop_at(trainer(cut, config), 4)  # between two rows
    again = trainer(cut, config)
    torch.nn.init.zeros_(again.model.head.weight)  # whatever it was before
    again.resume(find_checkpoint("auto", cut))
    assert again.state.step == 4
    again.fit()
    a, b = load_checkpoint(whole / "last.pt"), load_checkpoint(cut / "last.pt")
    assert all(torch.equal(tensor, b["state_dict"][name])
               for name, tensor in a["state_dict"].items())
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(),
                          strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert without_timing(a["state"]["rows"]) == without_timing(b["state"]["rows"])


def test_resuming_another_run_is_refused(tmp_path):
    trainer(tmp_path).fit()
    last = tmp_path / "last.pt"
    same = open_checkpoint("auto", tmp_path, {"lr": 0.001}, World())
    assert same.keys() == load_checkpoint(last).keys()
    with pytest.raises(InputError, match="is of another run: lr was 0.001 and is 0.1"):
        open_checkpoint("auto", tmp_path, {"lr": 0.1}, World())
    with pytest.raises(InputError, match="is of another run: contents was None and is 'x'"):
        check_identity(same, {"lr": 0.001, "contents": "x"})
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        find_checkpoint("auto", tmp_path)
    with pytest.raises(InputError, match="there is no checkpoint"):
        find_checkpoint(tmp_path / "none.pt", tmp_path)
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("auto", tmp_path / "new") is None


def test_what_a_run_was_started_from_is_part_of_the_run(tmp_path):
    """By its bytes. It is not read again, and may be gone."""
    start, other, gone = (tmp_path / name for name in ("start.pt", "other.pt", "gone.pt"))
    start.write_bytes(b"some weights")
    other.write_bytes(b"other weights")

    def identity(path):
        return resume_identity(Config(init_from=path and str(path)), "data")
    save_checkpoint(tmp_path / "last.pt", {"identity": identity(start), "optimizer": {}})
    for path in (start, start.rename(tmp_path / "renamed.pt"), gone, None):
        now = identity(path)
        assert open_checkpoint("auto", tmp_path, now, World())
        assert now["init_from"] == identity(tmp_path / "renamed.pt")["init_from"] is not None
    with pytest.raises(InputError, match="of another run: init_from was '.{16}' and is '.{16}'"):
        open_checkpoint("auto", tmp_path, identity(other), World())
    save_checkpoint(tmp_path / "last.pt", {"identity": identity(None), "optimizer": {}})
    with pytest.raises(InputError, match="of another run: init_from was None and is"):
        open_checkpoint("auto", tmp_path, identity(other), World())


def test_every_option_is_free_on_resume_or_part_of_the_run():
    base = resume_identity(Config(), "data")
    assert base["batch_size"] == 250 and "steps" not in base and "out" not in base
    assert "steps" in resume_identity(Config(schedule="cosine"), "data")
