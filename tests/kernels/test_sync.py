"""BatchNorm over several processes, real ones that talk by gloo on the CPU, against one process that has the whole batch."""
import copy
import datetime
import functools
import multiprocessing
import types
import warnings

import pytest
import torch
from tests.helpers.blocks import exact, make_block, run, too_far
from tests.helpers.commands import HANGS
from tests.conftest import randomise, relative_error
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from kernels import DepthwiseGELUBN, depthwise_cpu, depthwise_gelu_bn, fuse, reference, sync_batch_norm, unfuse
from kernels.module import cannot_fuse
from kernels.sync import SyncBatchNorm, batch_norm
from mixer.models.convmixer import Residual, depthwise_unit

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
SHARES = {2: (5, 2), 3: (4, 1, 2)}            # images of each rank, of a batch of seven
SHARES_WITH_NONE = {2: (5, 2), 3: (4, 0, 3)}
WAYS = ["reference", "cpu", "triton", "triton, two programs"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {"residual": {}, "bare": dict(bare=True, residual=False)}


def blocks_alone(model):
    """Without the BatchNorms that stand outside of what can be fused: PyTorch's own SyncBatchNorm has no way on the CPU."""
    del model[5:], model[:3]


SYNCHRONISED = {
    "sync": [sync_batch_norm],
    "fuse, sync": [fuse, sync_batch_norm],
    "sync, fuse": [sync_batch_norm, fuse],
    "fuse, sync, unfuse": [fuse, sync_batch_norm, unfuse],
    "fuse, PyTorch's": [blocks_alone, fuse, nn.SyncBatchNorm.convert_sync_batchnorm],
    "PyTorch's, fuse": [blocks_alone, nn.SyncBatchNorm.convert_sync_batchnorm, fuse],
}
STEPS = {**SYNCHRONISED, "neither": [], "fuse": [fuse]}


# What each rank does

def rank_of(world, rank, folder, function):
    warnings.filterwarnings("error", message="DepthwiseGELUBN calls its parts")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=HANGS))
    torch.save(function(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def everything(rank, world):
    """{what: results} of all that the tests below look at, in one go, since a process takes seconds to start."""
    results = {}
    for way in WAYS:
        for dtype in DTYPES[:1] if way.startswith("triton") else [*DTYPES, torch.float64]:
            for name, options in OPTIONS.items():
                for sync in (True, False):
                    part = own(make_block(7, 2, 6, 5, 3, dtype, **options), SHARES[world], rank)
                    results[way, dtype, name, sync] = run(implementation(way, sync), part)
    for how in STEPS:
        for dtype in (torch.float32, torch.float64):
            results[how, dtype] = two_steps(how, dtype, SHARES_WITH_NONE[world], rank)
    results["trained"] = trained(DistributedDataParallel, SHARES_WITH_NONE[world], rank)
    results["compiled"] = compiled(rank)
    results["errors"] = too_few(rank)
    model = network("fuse, sync", torch.float32).eval()
    if rank == 0:  # alone: in eval mode nobody waits for another
        results["eval"] = model(images(torch.float32)[0])
    return results


def own(block, shares, rank):
    return block._replace(x=block.x.split(shares)[rank], dy=block.dy.split(shares)[rank])


def implementation(way, sync):
    """Its forward and backward, with this `sync`, and what they say of the number of values checked."""
    if way.startswith("triton"):
        from kernels import depthwise_launch

        def plan(shape, kernel_size, dtype):
            cut, options, _ = depthwise_launch.plan(shape, kernel_size, dtype)
            return cut, options, min(2 if "two" in way else 1, shape[0])
        forward, backward = (functools.partial(f, sync=sync, plan=plan) for f in (depthwise_launch.forward, depthwise_launch.backward))
    else:
        module = {"reference": reference, "cpu": depthwise_cpu}[way]
        forward, backward = (functools.partial(f, sync=sync) for f in (module.forward, module.backward))

    def checked(*args):
        y, mean, var, *count = forward(*args)
        assert not sync or torch.equal(count[0], torch.full_like(mean, 7 * y.shape[2] * y.shape[3]))
        return y, mean, var
    return types.SimpleNamespace(forward=checked, backward=backward)


def network(how, dtype):
    """BatchNorms of all kinds, behind a GELU, so that every parameter has a gradient; two blocks that can be fused. Then `how`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 2, 2), nn.GELU(), nn.BatchNorm2d(6, eps=0.01),
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
    return [(0.5 + torch.randn(7, 6, 8, 8, generator=torch.Generator().manual_seed(seed))).to(dtype) for seed in range(4)]


def two_steps(how, dtype, shares=(7,), rank=0):
    """{name: y, dx, gradients and buffers} of two batches' own shares."""
    model = network(how, dtype)
    results = {}
    for step in range(2):
        x, dy = (images(dtype)[i].split(shares)[rank].clone() for i in (step, 2 + step))
        y = model(x.requires_grad_())
        (y * dy[..., :y.shape[2], :y.shape[3]]).sum().backward()
        results |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    results |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return results | {f"running {name}": b for name, b in model.named_buffers()}


def trained(wrap, shares=(7,), rank=0):
    """The state after three steps of SGD, with the loss averaged over the seven images of all ranks together."""
    model = network("fuse, sync", torch.float64)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        y = wrapped(images(torch.float64)[step].split(shares)[rank])
        target = images(torch.float64)[3].split(shares)[rank][..., :4, :4]
        optimizer.zero_grad()
        ((y - target).square().mean((1, 2, 3)).sum() * len(shares) / 7).backward()
        optimizer.step()
    return model.state_dict()


def compiled(rank):
    """y, dx and buffers, plain and compiled: the fused block whole, SyncBatchNorm with a break in the graph."""
    results = []
    for module, options in ((DepthwiseGELUBN(6, 3, residual=True), dict(fullgraph=True)), (nn.Sequential(nn.BatchNorm2d(6)), {})):
        randomise(module, seed=2)
        sync_batch_norm(module)
        other = copy.deepcopy(module)
        for way in (module, torch.compile(other, backend="aot_eager", **options)):
            x = images(torch.float32)[rank][:2 + rank].requires_grad_()
            y = way(x)
            (y * y.detach().cos()).sum().backward()
            results.append([y.detach(), x.grad, *dict(way.named_buffers()).values()])
    return results


def too_few(rank):
    """What is raised where one rank has a single value a channel and the others none; two together are enough."""
    said = []
    fused, plain = DepthwiseGELUBN(2, 3), nn.Sequential(nn.BatchNorm2d(2))
    for module in (fused, plain):
        sync_batch_norm(module)
        try:
            module(torch.ones(1 if rank == 0 else 0, 2, 1, 1))
        except ValueError as e:
            said.append(str(e))
        assert module(torch.ones(int(rank < 2), 2, 1, 1)).isfinite().all()
    return said


# What is made of it

@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def ranks(request, tmp_path_factory):
    """What `everything` gave on each rank."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=rank_of, args=(world, rank, folder, everything), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


def whole(parts):
    """Results of all ranks as one process would have them: activations side by side, gradients added up; statistics, equal to
    the last bit, once."""
    together = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name.startswith(("y", "dx")):
            together[name] = torch.cat(tensors)
        elif name.startswith("d"):
            together[name] = sum(tensors)
        else:
            assert all(torch.equal(t, tensors[0]) for t in tensors), f"{name} differs between ranks"
            together[name] = tensors[0]
    return together


def assert_close(got, want, tolerance=1e-12):
    """1e-12 is some thousand roundings of float64: sums in another order, and nothing else."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance * want[name].abs().max().item(), msg=name)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way, dtype", [(way, dtype) for way in WAYS for dtype in DTYPES if dtype == torch.float32 or way in WAYS[:2]])
def test_the_block_is_as_exact_as_plain_pytorch_on_the_whole_batch(ranks, way, dtype, name):
    block = make_block(7, 2, 6, 5, 3, dtype, **OPTIONS[name])
    assert not too_far(whole([results[way, dtype, name, True] for results in ranks]), block)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS[:2])
def test_the_block_in_float64_equals_autograd(ranks, way, name):
    block = make_block(7, 2, 6, 5, 3, torch.float64, **OPTIONS[name])
    parts = [results[way, torch.float64, name, True] for results in ranks]
    assert_close(whole(parts), exact(block))
    if block.gamma is not None:  # each rank's are of its own batch alone: y = xhat * gamma + beta + x
        for rank, part in enumerate(parts):
            x, dy = (t.split(SHARES[len(ranks)])[rank] for t in (block.x, block.dy))
            xhat = (part["y"] - x - block.beta.view(-1, 1, 1)) / block.gamma.view(-1, 1, 1)
            want = {"dgamma": (dy * xhat).sum((0, 2, 3)), "dbeta": dy.sum((0, 2, 3))}
            assert_close({name: part[name] for name in want}, want, 1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_the_measure_rejects_statistics_of_each_rank(ranks, way):
    parts = [results[way, torch.float32, "residual", False] for results in ranks]
    with pytest.raises(AssertionError, match="mean differs between ranks"):
        whole(parts)
    parts = [{**part, "mean": parts[0]["mean"], "var": parts[0]["var"]} for part in parts]
    wrong = {line.split()[0] for line in too_far(whole(parts), make_block(7, 2, 6, 5, 3))}
    assert wrong >= {"y", "mean", "var", "dx", "dweight", "dgamma"}


@pytest.mark.parametrize("how", SYNCHRONISED)
def test_a_network_equals_one_process(ranks, how):
    parts = [results[how, torch.float64] for results in ranks]
    assert_close(whole(parts), two_steps(how, torch.float64), 1e-11)  # four BatchNorms deep


@pytest.mark.parametrize("how", SYNCHRONISED)
def test_a_network_in_float32_is_as_exact(ranks, how):
    """Twice plain PyTorch's error and eight roundings, of which 6.8 were measured in 40 draws of the images: its sums on the CPU
    are in double, ours are not."""
    got = whole([results[how, torch.float32] for results in ranks])
    plain, want = two_steps(how, torch.float32), two_steps(how, torch.float64)
    for name in want:
        errors = [relative_error(t[name].double(), want[name].double()) for t in (got, plain)]
        assert got[name].dtype == plain[name].dtype and errors[0] <= 2 * errors[1] + 8 * torch.finfo(torch.float32).eps, (name, errors)


def test_the_network_sees_statistics_of_each_rank(ranks):
    parts = [{name: t for name, t in results["neither", torch.float64].items() if not name.startswith("running")} for results in ranks]
    want = two_steps("neither", torch.float64)
    for name, t in whole(parts).items():
        assert relative_error(t, want[name]) > 1e-3 or name == "d10.bias", name  # that one is a sum of dy alone


def test_training_under_ddp_equals_one_process(ranks):
    want = trained(lambda model: model)
    for results in ranks:
        assert_close(results["trained"], want, 1e-11)


def test_compiled(ranks):
    for results in ranks:
        for plain, compiled in zip(results["compiled"][::2], results["compiled"][1::2]):
            assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_fewer_than_two_values(ranks):
    for results in ranks:
        assert len(results["errors"]) == 2 and all("fewer than two values a channel" in message for message in results["errors"])


def test_eval_mode_is_that_of_one_process(ranks):
    assert torch.equal(ranks[0]["eval"], network("fuse, sync", torch.float32).eval()(images(torch.float32)[0]))


# In one process

@pytest.fixture
def a_group_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
    assert model[2] is model[11] and type(model[2]) is SyncBatchNorm and not model[2].training and model[3].training
    assert type(model[3].fn[2]) is SyncBatchNorm and type(model[12]).__name__ == "Norm"
    assert type(copy.deepcopy(model)[2]) is SyncBatchNorm
    assert sync_batch_norm(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("group", [False, True])
def test_one_process_is_plain_batch_norm(group, request):
    """To the last bit."""
    if group:
        request.getfixturevalue("a_group_of_one")
    for how, plain in (("sync", "neither"), ("fuse, sync", "fuse")):
        got, want = two_steps(how, torch.float32), two_steps(plain, torch.float32)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_another_process_group_is_not_fused(a_group_of_one):
    parts = list(depthwise_unit(6, 5))
    for group, reason in ((dist.new_group([0]), "SyncBatchNorm has a process group of its own"), (dist.group.WORLD, None), (None, None)):
        parts[2] = nn.SyncBatchNorm(6, process_group=group)
        assert cannot_fuse(*parts) == reason


def test_pytorchs_own_takes_ours_for_its_own(a_group_of_one):
    """As on a GPU, and as far as it goes without one."""
    with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        nn.SyncBatchNorm.forward(SyncBatchNorm(2), torch.ones(2, 2, 4, 4))


def test_the_operator_with_sync(a_group_of_one):
    """Gradients, registrations and FLOPs, over a group of one; more ranks would move inputs at the same time."""
    block = make_block(3, 2, 4, 5, 3, torch.float64).map(lambda t: t.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *args: depthwise_gelu_bn(*args, residual=True, sync=True)[0], block[:5])
    assert torch.autograd.gradcheck(lambda *args: reference.forward(*args, None, None, 1e-5, True, True)[0], block[:5])
    assert torch.autograd.gradcheck(lambda x, gamma: batch_norm(x, gamma, None, 1e-5)[0], (block.x, block.gamma))
    op, args = torch.ops.vit_convmixer, (*block[:5], None, None, 1e-5, True, True)
    torch.library.opcheck(op.depthwise_gelu_bn, args)
    y, mean, var, count = depthwise_gelu_bn(*block[:5], residual=True, sync=True)
    assert torch.equal(count, torch.full((2,), 60.0, dtype=torch.float64))
    with torch.no_grad():
        torch.library.opcheck(op.depthwise_gelu_bn_backward, (block.dy, *block[:4], mean, var, 1e-5, True, True, True))
    with FlopCounterMode(display=False) as counter:
        depthwise_gelu_bn(*block[:5], sync=True)
    assert counter.get_total_flops() == 2 * block.x.numel() * 9
    with pytest.raises(ValueError, match="mean and var are given"):
        depthwise_gelu_bn(*block[:5], mean, var, sync=True)
