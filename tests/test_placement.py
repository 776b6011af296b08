"""Models that are wrapped, spread, or not all there: exact, or refused with the reason."""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backpack import backpack
from cases import Net, float64
from state import unchanged
from test_exact import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from bncurv import ComponentGrad, DiagGGNExact, curvature, extend, reference
from bncurv.placement import device_of

pytestmark = pytest.mark.filterwarnings("error::bncurv.SlowPathWarning")
CE = nn.CrossEntropyLoss()
with float64(1):
    X, y = torch.randn(8, 4), torch.randint(3, (8,))


def net() -> Any:
    with float64(0):
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def diagonal(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return curvature(model, CE, (X, y), DiagGGNExact(), **options).diag_ggn_exact


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def of_gesture(model: nn.Module, called: nn.Module) -> dict[str, Tensor]:
    extend(model), extend(loss_fn := nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss_fn(called(X), y).backward()
    return {name: p.diag_ggn_exact for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------- several processes
def test_distributed_data_parallel_with_one_process(one_process: None) -> None:
    """Exact in both gestures, and it trains on."""
    want = reference.ggn_diagonal(net(), CE, X, y)
    model = DistributedDataParallel(net())
    got = diagonal(model, method="coupled")
    assert_close({name.removeprefix("module."): t for name, t in got.items()}, want)
    CE(model(X), y).backward()
    plain = net()
    CE(plain(X), y).backward()
    assert torch.equal(model.module[0].weight.grad, plain[0].weight.grad)
    inner = net()
    assert_close(of_gesture(inner, DistributedDataParallel(inner)), want)


def test_sharded_parameters_are_refused(one_process: None) -> None:
    """Before the forward pass, which would reach other tensors than the parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = net()
    fully_shard(model[0]), fully_shard(model)
    with pytest.raises(TypeError, match=r"'0.weight', .* are DTensors \(fully_shard, tensor parallelism\): this proc"):
        diagonal(model)
    with pytest.warns(UserWarning, match="NO_SHARD"):
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(TypeError, match="^FullyShardedDataParallel, keeps parameters in flat tensors"):
        diagonal(model)


def test_sharded_constants_are_left_as_they_are(one_process: None) -> None:
    """A frozen DTensor that a forward pass does not read."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model = net()
    model.register_buffer("b", distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,))))
    assert diagonal(model)


# ---------------------------------------------------------------------------- devices
def on_meta(*names: str) -> nn.Module:
    model = net()
    for name in names:
        model.get_submodule(name).to("meta")
    return model


@pytest.mark.parametrize("where", ["", "0", "3"])
def test_parameters_without_values(where: str) -> None:
    model = on_meta(where)
    with (
        unchanged(),
        pytest.raises(ValueError, match=f"'{where or 0}.weight', .* on the meta device: they have no val"),
    ):
        diagonal(model)
    assert model[3 if where != "0" else 0].weight.is_meta


def test_constants_without_values() -> None:
    """Named where PyTorch fails for them."""
    model = on_meta("0").requires_grad_(False)
    model[3].requires_grad_(True)
    with pytest.raises(ValueError, match=r"^parameter.s. or buffer.s. '0.weight', '0.bias' are on the meta device"):
        diagonal(model)


def test_inputs_and_outputs_without_values() -> None:
    with pytest.raises(ValueError, match=r"X of shape \(8, 4\) is on the meta device"):
        curvature(net(), CE, (X.to("meta"), y), DiagGGNExact())
    model = Net(lambda net, x: net.m(x).to("meta"), m=net())
    with unchanged(model), pytest.raises(ValueError, match="output is on meta, its parameters on cpu"):
        diagonal(model)


def test_an_input_goes_to_where_the_model_is() -> None:
    """What is nowhere, an idle buffer without values, says nothing of it."""
    model = net()
    model.register_buffer("idle", torch.empty(2, device="meta"))
    frozen = nn.Sequential(model, nn.Linear(2, 2, device="meta").requires_grad_(False))
    assert device_of(frozen) == X.device and device_of(nn.ReLU()) is None
    assert_close(diagonal(model), reference.ggn_diagonal(net(), CE, X, y))


def test_several_devices_are_refused() -> None:
    model = net()
    with FakeTensorMode():
        model.register_parameter("other", nn.Parameter(torch.empty(3, device="cuda:1")))
    with pytest.raises(ValueError, match="several devices .'other' on cuda:1, '0.weight' on cpu.*model.to.device"):
        diagonal(model)


# ---------------------------------------------------------------------------- other parameters
def swapped(*names: str) -> Callable[[nn.Module, Any], Any]:
    """Calls the model with other tensors in place of some parameters."""

    def forward(model: nn.Module, batch: Any) -> Any:
        own = dict(model.named_parameters())
        others = {name: own[name].detach().clone().requires_grad_() for name in names}
        return torch.func.functional_call(model, others, (batch[0],)), batch[1]

    return forward


def test_functional_call_with_tensors_of_ones_own() -> None:
    """All parameters replaced, or one; where none would be wanted, that is no matter."""
    model = net()
    for names in (["0.weight"], list(dict(model.named_parameters()))):
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"not depend on parameter.s. '0.weight'.* \(5, 4\) .torc"),
        ):
            diagonal(model, forward=swapped(*names))
    want = reference.ggn_diagonal(net(), CE, X, y)
    assert_close(
        diagonal(model, forward=swapped("0.weight"), params="3.*"), {n: want[n] for n in ("3.weight", "3.bias")}
    )
    model[0].register_forward_pre_hook(lambda m, inputs: setattr(m, "weight", nn.Parameter(m.weight.detach())))
    with pytest.raises(ValueError, match="not depend on parameter.s. '0.weight', but on tensors that are none of"):
        diagonal(model)
    extend(model), extend(loss_fn := nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="not depend on parameter.s. '3.bias', but on tensors that are none of"):
        with backpack(ComponentGrad()):
            loss_fn(*swapped("3.bias")(model, (X, y))).backward()


def test_idle_parameters_are_no_matter() -> None:
    """Also of the shape of something that bncurv puts on the graph, two numbers per channel of a BatchNorm."""
    model = net()
    model.idle = nn.Linear(5, 2, bias=False).double()
    got = diagonal(Net(lambda net, x: net.m[:4](x), m=model), params="m.idle.weight")
    assert not got["m.idle.weight"].any()


def test_functional_call_with_parameters_of_the_model() -> None:
    """As they are, or computed from them: a network that makes another one's weight."""
    model = Net(
        lambda net, x: torch.func.functional_call(
            net.m, {"0.weight": net.w.tanh() + net.m[0].weight, "3.bias": net.b}, x
        ),
        m=net(),
        w=nn.Parameter(torch.ones(5, 4, dtype=torch.float64)),
        b=nn.Parameter(torch.ones(3, dtype=torch.float64)),
    )
    assert_close(diagonal(model, method="coupled"), reference.ggn_diagonal(model, CE, X, y))


# ---------------------------------------------------------------------------- modules of other kinds
def test_lazy_modules() -> None:
    """Once they have seen a batch; in BackPACK's gesture, from the first one on."""
    with float64(0):
        model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Linear(5, 3))
        with pytest.raises(ValueError, match="'0.weight' is not initialised yet .a lazy module.*once on a batch first"):
            diagonal(model)
        got = of_gesture(model, model)
    want = reference.ggn_diagonal(model, CE, X, y)
    assert_close(got, want)
    assert_close(diagonal(model), want)


def test_pruned_modules() -> None:
    """The computed weight is the one before, with its graph; and the oracle takes such a model."""
    model = net()
    with float64(0):
        prune.random_unstructured(model[0], "weight", 0.3)
    before = model[0].weight
    with unchanged(model):
        got = diagonal(model, method="coupled")
    assert model[0].weight is before and not got["0.weight_orig"][model[0].weight_mask == 0].any()
    assert_close(got, reference.ggn_diagonal(model, CE, X, y))
    assert_close(diagonal(model.float(), precision="float64"), reference.ggn_diagonal(model, CE, X, y))
