"""Models, data and losses as data: every test loops over these lists.

A `Case` is built, never stored: `case.build()` gives the same weights and the same batch every
time. Everything is float64 and tiny (`N` 4..8, most nets below 1000 parameters), so the dense
oracle takes milliseconds. Norm layers get random affine parameters and running statistics, so that
a forgotten factor shows.

Lists: `MODELS`, `ARCHITECTURES`, `LOSSES` must be exact (those with `fallback=True` through the
generic fallback, with a warning); `COUPLED_UNKNOWN` must be noticed; `RANDOM` draws in its forward
pass (seed before each); `EXOTIC` are further traps.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One model on one batch under one loss.

    Attributes:
        name: Unique, used as test id.
        model: Builds the model, modes set.
        data: Builds `(X, y)`.
        loss: Builds the loss module.
        fallback: A parameter has no layer rule, a warning is due.
        culprit: Qualified name of the first module whose output at one sample depends on other
            samples other than through train-mode BN ("" is the root); None: there is no such.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    loss: Callable[[], nn.Module]
    fallback: bool = False
    culprit: str | None = None

    def build(self) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
        """`(model, loss_fn, X, y)`, identical in every call."""
        return self.model(), self.loss(), *self.data()

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def float64(seed: int) -> Iterator[None]:
    """Float64 by default and a seeded generator, both restored afterwards."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)


def seeded(factory: Callable[[], T], seed: int) -> Callable[[], T]:
    """The factory in float64 with its own fixed seed; models get their norm layers perturbed."""

    def build() -> T:
        with float64(seed):
            built = factory()
            if isinstance(built, nn.Module):
                perturb(built)
            return built

    return build


def perturb(model: nn.Module) -> None:
    """Random affine parameters (some negative) and running statistics for every norm layer."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    for module in model.modules():
        if not isinstance(module, norms):
            continue
        if module.weight is not None:
            signs = torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0)
            nn.init.uniform_(module.weight, 0.5, 1.5).data.mul_(signs)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=0.4)
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(3)


def case(
    name: str,
    model: Callable[[], nn.Module],
    data: Callable[[], Batch],
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss,
    **marks: Any,
) -> Case:
    """A `Case` with its seeds fixed."""
    return Case(name, seeded(model, 0), seeded(data, 1), seeded(loss, 2), **marks)


class Net(nn.Module):
    """Named children (or bare parameters) and a forward function `forward(net, x)`."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **children: Any) -> None:
        super().__init__()
        self._function = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


# ------------------------------------------------------------------------------------------ data


def labelled(*shape: int, C: int = 3, extra: tuple[int, ...] = ()) -> Callable[[], Batch]:
    """Normal inputs of `shape`, class labels `[N, *extra]`."""
    return lambda: (torch.randn(shape), torch.randint(C, (shape[0], *extra)))


def tokens(N: int, length: int, vocabulary: int = 6, C: int = 3) -> Callable[[], Batch]:
    """Token indices, 0 is the padding and does occur."""

    def data() -> Batch:
        X = torch.randint(vocabulary, (N, length))
        X[:, -1] = 0
        return X, torch.randint(C, (N,))

    return data


def regression(*shape: int, out: tuple[int, ...]) -> Callable[[], Batch]:
    """Normal inputs of `shape`, normal targets `[N, *out]`."""
    return lambda: (torch.randn(shape), torch.randn(shape[0], *out))


def bits(*shape: int, out: tuple[int, ...], soft: bool = False) -> Callable[[], Batch]:
    """Normal inputs of `shape`, targets in {0, 1} (soft: in [0, 1]) of shape `[N, *out]`."""

    def data() -> Batch:
        X, y = torch.randn(shape), torch.rand(shape[0], *out)
        return X, y if soft else y.round()

    return data


def ignoring(
    data: Callable[[], Batch], index: int, whole_sample: bool = False
) -> Callable[[], Batch]:
    """Some targets replaced by `index`; with `whole_sample` all those of sample 0 too."""

    def ignored() -> Batch:
        X, y = data()
        y.view(-1)[1::3] = index
        if whole_sample:
            y[0] = index
        return X, y

    return ignored


def soft(data: Callable[[], Batch], C: int) -> Callable[[], Batch]:
    """Class labels `[N, *extra]` replaced by class probabilities `[N, C, *extra]`."""

    def softened() -> Batch:
        X, y = data()
        return X, torch.randn(y.shape[0], C, *y.shape[1:]).softmax(1)

    return softened


# ------------------------------------------------------------------------------- models: plain BN


def mlp(*widths: int, bn: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    """Linear-BN-ReLU for every hidden width, then Linear."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(fan_in, fan_out), bn(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def frozen_statistics(model: nn.Module, *names: str) -> nn.Module:
    """The named submodules in eval mode, the rest as it is."""
    for name in names:
        model.get_submodule(name).eval()
    return model


def frozen_parameters(model: nn.Module, *names: str) -> nn.Module:
    """The named parameters do not require gradients."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def bn_twice() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.second(net.bn(net.first(x)).relu())).relu()),
        first=nn.Linear(4, 5),
        second=nn.Linear(5, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def bn_twice_two_sizes() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn(net.first(x)).relu()
        x = net.bn(net.second(F.avg_pool2d(x, 2))).relu()
        return net.out(x.flatten(1))

    return Net(
        forward,
        first=nn.Conv2d(2, 3, 3, padding=1),
        second=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
        out=nn.Linear(12, 3),
    )


def block_twice() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.block(net.block(net.stem(x)))),
        stem=nn.Linear(4, 5),
        block=nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()),
        out=nn.Linear(5, 3),
    )


def residual_cnn() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn1(net.conv1(x)).relu()
        x = (x + net.bn2(net.conv2(x))).relu()
        return net.out(x.mean((2, 3)))

    return Net(
        forward,
        conv1=nn.Conv2d(2, 4, 3, padding=1),
        bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(4),
        out=nn.Linear(4, 3),
    )


def two_conv_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


class UNet(nn.Module):
    """One level down and up: concatenation, transposed convolution, one output per pixel."""

    def __init__(self, C: int = 3) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.down = nn.MaxPool2d(2)
        self.mid = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.dec = nn.Sequential(nn.Conv2d(6, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Conv2d(3, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(x)
        x = self.up(self.mid(self.down(skip)))
        return self.head(self.dec(torch.cat([skip, x], 1)))


def unet_classifier() -> nn.Module:
    return nn.Sequential(UNet(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def segmenter(C: int = 3) -> nn.Module:
    """[N, 2, H, W] -> [N, C, H, W]."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, C, 1),
    )


def tagger(C: int = 3) -> nn.Module:
    """[N, 2, L] -> [N, C, L]."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Conv1d(4, C, 3, padding="same"),
    )


def conv1d_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def conv3d_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, (3, 2, 2), padding=(1, 0, 1), stride=(1, 2, 1)),
        nn.BatchNorm3d(2),
        nn.ReLU(),
        nn.AvgPool3d((2, 1, 1)),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def transposed(conv: nn.Module, bn: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(conv, bn, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


def transposed_output_size() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        small = net.down(x)
        big = net.bn(net.up(small, output_size=x.shape[2:])).relu()
        return net.out((big + x).flatten(1))

    return Net(
        forward,
        down=nn.Conv2d(2, 3, 3, stride=2, padding=1),
        up=nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1),
        bn=nn.BatchNorm2d(2),
        out=nn.Linear(2 * 4 * 5, 3),
    )


# ------------------------------------------------------------------------ models: BN's options


class PlainSubclass(nn.BatchNorm1d):
    """A subclass that changes nothing."""


class LooseBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Accepts inputs of any dimension."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class SkewedBatchNorm(nn.BatchNorm1d):
    """Adds its input to what BN makes of it."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.7 * super().forward(input) + 0.3 * input


class FunctionalBatchNorm(nn.Module):
    """`F.batch_norm` with bare parameters and no running statistics."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(features) + 0.5)
        self.beta = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.gamma, self.beta, training=True, eps=1e-3)


def functional_bn() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), FunctionalBatchNorm(6), nn.Tanh(), nn.Linear(6, 3))


def root_functional_bn() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.batch_norm(net.first(x), None, None, net.gamma, net.beta, training=True)
        x = F.batch_norm(net.second(x.tanh()), None, None, training=True)
        return net.out(x.tanh())

    return Net(
        forward,
        first=nn.Linear(4, 5),
        second=nn.Linear(5, 5),
        out=nn.Linear(5, 3),
        gamma=nn.Parameter(torch.rand(5) + 0.5),
        beta=nn.Parameter(torch.randn(5)),
    )


def options(**kwargs: Any) -> Callable[[], nn.Module]:
    """An MLP whose BN layers have the given options."""
    return lambda: mlp(4, 6, 5, 3, bn=lambda width: nn.BatchNorm1d(width, **kwargs))


# ----------------------------------------------------------------------- models: other layers


def padded_conv(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, dilation=(1, 2), stride=2, padding=(1, 2), padding_mode=mode),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, (2, 3), groups=4, padding="same", padding_mode=mode, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def same_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, (2, 4), dilation=(2, 1), padding="same"),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 2, padding="valid"),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def padded_conv1d(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 4, groups=2, dilation=2, padding=3, padding_mode=mode),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 7, 3),
    )


def padded_conv3d(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=(1, 2, 1), groups=2, padding=(1, 0, 1), padding_mode=mode),
        nn.BatchNorm3d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def other_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.LayerNorm((2, 2)),
        nn.Flatten(),
        nn.LayerNorm(16, bias=False),
        nn.Linear(16, 3),
    )


def text_net() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn1(net.conv(net.embedding(x).transpose(1, 2))).relu()
        return net.out(net.bn2(x.mean(2)))

    return Net(
        forward,
        embedding=nn.Embedding(6, 3, padding_idx=0),
        conv=nn.Conv1d(3, 4, 3, padding=1),
        bn1=nn.BatchNorm1d(4),
        bn2=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def inplace_cnn() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.act(net.bn1(net.conv1(x)))
        y = net.bn2(net.conv2(x))
        y += x
        y = F.relu(y, inplace=True)
        y = net.bn3(net.conv3(y)).add_(x).mul_(0.5)
        return net.out(F.relu_(y).mean((2, 3)))

    return Net(
        forward,
        conv1=nn.Conv2d(2, 3, 3, padding=1),
        conv2=nn.Conv2d(3, 3, 3, padding=1),
        conv3=nn.Conv2d(3, 3, 1),
        bn1=nn.BatchNorm2d(3),
        bn2=nn.BatchNorm2d(3),
        bn3=nn.BatchNorm2d(3),
        act=nn.ReLU(inplace=True),
        out=nn.Linear(3, 3),
    )


def time_distributed() -> nn.Module:
    """[N, T, D]: Linear on the last axis, BN over channels, one class per step."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn(net.first(x).transpose(1, 2)).transpose(1, 2).relu()
        return net.out(net.norm(x)).transpose(1, 2)

    return Net(
        forward,
        first=nn.Linear(3, 5),
        bn=nn.BatchNorm1d(5),
        norm=nn.LayerNorm(5),
        out=nn.Linear(5, 3),
    )


def flattened_time() -> nn.Module:
    """BN over samples and steps together: the module sees N*T rows."""

    def forward(net: Any, x: Tensor) -> Tensor:
        rows = net.bn(net.first(x).flatten(0, 1)).tanh()
        return net.out(rows.unflatten(0, x.shape[:2]).mean(1))

    return Net(forward, first=nn.Linear(3, 5), bn=nn.BatchNorm1d(5), out=nn.Linear(5, 3))


def prelu_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.Conv2d(4, 3, 1),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


class LayerScale(nn.Module):
    """A bare parameter per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def layer_scale_net() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.conv1(x)
        x = x + net.scale(net.bn(net.conv2(x)).tanh())
        return net.out(x.mean((2, 3))) * net.temperature

    return Net(
        forward,
        conv1=nn.Conv2d(2, 4, 2),
        conv2=nn.Conv2d(4, 4, 1),
        bn=nn.BatchNorm2d(4),
        scale=LayerScale(4),
        out=nn.Linear(4, 3),
        temperature=nn.Parameter(torch.tensor(1.3)),
    )


def weight_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def tied_weights() -> nn.Module:
    """Auto-encoder fashion: the decoder is the encoder's weight, transposed."""

    def forward(net: Any, x: Tensor) -> Tensor:
        code = net.bn(net.encoder(x)).tanh()
        return net.out(F.linear(code, net.encoder.weight.t()).tanh())

    return Net(
        forward, encoder=nn.Linear(4, 5), bn=nn.BatchNorm1d(5), out=nn.Linear(4, 3, bias=False)
    )


VECTORS = labelled(6, 4)
IMAGES = labelled(5, 2, 4, 4)

MODELS: list[Case] = [
    case("mlp_bn", lambda: mlp(4, 6, 3), VECTORS),
    case("two_bns", lambda: mlp(4, 6, 5, 3), labelled(7, 4)),
    case("bn_twice", bn_twice, VECTORS),
    case("bn_twice_two_sizes", bn_twice_two_sizes, IMAGES),
    case("block_twice", block_twice, VECTORS),
    case("bn_first", lambda: nn.Sequential(nn.BatchNorm1d(4), *mlp(4, 5, 3)), VECTORS),
    case("bn_last", lambda: nn.Sequential(*mlp(4, 5, 3), nn.BatchNorm1d(3)), VECTORS),
    case("residual_cnn", residual_cnn, IMAGES),
    case("two_conv_cnn", two_conv_cnn, labelled(6, 1, 6, 6)),
    case("unet", unet_classifier, labelled(4, 1, 6, 6)),
    case("unet_pixels", UNet, labelled(4, 1, 4, 4, extra=(4, 4))),
    case("segmentation", segmenter, labelled(4, 2, 3, 4, extra=(3, 4))),
    case("sequence", tagger, labelled(5, 2, 4, extra=(4,))),
    case("bn1d_ncl", conv1d_classifier, labelled(5, 2, 7)),
    case("conv3d", conv3d_classifier, labelled(4, 1, 4, 4, 3)),
    case(
        "conv_transpose1d",
        lambda: transposed(
            nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.BatchNorm1d(4),
            32,
        ),
        labelled(5, 4, 4),
    ),
    case(
        "conv_transpose2d",
        lambda: transposed(
            nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            nn.BatchNorm2d(3),
            75,
        ),
        labelled(5, 2, 3, 3),
    ),
    case(
        "conv_transpose3d",
        lambda: transposed(
            nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 1), bias=False), nn.BatchNorm3d(2), 72
        ),
        labelled(4, 2, 2, 2, 2),
    ),
    case("conv_transpose_output_size", transposed_output_size, labelled(5, 2, 4, 5)),
    case("mixed_modes", lambda: frozen_statistics(mlp(4, 6, 5, 3), "1"), VECTORS),
    case("mixed_modes_late", lambda: frozen_statistics(mlp(4, 6, 5, 3), "4"), VECTORS),
    case("all_bn_eval", lambda: frozen_statistics(mlp(4, 6, 5, 3), "1", "4"), VECTORS),
    case("net_eval", lambda: residual_cnn().eval(), IMAGES),
    case("not_affine", options(affine=False), VECTORS),
    case("not_tracking", options(track_running_stats=False), VECTORS),
    case("not_tracking_eval", lambda: options(track_running_stats=False)().eval(), VECTORS),
    case("bare_bn", options(track_running_stats=False, affine=False), VECTORS),
    case("no_momentum", options(momentum=None), VECTORS),
    case("large_eps", options(eps=0.5), VECTORS),
    case("bn_subclass", lambda: mlp(4, 6, 5, 3, bn=PlainSubclass), VECTORS),
    case("bn_subclass_loose", lambda: mlp(4, 6, 5, 3, bn=LooseBatchNorm), VECTORS),
    case("bn_subclass_forward", lambda: mlp(4, 6, 5, 3, bn=SkewedBatchNorm), VECTORS),
    case("functional_bn", functional_bn, VECTORS),
    case("root_functional_bn", root_functional_bn, VECTORS),
    case("no_bn", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), VECTORS),
    *(
        case(f"conv2d_{mode}", lambda mode=mode: padded_conv(mode), labelled(4, 2, 5, 6))
        for mode in ("zeros", "circular", "reflect", "replicate")
    ),
    case("conv2d_same", same_padding, labelled(4, 2, 5, 5)),
    case("conv1d_circular", lambda: padded_conv1d("circular"), labelled(5, 2, 7)),
    case("conv1d_reflect", lambda: padded_conv1d("reflect"), labelled(5, 2, 7)),
    case("conv3d_zeros", lambda: padded_conv3d("zeros"), labelled(4, 2, 3, 4, 3)),
    case("conv3d_replicate", lambda: padded_conv3d("replicate"), labelled(4, 2, 3, 4, 3)),
    case("other_norms", other_norms, IMAGES),
    case("embedding", text_net, tokens(6, 5)),
    case("inplace", inplace_cnn, IMAGES),
    case(
        "frozen_parameters",
        lambda: frozen_parameters(mlp(4, 6, 5, 3), "0.weight", "1.bias", "4.weight", "6.bias"),
        VECTORS,
    ),
    case(
        "frozen_stem",
        lambda: frozen_parameters(mlp(4, 6, 5, 3), "0.weight", "0.bias", "1.weight", "1.bias"),
        VECTORS,
    ),
    case("linear_ntd", time_distributed, labelled(5, 4, 3, extra=(4,))),
    case("linear_ntd_flat", flattened_time, labelled(5, 4, 3)),
    case("prelu", prelu_net, IMAGES),
    case("layer_scale", layer_scale_net, IMAGES),
    case("weight_norm", weight_norm_net, VECTORS),
    case("tied_weights", tied_weights, VECTORS),
]


# --------------------------------------------------------------------------------- architectures


def conv_bn(fan_in: int, fan_out: int, kernel: int = 1, act: Any = None, **kwargs: Any) -> Any:
    """Convolution that keeps the size (at stride 1), BN and maybe an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False, **kwargs),
        nn.BatchNorm2d(fan_out),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


def head(features: int, C: int = 3) -> nn.Sequential:
    """Global average pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, C))


class PreActBlock(nn.Module):
    """He et al. 2016, Identity mappings: BN-ReLU-conv twice, shortcut from the activation."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += skip
        return out


def preact_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        PreActBlock(3, 3),
        PreActBlock(3, 4, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        head(4),
    )


class DenseLayer(nn.Module):
    """Huang et al. 2017: bottleneck layer on the concatenation of all features so far."""

    def __init__(self, fan_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(fan_in, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    """Layers that each see everything before them."""

    def __init__(self, fan_in: int, growth: int, layers: int) -> None:
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = DenseLayer(fan_in + i * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.features(x), inplace=True)
        return net.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))

    transition = nn.Sequential(
        nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.Conv2d(7, 3, 1, bias=False), nn.AvgPool2d(2)
    )
    stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
    features = nn.Sequential(
        stem, DenseBlock(3, 2, 2), transition, DenseBlock(3, 2, 1), nn.BatchNorm2d(5)
    )
    return Net(forward, features=features, classifier=nn.Linear(5, 3))


class SqueezeExcite(nn.Module):
    """Hu et al. 2018: channel weights from globally pooled features."""

    def __init__(self, channels: int, squeezed: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = act, gate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gate(self.fc2(self.act(self.fc1(self.avgpool(x)))))
        return scale * x


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project (MobileNetV3, EfficientNet)."""

    def __init__(
        self, fan_in: int, fan_out: int, act: Any, se: nn.Module, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv_bn(fan_in, 6, act=act),
            conv_bn(6, 6, kernel, act=act, stride=stride, groups=6),
            se,
            conv_bn(6, fan_out),
        )
        self.use_residual = stride == 1 and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.use_residual:
            out += x
        return out


def mobilenet() -> nn.Module:
    def se() -> nn.Module:
        return SqueezeExcite(6, 3, nn.ReLU(inplace=True), nn.Hardsigmoid(inplace=True))

    return nn.Sequential(
        conv_bn(1, 4, 3, act=nn.Hardswish, stride=2),
        InvertedResidual(4, 4, nn.Hardswish, se()),
        InvertedResidual(4, 5, nn.Hardswish, se(), kernel=5, stride=2),
        head(5),
    )


def efficientnet() -> nn.Module:
    def se() -> nn.Module:
        return SqueezeExcite(6, 2, nn.SiLU(inplace=True), nn.Sigmoid())

    return nn.Sequential(
        conv_bn(1, 4, 3, act=nn.SiLU, stride=2),
        InvertedResidual(4, 4, nn.SiLU, se()),
        InvertedResidual(4, 5, nn.SiLU, se(), kernel=5, stride=2),
        head(5),
    )


class BasicConv2d(nn.Module):
    """GoogLeNet's: in-place ReLU as a function call."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int = 1, **kwargs: Any) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(fan_in, fan_out, kernel, padding=padding, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(fan_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Szegedy et al. 2015: four branches, concatenated."""

    def __init__(self, fan_in: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(fan_in, 2)
        self.branch2 = nn.Sequential(BasicConv2d(fan_in, 2), BasicConv2d(2, 3, 3))
        self.branch3 = nn.Sequential(BasicConv2d(fan_in, 1), BasicConv2d(1, 2, 3))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), BasicConv2d(fan_in, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1, self.branch2, self.branch3, self.branch4]
        return torch.cat([branch(x) for branch in branches], 1)


def googlenet() -> nn.Module:
    return nn.Sequential(BasicConv2d(1, 3, 3), Inception(3), nn.MaxPool2d(2), Inception(8), head(8))


def dcgan_generator() -> nn.Module:
    """Radford et al. 2016: noise [N, 4, 1, 1] to images [N, 1, 8, 8]."""
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 2, 1, 0, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(True),
        nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(True),
        nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channel groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: split (or two strided branches), concatenate, shuffle."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        half = fan_out // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv_bn(fan_in, fan_in, 3, stride=stride, groups=fan_in),
                conv_bn(fan_in, half, act=nn.ReLU),
            )
        self.branch2 = nn.Sequential(
            conv_bn(fan_in if stride > 1 else half, half, act=nn.ReLU),
            conv_bn(half, half, 3, stride=stride, groups=half),
            conv_bn(half, half, act=nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            left, right = x.chunk(2, dim=1)
            out = torch.cat([left, self.branch2(right)], 1)
        else:
            out = torch.cat([self.branch1(x), self.branch2(x)], 1)
        return channel_shuffle(out, 2)


def shufflenet() -> nn.Module:
    return nn.Sequential(
        conv_bn(1, 3, 3, act=nn.ReLU), ShuffleUnit(3, 6, 2), ShuffleUnit(6, 6, 1), head(6)
    )


class BasicBlock(nn.Module):
    """He et al. 2016: two 3x3 convolutions and a shortcut, one in-place ReLU for all."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or fan_in != fan_out:
            self.downsample = conv_bn(fan_in, fan_out, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        conv_bn(1, 3, 3, act=nn.ReLU),
        nn.MaxPool2d(3, stride=2, padding=1),
        BasicBlock(3, 3),
        BasicBlock(3, 4, stride=2),
        head(4),
    )


PICTURES = labelled(5, 1, 8, 8)

ARCHITECTURES: list[Case] = [
    case("preact_resnet", preact_resnet, PICTURES),
    case("densenet", densenet, PICTURES),
    case("mobilenet", mobilenet, PICTURES),
    case("googlenet", googlenet, labelled(5, 1, 6, 6)),
    case("dcgan", dcgan_generator, regression(4, 4, 1, 1, out=(1, 8, 8)), nn.MSELoss),
    case("efficientnet", efficientnet, PICTURES),
    case("shufflenet", shufflenet, PICTURES),
    case("resnet", resnet, PICTURES),
]


# --------------------------------------------------------------------------------------- losses


def cross_entropy(**kwargs: Any) -> Callable[[], nn.Module]:
    """CrossEntropyLoss; `weight=True` stands for fixed unequal weights of three classes."""

    def loss() -> nn.Module:
        if kwargs.get("weight") is True:
            return nn.CrossEntropyLoss(**{**kwargs, "weight": torch.tensor([0.4, 1.7, 0.9])})
        return nn.CrossEntropyLoss(**kwargs)

    return loss


def binary(reduction: str = "mean", **tensors: list[Any]) -> Callable[[], nn.Module]:
    """BCEWithLogitsLoss with `weight` and `pos_weight` given as lists."""
    return lambda: nn.BCEWithLogitsLoss(
        reduction=reduction, **{name: torch.tensor(values) for name, values in tensors.items()}
    )


def small(C: int) -> Callable[[], nn.Module]:
    return lambda: mlp(4, 5, C)


def pixels(C: int) -> Callable[[], nn.Module]:
    return lambda: segmenter(C)


SEGMENTS = labelled(4, 2, 3, 3, extra=(3, 3))
STEPS = labelled(5, 2, 4, extra=(4,))
EVERYTHING = {"weight": True, "label_smoothing": 0.1}

LOSSES: list[Case] = [
    # CrossEntropyLoss, [N, C]
    case("ce_mean", small(3), VECTORS),
    case("ce_sum", small(3), VECTORS, cross_entropy(reduction="sum")),
    case("ce_weight", small(3), VECTORS, cross_entropy(weight=True)),
    case("ce_weight_sum", small(3), VECTORS, cross_entropy(weight=True, reduction="sum")),
    case(
        "ce_weight_zero",
        small(3),
        VECTORS,
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.7, 0.9])),
    ),
    case("ce_smooth", small(3), VECTORS, cross_entropy(label_smoothing=0.2)),
    case("ce_smooth_sum", small(3), VECTORS, cross_entropy(label_smoothing=0.2, reduction="sum")),
    case("ce_ignore", small(3), ignoring(VECTORS, -100), cross_entropy()),
    case("ce_ignore_class", small(3), VECTORS, cross_entropy(ignore_index=1)),
    case(
        "ce_ignore_sum",
        small(3),
        ignoring(VECTORS, 255),
        cross_entropy(ignore_index=255, reduction="sum"),
    ),
    case("ce_weight_smooth", small(3), VECTORS, cross_entropy(**EVERYTHING)),
    case(
        "ce_smooth_ignore",
        small(3),
        ignoring(VECTORS, -1),
        cross_entropy(label_smoothing=0.2, ignore_index=-1),
    ),
    case(
        "ce_everything",
        small(3),
        ignoring(VECTORS, -1),
        cross_entropy(**EVERYTHING, ignore_index=-1),
    ),
    case(
        "ce_everything_sum",
        small(3),
        ignoring(VECTORS, 2),
        cross_entropy(**EVERYTHING, ignore_index=2, reduction="sum"),
    ),
    case("ce_soft", small(3), soft(VECTORS, 3)),
    case("ce_soft_sum", small(3), soft(VECTORS, 3), cross_entropy(reduction="sum")),
    case("ce_soft_weight", small(3), soft(VECTORS, 3), cross_entropy(weight=True)),
    case("ce_soft_smooth", small(3), soft(VECTORS, 3), cross_entropy(label_smoothing=0.2)),
    case("ce_soft_everything", small(3), soft(VECTORS, 3), cross_entropy(**EVERYTHING)),
    case(
        "ce_soft_everything_sum",
        small(3),
        soft(VECTORS, 3),
        cross_entropy(**EVERYTHING, reduction="sum"),
    ),
    case("ce_two_classes", small(2), labelled(6, 4, C=2)),
    # CrossEntropyLoss, [N, C, H, W] and [N, C, L]
    case("ce_pixels", pixels(3), SEGMENTS),
    case("ce_pixels_sum", pixels(3), SEGMENTS, cross_entropy(reduction="sum")),
    case("ce_pixels_weight", pixels(3), SEGMENTS, cross_entropy(weight=True)),
    case("ce_pixels_ignore", pixels(3), ignoring(SEGMENTS, -100, whole_sample=True)),
    case(
        "ce_pixels_everything",
        pixels(3),
        ignoring(SEGMENTS, 255),
        cross_entropy(**EVERYTHING, ignore_index=255),
    ),
    case("ce_pixels_soft", pixels(3), soft(SEGMENTS, 3)),
    case("ce_pixels_soft_everything", pixels(3), soft(SEGMENTS, 3), cross_entropy(**EVERYTHING)),
    case("ce_steps", tagger, STEPS),
    case(
        "ce_steps_everything_sum",
        tagger,
        ignoring(STEPS, -100),
        cross_entropy(**EVERYTHING, reduction="sum"),
    ),
    case("ce_steps_soft", tagger, soft(STEPS, 3), cross_entropy(label_smoothing=0.1)),
    # MSELoss
    case("mse_mean", small(3), regression(6, 4, out=(3,)), nn.MSELoss),
    case("mse_sum", small(3), regression(6, 4, out=(3,)), lambda: nn.MSELoss(reduction="sum")),
    case("mse_one", small(1), regression(6, 4, out=(1,)), nn.MSELoss),
    case("mse_images", pixels(2), regression(4, 2, 3, 3, out=(2, 3, 3)), nn.MSELoss),
    case(
        "mse_images_sum",
        pixels(2),
        regression(4, 2, 3, 3, out=(2, 3, 3)),
        lambda: nn.MSELoss(reduction="sum"),
    ),
    # BCEWithLogitsLoss
    case("bce_mean", small(3), bits(6, 4, out=(3,)), binary()),
    case("bce_sum", small(3), bits(6, 4, out=(3,)), binary("sum")),
    case("bce_soft", small(3), bits(6, 4, out=(3,), soft=True), binary()),
    case("bce_weight", small(3), bits(6, 4, out=(3,)), binary(weight=[0.4, 1.7, 0.9])),
    case(
        "bce_weight_rows",
        small(3),
        bits(6, 4, out=(3,)),
        binary(weight=[[0.5], [1.0], [2.0], [0.1], [1.5], [0.7]]),
    ),
    case("bce_pos_weight", small(3), bits(6, 4, out=(3,)), binary(pos_weight=[2.0, 0.5, 3.0])),
    case(
        "bce_everything_sum",
        small(3),
        bits(6, 4, out=(3,), soft=True),
        binary("sum", weight=[0.4, 1.7, 0.9], pos_weight=[2.0, 0.5, 3.0]),
    ),
    case("bce_one", small(1), bits(6, 4, out=(1,)), binary(pos_weight=[2.5])),
    case("bce_pixels", pixels(1), bits(4, 2, 3, 3, out=(1, 3, 3)), binary()),
    case(
        "bce_pixels_weight",
        pixels(1),
        bits(4, 2, 3, 3, out=(1, 3, 3), soft=True),
        binary(weight=[0.4, 1.7, 0.9], pos_weight=[[[2.5]]]),
    ),
]


# --------------------------------------------------------------------- coupling nobody declared


class MyBatchNorm(nn.Module):
    """Batch statistics by hand."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(features) + 0.5)
        self.beta = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0), x.var(0, unbiased=False)
        return self.gamma * (x - mean) / (var + 1e-5).sqrt() + self.beta


class BatchAttention(nn.Module):
    """Every sample attends to every sample; the mixing is done before `out` is called."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features)
        self.value = nn.Linear(features, features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).T / x.shape[1] ** 0.5
        return x + self.out(scores.softmax(-1) @ self.value(x))


class TorchAttention(nn.Module):
    """torch's own attention takes an unbatched [N, E] for one sequence of N steps."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class PairCoupling(nn.Module):
    """Only sample 3 sees another sample: a probe of sample 0 alone finds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:3], x[3:4] + 0.5 * x[4:5].tanh(), x[4:]])


def between(mix: Callable[[Tensor], Tensor], *, then: str = "second") -> nn.Module:
    """MLP-BN whose root mixes samples functionally, just before the child `then` is called."""

    def forward(net: Any, x: Tensor) -> Tensor:
        for name in ("first", "bn", "act", "second"):
            x = getattr(net, name)(mix(x) if name == then else x)
        return x if then else mix(x)

    return Net(
        forward,
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        act=nn.Tanh(),
        second=nn.Linear(6, 3),
    )


def mixed_cnn() -> nn.Module:
    """Minibatch standard deviation as a feature (progressive GAN), a known BN before and after."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn1(net.conv1(x)).relu()
        spread = x.std(0).mean().expand(len(x), 1, *x.shape[2:])
        x = net.bn2(net.conv2(torch.cat([x, spread], 1))).relu()
        return net.out(x.mean((2, 3)))

    return Net(
        forward,
        conv1=nn.Conv2d(2, 3, 3, padding=1),
        bn1=nn.BatchNorm2d(3),
        conv2=nn.Conv2d(4, 3, 3, padding=1),
        bn2=nn.BatchNorm2d(3),
        out=nn.Linear(3, 3),
    )


def around(mixer: nn.Module) -> nn.Module:
    """Linear, the mixing module "1", BN, Linear."""
    return nn.Sequential(
        nn.Linear(4, 6), mixer, nn.Tanh(), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    )


def minus_mean(x: Tensor) -> Tensor:
    return x - x.mean(0)


def rolled(x: Tensor) -> Tensor:
    return x.roll(1, 0)


COUPLED_UNKNOWN: list[Case] = [
    case("my_batch_norm", lambda: around(MyBatchNorm(6)), VECTORS, culprit="1"),
    case("batch_attention", lambda: around(BatchAttention(6)), VECTORS, culprit="1.out"),
    case("torch_attention", lambda: around(TorchAttention(6)), VECTORS, culprit="1.attention"),
    case("softmax_over_batch", lambda: around(nn.Softmax(dim=0)), VECTORS, culprit="1"),
    case("pair_coupling", lambda: around(PairCoupling()), VECTORS, culprit="1"),
    case("minus_mean", lambda: between(minus_mean), VECTORS, culprit="second"),
    case("minus_mean_early", lambda: between(minus_mean, then="act"), VECTORS, culprit="act"),
    case("minus_mean_last", lambda: between(minus_mean, then=""), VECTORS, culprit=""),
    case("minibatch_stddev", mixed_cnn, IMAGES, culprit="conv2"),
    case(
        "my_batch_norm_alone",
        lambda: nn.Sequential(nn.Linear(4, 6), MyBatchNorm(6), nn.Tanh(), nn.Linear(6, 3)),
        VECTORS,
        culprit="1",
    ),
]


# ---------------------------------------------------------------------- beyond the first list


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def detached_mean() -> nn.Module:
    """Values mix, derivatives do not: per-sample as far as a Jacobian can tell."""
    return between(lambda x: x - x.mean(0).detach())


def unused_layer() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(net.bn(net.first(x)).relu())

    return Net(
        forward,
        first=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6),
        spare=nn.Linear(6, 6),
        out=nn.Linear(6, 3),
    )


def lstm_net() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        steps, _ = net.lstm(x)
        return net.out(net.bn(steps[:, -1]))

    return Net(
        forward,
        lstm=nn.LSTM(3, 4, batch_first=True),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def transformer_net() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.embed(x)
        x = x + net.attention(x, x, x, need_weights=False)[0]
        return net.out(net.bn(x.transpose(1, 2)).mean(2))

    return Net(
        forward,
        embed=nn.Linear(3, 4),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        bn=nn.BatchNorm1d(4),
        out=nn.Linear(4, 3),
    )


def bilinear_net() -> nn.Module:
    return Net(
        lambda net, x: net.out(net.bn(net.mix(x, net.first(x))).relu()),
        first=nn.Linear(4, 3),
        mix=nn.Bilinear(4, 3, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


def checkpointed() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(net.bn(checkpoint(net.body, net.stem(x), use_reentrant=False)))

    return Net(
        forward,
        stem=nn.Linear(4, 5),
        body=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 3),
    )


RANDOM: list[Case] = [case("dropout", dropout_net, labelled(8, 4))]

EXOTIC: list[Case] = [
    case("roll", lambda: between(rolled), VECTORS),
    case("roll_before_bn", lambda: between(rolled, then="bn"), VECTORS),
    case("detached_mean", detached_mean, VECTORS),
    case("unused_layer", unused_layer, VECTORS),
    case("bilinear", bilinear_net, VECTORS),
    case("lstm", lstm_net, labelled(5, 4, 3)),
    case("self_attention", transformer_net, labelled(5, 4, 3)),
    case("checkpoint", checkpointed, VECTORS),
]


DETERMINISTIC: list[Case] = [*MODELS, *ARCHITECTURES, *LOSSES, *COUPLED_UNKNOWN, *EXOTIC]
