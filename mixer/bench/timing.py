"""Time several candidates in turn, so that a noisy machine is noisy for all of them."""
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch


def race(candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device,
         count: int = 1) -> dict[str, dict[str, float]]:
    """{name: its row}: the median ms of a call, p20, p80; faster: how many times faster than the
    first candidate, the median of the ratios in each round.
    """
    samples = take_in_turn(candidates, rounds, device, count)
    first = next(iter(samples.values()))
    return {name: {**percentiles(times), "faster": median_ratio(first, times)}
            for name, times in samples.items()}


def take_in_turn(candidates: dict, rounds: int, device: torch.device,
                 count: int = 1) -> dict[object, list[float]]:
    """{key: callable} -> {key: milliseconds of a call, for each round}.

    Calls each candidate once to warm up, then all in turn, `count` times each, `rounds` times. On
    CUDA the launches of one call hide behind the call before it, as they do in training.
    """
    # warm up
    synchronize = partial(getattr(torch, device.type).synchronize, device)
    for candidate in candidates.values():
        candidate()
    # take turns
    samples = {key: [] for key in candidates}
    for _ in range(rounds):
        for key, candidate in candidates.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                candidate()
            synchronize()
            samples[key].append(1000 * (time.perf_counter() - start) / count)
    return samples


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, all in ms."""
    ordered = sorted(milliseconds)
    return {"ms": statistics.median(ordered), "p20": ordered[int(0.2 * len(ordered))],
            "p80": ordered[int(0.8 * len(ordered))]}


def median_ratio(first: Sequence[float], times: Sequence[float]) -> float:
    """How many times faster `times` are than `first`: the median of the ratios in each round."""
    return statistics.median(a / b for a, b in zip(first, times, strict=True))
