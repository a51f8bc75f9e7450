"""A checkpoint of a run says which run and which model it is of."""
from dataclasses import replace

import pytest
import torch

import mixer
from mixer.data.augment import to_float
from mixer.data.images import decode
from mixer.models import create_model
from mixer.models.weights import load_checkpoint
from mixer.runtime.distributed import World
from mixer.runtime.errors import InputError
from mixer.training import checkpoint
from mixer.training.checkpoint import checkpoint_to_resume, init_from_checkpoint, run_identity
from mixer.training.config import Config
from tests.helpers.networks import IMAGE_SIZE, TINY
from tests.helpers.pictures import encoded
from tests.helpers.training import SMALL, trainer

OPTIONS = {"convmixer": {**TINY, "kernel_size": 3, "act": "relu"},
           "vit_linear": {**TINY, "heads": 4, "qkv_bias": True, "norm_eps": 1e-6},
           "resnet18": {}}


def run(out, name):
    """A run of two steps, which leaves best.pt and last.pt in `out`. Returns its model."""
    model = create_model(name, image_size=IMAGE_SIZE, **OPTIONS[name])
    config = replace(SMALL, arch=name, steps=2, log_every=2, **OPTIONS[name])
    trainer(out, config, model=model).fit()
    return model.eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_load_model_gives_the_model_of_a_run(tmp_path, name):
    trained = run(tmp_path, name)
    x = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    for file in ("last.pt", "best.pt"):
        model = mixer.load_model(tmp_path / file)
        assert torch.equal(model(x), trained(x)) and not model.training
        assert model.classes == ["cat", "dog"] and model.image_size == IMAGE_SIZE
        assert type(model) is type(trained)
        assert model.state_dict().keys() == trained.state_dict().keys()


def test_the_description_is_of_plain_values(tmp_path):
    run(tmp_path, "vit_linear")
    contents = torch.load(tmp_path / "best.pt", weights_only=True)  # plain torch, nothing allowed
    assert contents["description"] == {
        "name": "vit_linear", "options": {**OPTIONS["vit_linear"], "image_size": IMAGE_SIZE},
        "classes": ["cat", "dog"], "preprocessing": "upright RGB, squeezed to 32x32, x / 255"}


def test_the_preprocessing_is_that_of_the_training(tmp_path):
    run(tmp_path, "convmixer")
    model = mixer.load_model(str(tmp_path / "best.pt"))
    data = encoded("RGBA", (40, 30), "PNG", (10, 200, 30, 128))
    (tmp_path / "x.png").write_bytes(data)
    want = to_float(torch.tensor(decode(data, IMAGE_SIZE))[None])
    for image in (data, tmp_path / "x.png", str(tmp_path / "x.png")):
        assert torch.equal(model.preprocess(image), want)
    assert model(want).shape == (1, 2)
    with pytest.raises(ValueError, match="not a JPEG"):
        model.preprocess(b"")


def test_a_checkpoint_without_a_description_says_how_to_load_it(tmp_path):
    trained = run(tmp_path, "convmixer")
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth does not describe its model: build one"):
        mixer.load_model(tmp_path / "weights.pth")


def test_a_new_run_starts_from_a_checkpoint(tmp_path):
    trained = run(tmp_path, "convmixer")
    for classes, head in ((["cat", "dog"], "newly initialised: none"),
                          (["a", "b", "c"], "newly initialised: head.weight, head.bias")):
        model = create_model("convmixer", num_classes=len(classes), **OPTIONS["convmixer"])
        report = init_from_checkpoint(tmp_path / "best.pt", model, classes)
        assert "best.pt" in report and head in report
        assert f"loaded {21 if len(classes) == 3 else 23} of 23 tensors (stem.0.weight, " in report
        assert torch.equal(model.stem[0].weight, trained.stem[0].weight)
        assert torch.equal(model.stem[2].running_mean, trained.stem[2].running_mean)
        assert (len(classes) == 2) == (model.head.weight.shape == trained.head.weight.shape
                                       and torch.equal(model.head.weight, trained.head.weight))


# files

def test_a_flipped_bit_that_torch_does_not_see(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save_checkpoint(path, {"text": "some words"})
    data = path.read_bytes()
    assert data.count(b"some words") == 1
    path.write_bytes(data.replace(b"some words", b"same words"))
    assert torch.load(path) == {"text": "same words"}
    with pytest.raises(ValueError, match="x.pt is not a readable checkpoint: .*data.pkl in it is"):
        load_checkpoint(path)


# runs

def identity(**changes):
    return {"init_from": None, "lr": SMALL.lr} | changes


def test_the_checkpoint_to_resume(tmp_path):
    """tests/faults/test_training.py has those that are refused."""
    trainer(tmp_path).fit()
    same = checkpoint_to_resume("auto", tmp_path, identity(), World())
    assert same.keys() == load_checkpoint(tmp_path / "last.pt").keys()
    with pytest.raises(InputError, match="is of another run: contents was None and is 'x'"):
        checkpoint_to_resume("auto", tmp_path, identity(contents="x"), World())
    del same["identity"]["label_smoothing"]  # as if it were a newer option
    checkpoint.save_checkpoint(tmp_path / "last.pt", same)
    assert checkpoint_to_resume("auto", tmp_path, identity(label_smoothing=0.0), World())
    assert checkpoint_to_resume(None, tmp_path, identity(), World()) is None
    assert checkpoint_to_resume("auto", tmp_path / "new", identity(), World()) is None
    (tmp_path / "last.pt").rename(tmp_path / "summary.json")
    with pytest.raises(InputError, match="holds a finished run without its last.pt"):
        checkpoint_to_resume("auto", tmp_path, identity(), World())


def test_the_best_starts_anew_without_its_file(tmp_path, capsys):
    """As with --resume FILE into another folder: else best_step would have no best.pt."""
    best = trainer(tmp_path).fit().best
    last = str(tmp_path / "last.pt")
    same = checkpoint_to_resume(last, tmp_path, identity(), World())
    assert same["state"]["best"] == best and "anew" not in capsys.readouterr().out
    other = checkpoint_to_resume(last, tmp_path / "new", identity(), World())
    assert other["state"]["best"] is None
    assert "the best validation accuracy starts anew" in capsys.readouterr().out


def test_every_option_is_free_on_resume_or_part_of_the_run():
    base = run_identity(Config(init_from="folder/start.pt"), "names", "bytes")
    assert base["batch_size"] == 250 and "steps" not in base and "out" not in base
    assert base["init_from"] == "start.pt", "no folder of this machine"
    assert "steps" in run_identity(Config(schedule="cosine"), "names", "bytes")
