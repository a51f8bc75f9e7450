"""BatchNorm over several ranks against one process that has the whole batch.

The ranks are processes that communicate by gloo on the CPU.
"""
import copy
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernels import DepthwiseGELUBN, fuse, sync_batch_norm, unfuse
from kernels import module as kernels_module
from kernels.module import cannot_fuse
from kernels.sync import SyncBatchNorm, _batch_norm
from mixer.models.convmixer import Residual, depthwise_unit
from tests.helpers.networks import randomise, relative_error
from tests.helpers.ranks import group_of_one, results_of_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(),
                                reason="this PyTorch has no gloo")
BATCHES = {2: (5, 2), 3: (4, 0, 3)}  # images of each rank, of a batch of seven
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SYNCHRONISED = {
    "sync": [sync_batch_norm],
    "fuse, sync": [fuse, sync_batch_norm],
    "sync, fuse": [sync_batch_norm, fuse],
    "fuse, sync, unfuse": [fuse, sync_batch_norm, unfuse],
}
STEPS = {**SYNCHRONISED, "neither": [], "fuse": [fuse]}


# What each rank does

def everything(rank, world):
    """All results that the tests below check, because a process takes seconds to start."""
    batches, results = BATCHES[world], {}
    with warnings.catch_warnings(record=True) as caught:
        for how in STEPS:
            for dtype in (torch.float32, torch.float64):
                results[how, dtype] = two_steps(how, dtype, batches, rank)
        results["trained"] = trained(DistributedDataParallel, batches, rank)
    results["warnings"] = [str(warning.message) for warning in caught]
    for dtype in DTYPES:
        x, dy = (t.split(batches)[rank] for t in images(dtype)[:2])
        results["alone", dtype] = alone(SyncBatchNorm, x, dy)
    if world == 2:  # it takes seconds
        results["compiled"] = compiled(rank)
    results["errors"] = too_few(rank)
    results["PyTorch's"] = of_pytorch()
    if rank == 0:  # alone: in eval mode no rank waits for another
        results["eval"] = evaluated()
    return results


def network(how, dtype):
    """Two blocks that can be fused and three other BatchNorms; then the steps of `how`.

    Each BatchNorm follows a GELU, so that every parameter has a gradient.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 6, 2, 2), nn.GELU(), nn.BatchNorm2d(6, eps=0.01),
        Residual(depthwise_unit(6, 5)), depthwise_unit(6, 3),
        nn.Conv2d(6, 6, 1), nn.GELU(), nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 6, 1), nn.GELU(), nn.BatchNorm2d(6, track_running_stats=False))
    model[3].fn[2].momentum = None
    randomise(model, seed=1)
    for step in STEPS[how]:
        step(model)
    return model.to(dtype)


def images(dtype):
    """Two batches of seven, not centred, and two as a gradient; the same in every dtype."""
    return [(0.5 + torch.randn(7, 6, 8, 8, generator=torch.Generator().manual_seed(seed))).to(dtype)
            for seed in range(4)]


def two_steps(how, dtype, batches=(7,), rank=0):
    """{name: y, dx, gradients and buffers} of this rank's images of two batches."""
    model = network(how, dtype)
    results = {}
    for step in range(2):
        x, dy = (images(dtype)[i].split(batches)[rank].clone() for i in (step, 2 + step))
        y = model(x.requires_grad_())
        (y * dy[..., :y.shape[2], :y.shape[3]]).sum().backward()
        results |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    results |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return results | {f"running {name}": b for name, b in model.named_buffers()}


def alone(batch_norm, x, dy):
    """{name: y, dx, gradients and statistics} of one layer; its parameters are float32 or wider."""
    layer = batch_norm(6)
    randomise(layer, seed=1)
    layer.to(torch.promote_types(x.dtype, torch.float32))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dgamma": layer.weight.grad, "dbeta": layer.bias.grad,
            "mean": layer.running_mean, "var": layer.running_var}


def trained(wrap, batches=(7,), rank=0):
    """The state after three steps of SGD, with the loss averaged over the images of all ranks."""
    model = network("fuse, sync", torch.float64)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        y = wrapped(images(torch.float64)[step].split(batches)[rank])
        target = images(torch.float64)[3].split(batches)[rank][..., :4, :4]
        loss = (y - target).square().mean((1, 2, 3)).sum() * len(batches) / 7
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def compiled(rank):
    """y, dx and buffers, plain and compiled."""
    results = []
    for module in (DepthwiseGELUBN(6, 3, residual=True), nn.Sequential(nn.BatchNorm2d(6))):
        randomise(module, seed=2)
        sync_batch_norm(module)
        other = copy.deepcopy(module)
        for model in (module, torch.compile(other, backend="aot_eager")):
            x = images(torch.float32)[rank][:2 + rank].requires_grad_()
            y = model(x)
            (y * y.detach().cos()).sum().backward()
            results.append([y.detach(), x.grad, *dict(model.named_buffers()).values()])
    return results


def too_few(rank):
    """The errors if one rank has a single value per channel and the others none. Two are enough."""
    messages = []
    for module in (DepthwiseGELUBN(2, 3), nn.Sequential(nn.BatchNorm2d(2))):
        sync_batch_norm(module)
        try:
            module(torch.ones(1 if rank == 0 else 0, 2, 1, 1))
        except ValueError as e:
            messages.append(str(e))
        assert module(torch.ones(int(rank < 2), 2, 1, 1)).isfinite().all()
    return messages


def of_pytorch():
    """The error of a fused block whose BatchNorm is PyTorch's SyncBatchNorm."""
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(DepthwiseGELUBN(2, 3))(torch.ones(2, 2, 4, 4))
    except ValueError as e:
        return str(e)


def evaluated():
    """The output in eval mode, and how often the fused operator made it."""
    model = network("fuse, sync", torch.float32).eval()
    calls, fused_op = [], kernels_module.depthwise_gelu_bn

    def counted(*args, **options):
        calls.append(1)
        return fused_op(*args, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_module, "depthwise_gelu_bn", counted)
        return model(images(torch.float32)[0]), len(calls)


# What one process compares

@pytest.fixture(scope="module", params=[
    pytest.param(2, marks=pytest.mark.faults, id="two ranks"),
    pytest.param(3, marks=pytest.mark.faults, id="three ranks")])
def ranks(request, tmp_path_factory):
    """What `everything` returned on each rank."""
    return results_of_ranks(everything, request.param, tmp_path_factory.mktemp("ranks"))


def whole(results):
    """The results of all ranks as one process would have them.

    Activations side by side, gradients added up; statistics, equal to the last bit, once.
    """
    together = {}
    for name in results[0]:
        tensors = [result[name] for result in results]
        if name.startswith(("y", "dx")):
            together[name] = torch.cat(tensors)
        elif name.startswith("d"):
            together[name] = sum(tensors)
        else:
            assert all(torch.equal(t, tensors[0]) for t in tensors), f"{name} differs between ranks"
            together[name] = tensors[0]
    return together


def assert_close(got, want, tolerance=1e-12):
    """1e-12 is some thousand roundings of float64: sums in another order."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, msg=name,
                                   atol=tolerance * want[name].abs().max().item())


def assert_as_exact(got, plain, want, roundings):
    """Twice plain PyTorch's error and some roundings: its sums on the CPU are in double, ours are
    not."""
    assert got.keys() == plain.keys() == want.keys()
    for name in want:
        assert got[name].dtype == plain[name].dtype
        error, plain_error = (relative_error(t[name].double(), want[name].double())
                              for t in (got, plain))
        eps = torch.finfo(got[name].dtype).eps if got[name].is_floating_point() else 0.0
        assert error <= 2 * plain_error + roundings * eps, (name, error, plain_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_as_exact_as_one_process(ranks, dtype):
    got = whole([results["alone", dtype] for results in ranks])
    plain = alone(nn.BatchNorm2d, *images(dtype)[:2])
    want = alone(nn.BatchNorm2d, *(t.double() for t in images(dtype)[:2]))
    assert_as_exact(got, plain, want, roundings=2)
    if dtype == torch.float64:
        assert_close(got, want)


def test_parameter_gradients_are_of_a_ranks_own_batch(ranks):
    """y = xhat * gamma + beta."""
    layer = nn.BatchNorm2d(6)
    randomise(layer, seed=1)
    gamma, beta = (p.detach().double().view(-1, 1, 1) for p in layer.parameters())
    for rank, results in enumerate(ranks):
        got = results["alone", torch.float64]
        dy = images(torch.float64)[1].split(BATCHES[len(ranks)])[rank]
        want = {"dgamma": (dy * (got["y"] - beta) / gamma).sum((0, 2, 3)),
                "dbeta": dy.sum((0, 2, 3))}
        assert_close({name: got[name] for name in want}, want, 1e-11)


@pytest.mark.parametrize("how", SYNCHRONISED)
def test_a_network_equals_one_process(ranks, how):
    got = whole([results[how, torch.float64] for results in ranks])
    assert_close(got, two_steps(how, torch.float64), 1e-11)  # five BatchNorms deep


@pytest.mark.parametrize("how", SYNCHRONISED)
def test_a_network_in_float32_is_as_exact(ranks, how):
    got = whole([results[how, torch.float32] for results in ranks])
    plain, want = two_steps(how, torch.float32), two_steps(how, torch.float64)
    assert_as_exact(got, plain, want, roundings=8)


def test_the_network_sees_statistics_of_each_rank(ranks):
    results = [{name: t for name, t in results["neither", torch.float64].items()
                if not name.startswith("running")} for results in ranks]
    want = two_steps("neither", torch.float64)
    for name, t in whole(results).items():
        # a sum of dy alone does not depend on the statistics
        assert relative_error(t, want[name]) > 1e-3 or name == "d10.bias", name


def test_a_synchronised_block_warns_once(ranks):
    for results in ranks:
        assert results["warnings"] == ["DepthwiseGELUBN calls its parts one by one: its BatchNorm "
                                       "is synchronised over several ranks"]


def test_training_under_ddp_equals_one_process(ranks):
    want = trained(lambda model: model)
    for results in ranks:
        assert_close(results["trained"], want, 1e-11)


def test_compiled(ranks):
    for results in ranks if len(ranks) == 2 else []:
        pairs = zip(results["compiled"][::2], results["compiled"][1::2], strict=True)
        for plain, compiled in pairs:
            assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_fewer_than_two_values(ranks):
    message = ("BatchNorm in training needs at least two values per channel, over all ranks: "
               "it has 1")
    for results in ranks:
        assert results["errors"] == [message, message]


def test_pytorchs_own_needs_a_gpu_in_a_fused_block_too(ranks):
    for results in ranks:
        assert "expected input tensor to be on GPU" in results["PyTorch's"]


def test_eval_mode_is_fused_and_that_of_one_process(ranks):
    want, _ = evaluated()
    y, calls = ranks[0]["eval"]
    assert torch.equal(y, want) and calls == 2


# In one process

@pytest.fixture
def a_group_of_one(tmp_path):
    with group_of_one(tmp_path):
        yield


def test_conversion_keeps_everything_in_place():
    model = network("neither", torch.float64)
    model.append(model[2]).append(type("Norm", (nn.BatchNorm2d,), {})(6))
    model[2].eval()
    hook = model[2].register_forward_hook(lambda *_: None)
    tensors = {key: t.data_ptr() for key, t in model.state_dict(keep_vars=True).items()}
    modules = list(model.modules())
    fuse(model)
    assert sync_batch_norm(model) == 5 and sync_batch_norm(model) == 0
    assert unfuse(model) == 2
    assert list(model.modules()) == modules and hook.id in model[2]._forward_hooks
    assert {key: t.data_ptr() for key, t in model.state_dict(keep_vars=True).items()} == tensors
    assert model[2] is model[11] and type(model[2]) is SyncBatchNorm
    assert not model[2].training and model[3].training
    assert type(model[3].fn[2]) is SyncBatchNorm and type(model[12]).__name__ == "Norm"
    assert type(copy.deepcopy(model)[2]) is SyncBatchNorm
    assert sync_batch_norm(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("group", [False, True])
def test_one_process_is_plain_batch_norm(group, request):
    """To the last bit, and fused."""
    if group:
        request.getfixturevalue("a_group_of_one")
    for how, plain in (("sync", "neither"), ("fuse, sync", "fuse")):
        got, want = two_steps(how, torch.float32), two_steps(plain, torch.float32)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_another_process_group_is_not_fused(a_group_of_one):
    parts = list(depthwise_unit(6, 5))
    for group, reason in ((dist.new_group([0]), "SyncBatchNorm has its own process group"),
                          (dist.group.WORLD, None), (None, None)):
        parts[2] = nn.SyncBatchNorm(6, process_group=group)
        assert cannot_fuse(*parts) == reason


def test_pytorchs_own_takes_ours_for_its_own(a_group_of_one):
    """As on a GPU, and as far as it goes without one."""
    with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        nn.SyncBatchNorm.forward(SyncBatchNorm(2), torch.ones(2, 2, 4, 4))


def test_gradcheck(a_group_of_one):
    """Over a group of one: more ranks would move their inputs at the same time."""
    x, gamma, beta = torch.randn(3, 2, 4, 5), torch.tensor([1.5, -0.5]), torch.tensor([0.3, 2.0])
    inputs = [t.double().requires_grad_() for t in (x, gamma, beta)]
    assert torch.autograd.gradcheck(lambda *args: _batch_norm(*args, 1e-5)[0], inputs)
    assert torch.autograd.gradcheck(lambda x: _batch_norm(x, None, None, 1e-5)[0], inputs[:1])
