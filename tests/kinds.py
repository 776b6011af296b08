"""What user code puts between ordinary layers, as data: `Inside` acts on a tensor, `Around` runs a branch its own way.

All act on ``x [n, ...]`` and keep its shape. Those of `REFUSED` and `HALF` are refused by name where they act, those of
`MIXED` by the coupled way alone, since they mix samples; everything else is exact.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Act = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module, Tensor], Tensor]


class Image(Tensor):
    """A tensor with metadata."""


# ------------------------------------------------------------------------------- custom functions


def function(backward: Callable[[Tensor], Any], forward: Act = torch.clone, **attributes: Any) -> Act:
    """A custom Function: what it does forward, and to a gradient."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return forward(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return backward(g)

    for name, value in attributes.items():
        setattr(Custom, name, value)
    return Custom.apply


class WrongInside(torch.autograd.Function):
    """Twice its input, four times in a batch of inputs."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return 4 * x, in_dims[0]


class Generated(torch.autograd.Function):
    """A backward that is none of the forward's, with a rule for batches that PyTorch makes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y).square()


class TwoInputs(torch.autograd.Function):
    """Two inputs, two outputs; the second gets no gradient where the first is bigger."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x > y)
        return x - y, x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        (bigger,) = ctx.saved_tensors
        return g + 2 * h, torch.where(bigger, 0, -g)


class Nested(torch.autograd.Function):
    """Runs again what it did, in the backward pass; ``how`` differentiates it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Callable[..., Tensor]) -> Tensor:
        ctx.how = how
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = ctx.x.tanh() * ctx.x
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.how(ctx.x, ctx.y, g), None


def by_grad(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, g, retain_graph=True)[0]


def by_backward(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    x.grad = None
    torch.autograd.backward(y, g, retain_graph=True)
    return x.grad


class Stateful(torch.autograd.Function):
    """Another map at every pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.passes = 0
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        ctx.passes += 1
        return g / ctx.passes


# ------------------------------------------------------------------------------- hooks


def hook(act: Callable[[Tensor], Tensor | None]) -> Act:
    """On a tensor; the tensor itself goes on, and may be changed in place."""

    def hooked(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: None if g is None else act(g))
        return x

    return hooked


def node_hook(kind: str, act: Act) -> Act:
    """On the graph node behind a tensor: before it gets a gradient, or after it has given its own."""

    def hooked(x: Tensor) -> Tensor:
        if x.grad_fn is not None and kind == "before":
            x.grad_fn.register_prehook(lambda gs: tuple(None if g is None else act(g) for g in gs))
        elif x.grad_fn is not None:
            x.grad_fn.register_hook(lambda gs, _: tuple(None if g is None else act(g) for g in gs))
        return x

    return hooked


def ramp(g: Tensor) -> Tensor:
    """Every feature by another factor."""
    return g * torch.linspace(0.5, 1.5, g.shape[-1], dtype=g.dtype)


def by_sample(g: Tensor) -> Tensor:
    """Every sample by another factor."""
    return g * torch.linspace(-1.0, 2.0, len(g), dtype=g.dtype).view(-1, *(1,) * (g.dim() - 1))


def through_numpy(g: Tensor) -> Tensor:
    return torch.from_numpy(2 * g.numpy())


def reads(g: Tensor) -> Tensor:
    return g if g.sum().item() > 1e300 else 0.5 * g


def centred(g: Tensor) -> Tensor:
    return g - 0.5 * g.mean(0)


# ------------------------------------------------------------------------------- tables


def loud(x: Tensor, gain: float) -> Tensor:
    """One sample by another scale."""
    return x * torch.where(torch.arange(len(x)) == 1, gain, 1.0).to(x.dtype).view(-1, *(1,) * (x.dim() - 1))


def distances(x: Tensor, **options: Any) -> Tensor:
    """PyTorch's vmapped backward of cdist is another map."""
    rows = x.reshape(len(x), 1, -1)
    size = rows.shape[-1]
    return torch.cdist(rows, 2 * torch.eye(size, dtype=x.dtype), **options).reshape(x.shape)


INSIDE: dict[str, Act] = {
    "function_rolled": function(lambda g: g.roll(1, 0)),
    # hooks
    "hook_factor": hook(lambda g: 0.1 * g),
    "hook_sign": hook(lambda g: -g),
    "hook_looks": hook(lambda g: None),
    "hook_nothing": hook(lambda g: 0 * g),
    "hook_ramp": hook(ramp),
    "hook_by_sample": hook(by_sample),
    "hook_numpy": hook(through_numpy),
    "hook_of_a_copy": lambda x: hook(ramp)(x * 1),
    "hook_twice": lambda x: hook(ramp)(hook(by_sample)(x)),
    "before_factor": node_hook("before", lambda g: 0.1 * g),
    "before_ramp": node_hook("before", ramp),
    "after_factor": node_hook("after", lambda g: 3 * g),
    # custom functions
    "function_double": function(lambda g: 2 * g, lambda x: 2 * x),
    "function_other": function(ramp, torch.tanh),
    "function_none": function(lambda g: None),
    "function_numpy": function(through_numpy),
    "function_reads": function(reads),
    "function_single": function(lambda g: g.float().to(g.dtype) if g.dtype == torch.float32 else 2 * g),
    "function_generated": Generated.apply,
    "function_two": lambda x: torch.add(*TwoInputs.apply(x, x.tanh())),
    "nested_grad": lambda x: Nested.apply(x, by_grad),
    # faulty rules for batches
    "wrong_rule": function(WrongInside.apply, lambda x: 2 * x),
    "wrong_hook": hook(WrongInside.apply),
    "cdist_1": lambda x: distances(x, p=1.0),
    "cdist_2": lambda x: distances(x, compute_mode="donot_use_mm_for_euclid_dist"),
    "cdist_3": lambda x: distances(x, p=3.0),
    # tensors of other kinds, parts without a gradient, scales
    "subclass": lambda x: x.as_subclass(Image),  # type: ignore[attr-defined]
    "detached_part": lambda x: x + 0.5 * x.detach(),
    "constant_part": lambda x: torch.where(x > 0, x, 0.3),
    "vmap": lambda x: torch.vmap(lambda row: row.tanh() * row)(x),
    "strided": lambda x: x.clone().as_strided(x.shape, x.stride()),
    "flipped": lambda x: x.flip(-1),
    "complex": lambda x: torch.polar(x.exp().clamp(max=5), x).real,
    "loud_5": lambda x: loud(x, 1e5),
    "loud_13": lambda x: loud(x, 1e13),
    "quiet_9": lambda x: loud(x, 1e-9),
    "silent": lambda x: loud(x, 0.0),
    "scale_15": lambda x: 1e15 * x,
    "scale_-15": lambda x: 1e15 * (1e-15 * x).sin(),
    "scale_-6": lambda x: 1e-6 * x,
    "offset": lambda x: x + 100,
}

REFUSED: dict[str, Act] = {
    "random": function(lambda g: torch.rand_like(g) * g),
    "random_hook": hook(lambda g: g * torch.rand(len(g), *(1,) * (g.dim() - 1), dtype=g.dtype)),
    "random_node": node_hook("before", lambda g: torch.rand_like(g) * g),
    "noise": function(lambda g: g + 1e-3 * torch.randn_like(g)),
    "offset_gradient": function(lambda g: g + 1e-4),
    "sign": function(torch.sign),
    "clip": hook(lambda g: g.clamp(-1e-4, 1e-4)),
    "clip_norm": hook(lambda g: g * (1e-3 / g.norm()).clamp(max=1)),
    "normalised": function(lambda g: g / (g.norm() + 1e-30)),
    "largest": function(lambda g: g * (g.abs() >= g.abs().mean())),
    "absolute": hook(torch.abs),
    "square": function(lambda g: g * g.abs()),
    "stateful": Stateful.apply,
}

MIXED: dict[str, Act] = {
    "centred": lambda x: x - 0.5 * x.mean(0),
    "rolled": lambda x: x + 0.3 * x.roll(1, 0),
    "softmax": lambda x: x * x.softmax(0),
    "whole": lambda x: x / (1 + x.square().mean()),
    "sorted": lambda x: x.sort(0).values,
    "hook_centred": hook(centred),
    "before_centred": node_hook("before", centred),
    "loud_rolled": lambda x: loud(x, 1e8) + x.roll(1, 0),
}

HALF: dict[str, Act] = {
    "bfloat16": lambda x: x.to(torch.bfloat16).to(x.dtype),
    "float16": lambda x: x.half().to(x.dtype),
}

NESTED: dict[str, Act] = {"nested_backward": lambda x: Nested.apply(x, by_backward)}


# ------------------------------------------------------------------------------- around a branch


def frozen_meanwhile(branch: nn.Module, x: Tensor) -> Tensor:
    """The parameters do not require gradients in one of two uses."""
    learnt = [p for p in branch.parameters() if p.requires_grad]
    for p in learnt:
        p.requires_grad_(False)
    y = branch(x)
    for p in learnt:
        p.requires_grad_()
    return y + 0.5 * branch(x.tanh())


def halves(branch: nn.Module, x: Tensor) -> Tensor:
    """Parts of the batch, each for itself: a BatchNorm there has statistics of each."""
    return torch.cat([branch(x[:2]), branch(x[2:])]) if len(x) > 3 else branch(x)


def doubled(branch: nn.Module, x: Tensor) -> Tensor:
    """Two views of every sample, one after the other."""
    a, b = branch(torch.cat([x, -x])).chunk(2)
    return a + 0.5 * b


def interleaved(branch: nn.Module, x: Tensor) -> Tensor:
    """Two views of every sample, side by side."""
    y = branch(x.repeat_interleave(2, 0))
    return y[::2] + y[1::2].tanh()


def some(branch: nn.Module, x: Tensor) -> Tensor:
    """Every second sample."""
    y = x.clone()
    y[::2] = branch(x[::2])
    return y


def none(branch: nn.Module, x: Tensor) -> Tensor:
    """No row at all: an expert without work."""
    fits = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in branch.modules())
    return torch.cat([x, branch(x[:0])]) if fits else x


def other_weights(branch: nn.Module, x: Tensor) -> Tensor:
    """With computed parameters."""
    return functional_call(branch, {name: 0.7 * p + 0.1 for name, p in branch.named_parameters()}, (x,))


def no_gradient(branch: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = branch(x)
    return x + y


def offloaded(branch: nn.Module, x: Tensor) -> Tensor:
    """What is saved for the backward pass is packed."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone(), t), lambda pair: pair[0]):
        return branch(x)


def in_double(branch: nn.Module, x: Tensor) -> Tensor:
    """Cast up, and down again."""
    return branch((x.double() * 2).to(x.dtype))


AROUND: dict[str, Run] = {
    "frozen_meanwhile": frozen_meanwhile,
    "halves": halves,
    "doubled": doubled,
    "interleaved": interleaved,
    "some": some,
    "none": none,
    "other_weights": other_weights,
    "no_gradient": no_gradient,
    "offloaded": offloaded,
    "in_double": in_double,
    "checkpoint": lambda branch, x: checkpoint(lambda t: branch(t * 1), x, use_reentrant=False),
    "unused": lambda branch, x: (branch(x), x)[1],
    "zero_times": lambda branch, x: x + 0 * branch(x),
    "hooked_out": lambda branch, x: hook(ramp)(branch(x)),
    "hooked_between": lambda branch, x: branch(hook(by_sample)(x * 1)),
}

STRICT = HALF | NESTED
MIXING = {*MIXED, *REFUSED, "halves", "doubled", "some", "checkpoint", "function_rolled"}  # or may, beside a branch
SCALING = {
    "loud_5",
    "loud_13",
    "quiet_9",
    "silent",
    "scale_15",
    "scale_-15",
    "scale_-6",
    "offset",
    "loud_rolled",
    "hook_nothing",
}
NOT_LINEAR = RuntimeError, "is not one fixed linear map of the incoming gradient"
ERRORS: dict[str, tuple[type[Exception], str]] = {
    **dict.fromkeys(REFUSED, NOT_LINEAR),
    **dict.fromkeys(HALF, (TypeError, "in half precision inside the model")),
    **dict.fromkeys(NESTED, (RuntimeError, "backward")),
}


class Inside(nn.Module):
    """One thing done to a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        return (INSIDE | REFUSED | MIXED | STRICT)[self.kind](x)


class Around(nn.Module):
    """A branch, run in its own way."""

    def __init__(self, kind: str, *branch: nn.Module) -> None:
        super().__init__()
        self.kind, self.branch = kind, nn.Sequential(*branch)

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        return AROUND[self.kind](self.branch, x)


def kinds_of(model: nn.Module) -> list[str]:
    return [m.kind for m in model.modules() if isinstance(m, Inside | Around)]
