"""How far a mean over seeds can be trusted, and what it decides."""
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Student's t for 1, 2, ... degrees of freedom, two-sided 95 %
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
       2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self):
        return f"{self.mean:.3f} ± {self.half:.3f}"

    def below(self, other: "Interval") -> bool:
        """Whether all of this interval lies below the other one."""
        return self.mean + self.half < other.mean - other.half


def accuracy_intervals(accuracies: dict[str, Sequence[float]], val_images: int,
                       shared: bool = False) -> dict[str, Interval]:
    """{row: accuracies of its seeds, over `val_images` images each} -> {row: Interval}, in order.

    The half width is the larger of two: t * sqrt(v / n), with the variance v between seeds pooled
    over all rows, and Student's t for its degrees of freedom; and Wilson's for the images of all n
    seeds, which is all there is where no row has two. Seeds that share their images differ by less
    than these: the half width is then the root of the sum of both squares, with Wilson's for the
    images of one seed. Rows without an accuracy are left out.
    """
    accuracies = {name: values for name, values in accuracies.items() if values}
    freedom = sum(len(values) - 1 for values in accuracies.values())
    squares = sum((len(values) - 1) * statistics.variance(values)
                  for values in accuracies.values() if len(values) > 1)
    between_seeds = student_t(freedom) * math.sqrt(squares / freedom) if freedom else 0.0
    intervals = {}
    for name, values in accuracies.items():
        p, n = statistics.fmean(values), len(values)
        images = val_images if shared else val_images * n
        low, high = wilson(p * images, images)
        halves = between_seeds / math.sqrt(n), max(p - low, high - p)
        intervals[name] = Interval(p, math.hypot(*halves) if shared else max(halves))
    return intervals


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy over n images (Wilson 1927), which stays within 0 and 1."""
    p, z2 = correct / n, 1.96 ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return centre - half, centre + half


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, freedom >= 1."""
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom


def best_of(intervals: dict[str, Interval]) -> set[str]:
    """The row with the highest mean, and those whose interval overlaps its interval."""
    best = max(intervals.values(), default=None)
    return {name for name, interval in intervals.items() if not interval.below(best)}


def frontier(costs: dict[str, float], intervals: dict[str, Interval]) -> dict[str, str]:
    """Is a row worth its cost? {row: "yes", "tie" or "no"} against the rows that cost no more.

    yes: its interval lies above those of all of them. no: the interval of one of them lies above
    its own. tie: neither.
    """
    verdicts = {}
    for name, ours in intervals.items():
        rivals = [interval for other, interval in intervals.items()
                  if other != name and costs[other] <= costs[name]]
        if any(ours.below(rival) for rival in rivals):
            verdicts[name] = "no"
        else:
            verdicts[name] = "yes" if all(rival.below(ours) for rival in rivals) else "tie"
    return verdicts
