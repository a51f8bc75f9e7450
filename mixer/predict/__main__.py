"""Predictions of a trained model for images, and their evaluation.

python -m mixer.predict RUN IMAGES...
python -m mixer.predict RUN test1.zip --submission submission.csv
python -m mixer.predict RUN --evaluate --split val
python -m mixer.predict RUN --evaluate OTHER_IMAGES

RUN is the folder of a run of train.py, of which best.pt is taken, or a checkpoint. IMAGES are
files, folders and zips, read in place. OTHER_IMAGES are labelled as for train.py.
"""
import datetime
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..data.batches import Subset
from ..data.cache import decode_to_cache
from ..data.demo import drawn_images
from ..data.images import ImageSet, find_images, find_unlabelled
from ..data.split import drop_damaged
from ..experiments import row_name
from ..report.evaluation import evaluation, evaluation_text
from ..report.pictures import write_pictures
from ..runtime.cli import option, parse, run
from ..runtime.device import dtype_name, pick_amp, pick_device
from ..runtime.errors import InputError, listed, printable
from ..runtime.files import writable_folder, write_csv, write_json
from ..training.checkpoint import load_model
from ..training.evaluate import predict

SMALLEST = 1e-15  # probability of a submission: Kaggle's log loss clips there, too


@dataclass(frozen=True)
class Config:
    """Every option of the command."""

    paths: tuple = option((), "a run's folder or a checkpoint; then images, folders, zips")
    evaluate: bool = option(False, "the images are labelled: accuracy, loss, confusion, recall")
    split: str | None = option(None, "the run's own images of this split",
                               choices=("val", "train"))
    submission: str | None = option(None, "file for Kaggle's Dogs vs. Cats: id, label")
    out: str | None = option(None, "folder of the results, new or empty; default: a new one beside "
                             "the checkpoint")
    batch_size: int | None = option(None, "images at a time; default: the run's", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: cuda if there is one")
    cache: str | None = option(None, "folder for decoded images; default: ~/.cache/vit-convmixer")
    debug: bool = option(False, "print a traceback when something fails")


def main(argv: list[str]) -> None:
    config = read_config(argv)

    # the model, as its run built it, and the images
    path, why = Path(config.paths[0]), ""
    if path.is_dir():
        best = (path / "best.pt").exists()
        path /= "best.pt" if best else "last.pt"
        why = " (its best validation)" if best else " (it has no best.pt)"
    try:
        model = load_model(path)
        images, chosen = select_images(config, path.parent, model.identity)
    except ValueError as e:
        raise InputError(str(e).removeprefix("--data: ")) from None
    classes, identity = model.classes, model.identity
    labels = torch.tensor(labels_for(images, classes) if config.evaluate else images.labels)
    ids, dog = kaggle_ids(images.files, classes) if config.submission else (None, None)

    # the device and the output folder
    device, amp = pick_device(config.device), identity["amp"]
    amp = pick_amp("auto" if amp == "fp16" and device.type != "cuda" else amp, device)
    title = row_name(**identity)
    print(f"{title} of {printable(path)}{why}, {model.image_size}x{model.image_size} pixels, "
          f"{len(classes)} classes: {listed(classes)}\n"
          f"device: {device}, dtype: {dtype_name(amp)}", flush=True)
    now = datetime.datetime.now()
    out = Path(config.out or path.parent / f"predictions-{now:%Y%m%d-%H%M%S-%f}")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out: {out} is not empty; choose a new folder")
    writable_folder(out, "--out")

    # the images that decode
    array, faults, _ = decode_to_cache(images, model.image_size, config.cache)
    origin = f" of {printable(images.path)}" if config.evaluate else ""
    print("; ".join(filter(None, [f"{len(chosen):,} images{origin}", images.note])), flush=True)
    faults = {index: faults[index] for index in chosen.tolist() if index in faults}
    good = np.intersect1d(chosen, drop_damaged(images, faults, "skip", out / "bad_images.csv"))
    if len(good) == 0:
        raise RuntimeError(f"no image decodes: see {out / 'bad_images.csv'}")
    subset = Subset(torch.from_numpy(array), labels, good)
    files, truths = [images.files[i] for i in good], labels[good] if config.evaluate else None

    # predict, and write the results
    batch_size = config.batch_size or identity["batch_size"]
    logits = predict(model.to(device), subset, batch_size, device, amp)
    probabilities = logits.double().softmax(1)
    write_predictions(out / "predictions.csv", files, probabilities, classes, truths)
    if config.submission:
        write_submission(config.submission, [ids[i] for i in good], probabilities[:, dog])
    if config.evaluate:
        write_evaluation(out / "evaluation.json", logits, truths, batch_size, classes)
    write_pictures(out, model, title, subset, files, device,
                   probabilities if config.evaluate else None, classes)
    print(f"the results are in {printable(out)}")
    if faults:
        raise RuntimeError(f"{len(faults):,} images do not decode and have no row: see "
                           f"{out / 'bad_images.csv'}")


def read_config(argv: list[str]) -> Config:
    """argv -> Config, checked. Raises InputError."""
    config = Config(**parse(Config, argv, __doc__, words="paths"))
    count = len(config.paths) - 1
    if count < (0 if config.split else 1) or (config.evaluate or config.split) and count > 1:
        raise InputError("name a run's folder or a checkpoint, and then images, folders or zips; "
                         "with --evaluate one folder or zip of labelled images, or --split val")
    return config


def select_images(config: Config, folder: Path, identity: dict) -> tuple[ImageSet, np.ndarray]:
    """The images, and the indices of those to predict. Raises InputError, naming the path."""
    paths = config.paths[1:]
    if config.split:  # exactly those of the run
        names = set(json.loads((folder / "split.json").read_text())[config.split])
        data = paths[0] if paths else json.loads((folder / "config.json").read_text())["data"]
        images = find_images(data) if data else drawn_images()
        if not names:
            raise InputError(f"--split: the run has no {config.split} images")
        if images.key != identity["images"]:
            raise InputError(f"--split: {images.path} does not hold the run's {config.split} "
                             "images; if they were moved, name their path after the run's")
        # its train and val folders may hold equal names
        return images, np.flatnonzero([
            name in names and split in ("", config.split)
            for name, split in zip(images.names, images.splits, strict=True)])
    # images given on the command line: of unknown labels, or a labelled set
    if not config.evaluate:
        images = find_unlabelled(paths)
    else:  # a data set with splits: only one of them
        test = Path(paths[0], "test")
        images = find_images(test if test.is_dir() else paths[0])
        if any(images.splits) or "test images" in images.note:
            raise InputError(f"{paths[0]} has splits: give the folder of one, e.g. test (unpacked)")
        if images.key == identity["images"]:
            raise InputError(f"{paths[0]} holds the run's own images: add --split val or train")
    return images, np.arange(len(images))


def labels_for(images: ImageSet, classes: list[str]) -> list[int]:
    """The labels of images in the order of the model's classes, ignoring case.

    Raises InputError for a class that the model does not know.
    """
    known = {name.casefold(): label for label, name in enumerate(classes)}
    if unknown := [name for name in images.classes if name.casefold() not in known]:
        raise InputError(f"{images.path} has classes that the model does not know: "
                         f"{listed(unknown)}; it knows {listed(classes)}")
    return [known[images.classes[label].casefold()] for label in images.labels]


def kaggle_ids(files: list[str], classes: list[str]) -> tuple[list[int], int]:
    """(ids of files named 1.jpg, 2.jpg, ...; the label of dogs). Raises InputError otherwise."""
    animals = [name.casefold().removesuffix("s") for name in classes]
    if sorted(animals) != ["cat", "dog"]:
        raise InputError(f"--submission is for cats and dogs; the model knows {listed(classes)}")
    ids = [re.fullmatch(r"(\d{1,9})\.\w+", Path(file).name) for file in files]
    if other := [file for file, found in zip(files, ids, strict=True) if not found]:
        raise InputError(f"--submission needs files named by id, e.g. 1.jpg, not {listed(other)}")
    numbers = [int(found[1]) for found in ids]
    if len(set(numbers)) < len(numbers):
        raise InputError("--submission needs one file for each id")
    return numbers, animals.index("dog")


def write_predictions(path: Path, files: list[str], probabilities: torch.Tensor,
                      classes: list[str], truths: torch.Tensor | None) -> None:
    """predictions.csv: file, truth if it is known, class, probability of each class."""
    rows = []
    for i, (file, values) in enumerate(zip(files, probabilities.tolist(), strict=True)):
        name = classes[values.index(max(values))]
        truth = {} if truths is None else {"truth": classes[truths[i]]}
        rows.append({"file": file, **truth, "class": name, **{
            f"p_{other}": f"{p:.6g}" for other, p in zip(classes, values, strict=True)}})
        if truths is None and len(files) <= 20:
            print(printable(f"{file}: {name} {max(values):.3f}"))
    write_csv(path, rows)


def write_submission(path: str, ids: list[int], dog: torch.Tensor) -> None:
    """Kaggle's file: a line for each id, in order, with the probability of a dog."""
    writable_folder(Path(path).parent, "--submission")
    rows = sorted(zip(ids, dog.clamp(SMALLEST, 1 - SMALLEST).tolist(), strict=True))
    write_csv(path, [{"id": number, "label": p} for number, p in rows])
    print(f"{len(rows):,} predictions are in {printable(path)}; label: the probability of a dog")


def write_evaluation(path: Path, logits: torch.Tensor, truths: torch.Tensor, batch_size: int,
                     classes: list[str]) -> None:
    """evaluation.json, and its text to stdout."""
    loss = sum(F.cross_entropy(some, y, reduction="sum").double()  # as in training, to the bit
               for some, y in zip(logits.split(batch_size), truths.split(batch_size), strict=True))
    counts = torch.bincount(truths * len(classes) + logits.argmax(1), minlength=len(classes) ** 2)
    result = evaluation(counts.view(len(classes), -1).tolist(), loss.item() / len(truths), classes)
    write_json(path, result)
    print(evaluation_text(result))


if __name__ == "__main__":
    run(main, sys.argv[1:])
