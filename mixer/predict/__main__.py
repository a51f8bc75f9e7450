"""What a trained model answers for images, and how good that is.

python -m mixer.predict RUN IMAGES...
python -m mixer.predict RUN test1.zip --submission submission.csv
python -m mixer.predict RUN --evaluate --split val
python -m mixer.predict RUN --evaluate OTHER_IMAGES

RUN is the folder of a run of train.py, of which best.pt is taken, or a checkpoint. IMAGES are
files, folders and zips, read in place. OTHER_IMAGES are labelled as for train.py.
"""
import contextlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from ..data.batches import Subset
from ..data.demo import Demo
from ..data.images import ImageSet, find_images
from ..data.packed import cache_folder, pack, usable
from ..data.unlabelled import find_unlabelled
from ..experiments import ORIGINAL_CLASSES, row_name
from ..report.evaluation import evaluation, evaluation_text
from ..runtime.checkpoint import load_checkpoint
from ..runtime.cli import option, parse, run
from ..runtime.device import describe_amp, explain_out_of_memory, pick_amp, pick_device
from ..runtime.distributed import rank_and_size
from ..runtime.errors import InputError, UsageError, listed, printable
from ..runtime.files import writable_folder, write_csv, write_json
from ..training.checkpoint import build_model
from ..training.recipe import predict
from .pictures import write_pictures

SMALLEST = 1e-15   # probability of a submission: Kaggle's log loss clips there, too
MOST_PRINTED = 20  # answers


@dataclass(frozen=True)
class Config:
    """Every option of the command."""

    paths: tuple = option((), "a run's folder or a checkpoint; then images, folders, zips")
    evaluate: bool = option(False, "the images are labelled: accuracy, loss, confusion, recall")
    split: str | None = option(None, "with --evaluate: the run's own images of this split",
                               choices=("val", "train"))
    submission: str | None = option(None, "file for Kaggle's Dogs vs. Cats: id, label")
    out: str | None = option(None, "folder of the results; default: a new one beside the "
                             "checkpoint")
    batch_size: int | None = option(None, "images at a time; default: the run's", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: cuda if there is one")
    cache: str | None = option(None, "folder for decoded images; default: ~/.cache/vit-convmixer")
    debug: bool = option(False, "print a traceback when something fails")


def main(argv: list[str]) -> None:
    config = read_config(argv)

    # the model, as its run built it
    path = checkpoint_at(Path(config.paths[0]))
    try:
        contents = load_checkpoint(path, verify=True)
        model = build_model(path, contents)
    except ValueError as e:
        raise InputError(str(e)) from None
    description, trained = contents["description"], json_of_run(path.parent / "config.json")
    device = pick_device(config.device)
    model.to(device)
    if trained.get("kernels") != "torch":
        with contextlib.suppress(ValueError):  # it has nothing to fuse
            kernels().fuse(model)
    title = row_name(description["name"], **description["options"])
    batch_size = config.batch_size or description["recipe"]["batch_size"]
    choice = description["recipe"]["amp"]
    choice = "auto" if choice == "fp16" and device.type != "cuda" else choice
    amp = pick_amp(choice, device)
    print(f"{title} of {printable(path)}, {model.image_size}x{model.image_size} pixels, "
          f"{len(model.classes)} classes: {listed(model.classes)}\n"
          f"device: {device}\ndtype: {describe_amp(choice, device)}", flush=True)

    # the images
    cache_folder(config.cache)
    images, chosen = find(config, path.parent, trained, contents)
    labels = torch.tensor(labels_for(images, model.classes) if config.evaluate else images.labels)
    ids = kaggle_ids(images.files, model.classes) if config.submission else None
    beside = path.parent / time.strftime("predictions-%Y%m%d-%H%M%S")
    out = writable_folder(config.out or beside, "--out")
    array, faults = pack(images, model.image_size, config.cache)
    print("; ".join([f"{len(chosen):,} images", *images.notes]), flush=True)
    faults = {index: faults[index] for index in chosen.tolist() if index in faults}
    good = np.intersect1d(chosen, usable(images, faults, "skip", out / "bad_images.csv"))
    if len(good) == 0:
        raise RuntimeError(f"no image decodes: see {out / 'bad_images.csv'}")
    subset = Subset(torch.from_numpy(array), labels, good)

    # the answers
    limits = SimpleNamespace(batch_size=batch_size, image_size=model.image_size)
    with explain_out_of_memory(limits, device):
        logits = predict(model, subset, batch_size, device, amp)
    probabilities = logits.double().softmax(1)
    files, truths = [images.files[i] for i in good], labels[good] if config.evaluate else None
    write_answers(out / "predictions.csv", files, probabilities, model.classes, truths)
    if ids:
        write_submission(config.submission, [ids[file] for file in files], probabilities[:, 1])
    if config.evaluate:
        write_evaluation(out / "evaluation.json", logits, truths, batch_size, model.classes)
    pictures = write_pictures(out, model, title, subset, files, device,
                              probabilities if config.evaluate else None, model.classes)
    print(f"predictions.csv{', evaluation.json' if config.evaluate else ''}, "
          f"{', '.join(pictures)} are in {printable(out)}")
    if faults:
        raise RuntimeError(f"{len(faults):,} images do not decode and have no row: see "
                           f"{out / 'bad_images.csv'}")


def read_config(argv: list[str]) -> Config:
    """argv -> Config, checked. Raises UsageError with all problems."""
    config, problems = Config(**parse(Config, argv, __doc__, words="paths")), []
    images = len(config.paths) - 1
    if images < 0:
        problems.append("name a run's folder or a checkpoint, and then images")
    elif config.split:
        if not config.evaluate:
            problems.append("--split needs --evaluate")
        if images > 1:
            problems.append("--split takes the run's images, or one other place of them")
    elif config.evaluate and images != 1:
        problems.append("--evaluate needs one folder or zip of labelled images, or --split val")
    elif images == 0:
        problems.append("name images, folders or zips behind the model")
    if config.evaluate and config.submission:
        problems.append("--submission is for images without labels: leave out --evaluate")
    if rank_and_size()[1] > 1:
        problems.append("mixer.predict is a single process: start it without torchrun")
    if problems:
        raise UsageError(problems)
    return config


def kernels():
    """The package of the kernels, under its name here. Imported under both names, its operator
    would be registered twice."""
    try:
        from .. import kernels  # where it is installed
    except ImportError:
        import kernels  # in the checkout
    return kernels


def checkpoint_at(path: Path) -> Path:
    """The checkpoint of a run's folder: best.pt, or last.pt if it did not validate."""
    if not path.is_dir():
        return path
    found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
    if not found:
        runs = sorted(child.parent.name for child in path.glob("*/last.pt"))
        hint = f"; choose one of its runs: {listed(runs)}" if runs else ""
        raise InputError(f"{path} holds neither best.pt nor last.pt{hint}")
    return found[0]


def json_of_run(path: Path) -> dict:
    """The dict in a json file of a run, {} if there is none. Raises InputError if it is damaged."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{path} is damaged: {e}") from None


def find(config: Config, folder: Path, trained: dict,
         contents: dict) -> tuple[ImageSet, np.ndarray]:
    """The images, and the indices of those to predict. Raises InputError, naming the path."""
    try:
        if not config.evaluate:
            images = find_unlabelled(config.paths[1:])
        elif len(config.paths) > 1:
            images = find_images(config.paths[1])
        else:
            images = find_images(trained["data"]) if trained.get("data") else Demo()
    except InputError as e:
        raise InputError(str(e).removeprefix("--data: ")) from None
    if not config.split:
        return images, np.arange(len(images))

    # exactly those of the run
    names = json_of_run(folder / "split.json").get(config.split, [])
    if not names:
        raise InputError(f"--split {config.split}: split.json in {folder} names no such images")
    if images.identity != contents.get("identity", {}).get("images"):
        raise InputError(f"--split {config.split}: {images.path} does not hold the images of the "
                         "run; name their place behind it")
    names = set(names)
    return images, np.flatnonzero([name in names for name in images.names])


def labels_for(images: ImageSet, classes: list[str]) -> list[int]:
    """The labels of images in the order of the model's classes; case does not matter, as in Cat.

    Raises InputError for a class that the model does not know.
    """
    known = {name.casefold(): label for label, name in enumerate(classes)}
    known |= {name: label for label, name in enumerate(classes)}
    found = [known.get(name, known.get(name.casefold())) for name in images.classes]
    if None in found:
        unknown = [name for name, label in zip(images.classes, found, strict=True) if label is None]
        raise InputError(f"{images.path} has classes that the model does not know: "
                         f"{listed(unknown)}; it knows {listed(classes)}")
    return [found[label] for label in images.labels]


def kaggle_ids(files: list[str], classes: list[str]) -> dict[str, int]:
    """{file: its id} by the names 1.jpg, 2.jpg, ... Raises InputError if --submission cannot be."""
    if [name.casefold() for name in classes] != ORIGINAL_CLASSES:
        raise InputError(f"--submission is for cats and dogs; the model knows {listed(classes)}")
    matches = {file: re.fullmatch(r"(\d{1,9})\.\w+", os.path.basename(file)) for file in files}
    if other := [file for file, match in matches.items() if not match]:
        raise InputError(f"--submission: the id is the file's name, as in 1.jpg: {listed(other)}")
    ids = {file: int(match[1]) for file, match in matches.items()}
    if len(set(ids.values())) < len(ids):
        raise InputError("--submission: two files have one id")
    return ids


def write_answers(path: Path, files: list[str], probabilities: torch.Tensor, classes: list[str],
                  truths: torch.Tensor | None) -> None:
    """predictions.csv: file, truth if it is known, class, probability of each class."""
    rows = []
    for i, (file, of_classes) in enumerate(zip(files, probabilities.tolist(), strict=True)):
        label = max(range(len(classes)), key=of_classes.__getitem__)
        truth = {} if truths is None else {"truth": classes[truths[i]]}
        rows.append({"file": file, **truth, "class": classes[label],
                     **{f"p_{name}": f"{p:.6g}" for name, p in zip(classes, of_classes,
                                                                   strict=True)}})
        if len(files) <= MOST_PRINTED and truths is None:
            print(f"{printable(file)}: {printable(classes[label])} {of_classes[label]:.3f}")
    write_csv(path, rows)


def write_submission(path: str, ids: list[int], dog: torch.Tensor) -> None:
    """Kaggle's file: a line for each id, in order, with the probability of a dog."""
    writable_folder(Path(path).parent, "--submission")
    rows = sorted(zip(ids, dog.clamp(SMALLEST, 1 - SMALLEST).tolist(), strict=True))
    write_csv(path, [{"id": number, "label": p} for number, p in rows])
    print(f"{len(rows):,} answers are in {printable(path)}")


def write_evaluation(path: Path, logits: torch.Tensor, truths: torch.Tensor, batch_size: int,
                     classes: list[str]) -> None:
    """evaluation.json, and its text to stdout."""
    loss = torch.zeros((), dtype=torch.float64)  # summed as in training, to the same bits
    for some, y in zip(logits.split(batch_size), truths.split(batch_size), strict=True):
        loss += F.cross_entropy(some, y, reduction="sum")
    counts = torch.bincount(truths * len(classes) + logits.argmax(1), minlength=len(classes) ** 2)
    result = evaluation(counts.view(len(classes), -1).tolist(), loss.item() / len(truths), classes)
    write_json(path, result)
    print(evaluation_text(result))


if __name__ == "__main__":
    run(main, sys.argv[1:])
