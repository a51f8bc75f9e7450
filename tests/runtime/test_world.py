import numpy as np
import pytest
import torch

from mixer.runtime.distributed import World, process_group


@pytest.mark.parametrize("step", [0, 5, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_every_sample_once_and_in_the_same_order_for_any_number_of_ranks(size, step):
    samples = np.random.default_rng(step).permutation(37)[:10]
    slices = [World(rank, size).batch_slice(samples) for rank in range(size)]
    assert (np.concatenate(slices) == samples).all()
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_without_torchrun_there_is_one_rank_that_sends_nothing():
    with process_group(torch.device("cpu"), "run") as world:
        assert world == World(0, 1)
        assert world.broadcast("value") == "value"
        assert world.sum(torch.ones(2)).tolist() == [1, 1]
