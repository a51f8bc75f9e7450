"""Do our training curves reproduce the published ones? Judged point by point."""
import math
import statistics

from ..experiments import EPOCH_IMAGES, ORIGINAL_CLASSES, ORIGINAL_OPTIONS, published_curves
from .runs import RUN_OPTIONS, Run

POINT_IMAGES = 25_000  # a published point is a mean over 100 steps of 250 images
# options that change nothing that was published; the row fixes patch and depth
FREE = RUN_OPTIONS | {"arch", "patch", "depth", "val_fraction", "amp", "steps", "epochs", "sync_bn",
                      "compile", "kernels"}


def is_original(run: Run) -> bool:
    """Whether a run had the original's recipe and images, and logs what was published.

    An option that is neither in FREE nor as in ORIGINAL_OPTIONS must be off.
    """
    return (run.summary["classes"] == ORIGINAL_CLASSES
            and run.summary["data"].startswith(f"{EPOCH_IMAGES:,} images")
            and all(name in FREE or not value or value == ORIGINAL_OPTIONS.get(name)
                    for name, value in run.config.items()))


def compare_curves(runs: dict[str, list[Run]]) -> list[dict]:
    """The published points that our runs reached, of the rows with runs of the original's recipe.

    Each has our means over the 100 steps before `step`, and their range: a point is inside if it
    lies in the range of our seeds, widened on both sides by 1.96 standard errors of 25,000 images.
    For an accuracy p the error is sqrt(p (1 - p) / 25,000). For a loss it is that error times
    log(p / (1 - p)): how much the loss of a calibrated classifier changes per right answer.
    """
    points = []
    for name, published in published_curves().items():
        logs = [{entry["step"]: entry for entry in run.log}
                for run in runs.get(name, []) if is_original(run)]
        for step, published_loss, published_acc in published:
            entries = [log[step] for log in logs if step in log]
            if not entries:
                continue
            # the standard errors, times 1.96
            error = 1.96 * math.sqrt(published_acc * (1 - published_acc) / POINT_IMAGES)
            loss_error = error * abs(math.log(published_acc / (1 - published_acc)))
            points.append({"row": name, "step": step, "seeds": len(entries),
                           **_compare("acc", entries, published_acc, error),
                           **_compare("loss", entries, published_loss, loss_error)})
    return points


def _compare(metric, entries, published, error):
    """One metric of a point: our mean and widened range, what was published, whether inside."""
    ours = [entry[f"train_{metric}"] for entry in entries]
    low, high = min(ours) - error, max(ours) + error
    return {metric: statistics.fmean(ours), f"{metric}_low": low, f"{metric}_high": high,
            f"published_{metric}": published, f"{metric}_inside": low <= published <= high}
