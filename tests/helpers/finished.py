"""Folders of finished runs, as train.py leaves them, with made-up curves."""
from pathlib import Path

from mixer.experiments import BY_NAME, ORIGINAL_OPTIONS, published_curves, seed_folder
from mixer.runtime.files import write_csv, write_json

ENVIRONMENT = {"date": "2026-11-25", "device": "AMD EPYC, 2 threads", "cuda": None,
               "python": "3.11.7", "torch": "2.14.1"}


def finished_run(out: Path, name: str, seed: int = 0, *, shift: float = 0.0, steps: int = 500,
                 step_s: float = 0.1, step_flops: float = 1e12, val_acc: float | None = 0.75,
                 classes: tuple[str, ...] = ("cat", "dog"), images: int = 25_000,
                 **changes) -> Path:
    """Write the folder of a run whose training curve is the published one plus `shift`. Its
    validation accuracy rises to val_acc in equal parts; 2,500 images are held out. changes: of
    summary.json and config.json."""
    log = [{"step": step, "train_loss": loss - shift, "train_acc": acc + shift, "val_loss": 0.6,
            "val_acc": val_acc and val_acc * step / steps, "lr": 1e-4, "images_per_s": 250 / step_s,
            "data_wait": 0.03, "memory_mib": 900.0, "skipped": 0, "flops": step * step_flops}
           for step, loss, acc in published_curves()[name] if step <= steps]
    last, count = log[-1], len(classes)
    confusion = [[0] * count for _ in classes]
    confusion[0][0] = 2500
    summary = {"name": name, "parameters": 2_114_050, "batch_size": 250, "image_size": 192,
               "steps": steps, "dtype": "bfloat16", "seed": seed, "classes": list(classes),
               "data": f"{images:,} images in cats.zip", "train_acc": last["train_acc"],
               "val_acc": val_acc, "best_val_acc": val_acc,
               "confusion": None if val_acc is None else confusion,
               "images_per_s": 250 / step_s, "seconds_per_25000_images": 100 * step_s,
               "memory_mib": 900.0, "flops": last["flops"]}
    config = {**ORIGINAL_OPTIONS, "val_fraction": 0.1, "seed": seed, **BY_NAME[name].options}
    folder = out / seed_folder(name, seed)
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", summary | {k: changes[k] for k in changes if k in summary})
    write_json(folder / "config.json", config | {k: changes[k] for k in changes
                                                if k in config or k not in summary})
    write_json(folder / "environment.json", ENVIRONMENT)
    write_csv(folder / "log.csv", log)
    return folder
