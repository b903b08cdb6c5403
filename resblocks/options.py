"""The options of blocks and nets and the layers that they make: an option reaches every layer it names, or raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from typing_extensions import TypedDict

from resblocks.attention import ECA, SE
from resblocks.checks import check_dims, check_dtype, check_positive, check_probability
from resblocks.init import draws_all, init_new_layers
from resblocks.joins import DropPath, Gated
from resblocks.layers import (
    Family,
    Layer,
    Stride,
    at_every_position,
    avg_pool,
    batch_norm,
    convolution,
    instance_norm,
    max_pool,
    one_stride,
    weight_standardised,
)
from resblocks.residual import Checkpoint

POOLS = (*avg_pool, *max_pool)
DRAWN_AGAIN = (*convolution, *weight_standardised)  # by `init_new_layers`, whatever their constructors drew
SHORTCUTS = ("A", "B", "C", "D", "identity")


class LayerOptions(TypedDict, total=False):
    """The keyword options of everything that has layers; `Layers` documents them."""

    dims: int
    conv: Layer | Family
    norm: Layer | Family | None
    activation: Layer
    device: torch.device | str | None
    dtype: torch.dtype | None


class NetOptions(LayerOptions, total=False):
    """The keyword options that a net hands to all its blocks alike; `BlockLayers` documents them."""

    attention: Layer | Family | None
    dropout: float
    shortcut: str | Layer
    downsample: Layer | Family | None
    scale: Layer | None
    merge: Layer | Family | None
    checkpoint: Checkpoint


class BlockOptions(NetOptions, total=False):
    """The keyword options of a residual block; `BlockLayers` documents them."""

    drop_path: float
    dilation: int
    first_dilation: int | None


class ResidualParts(TypedDict):
    """What `BlockLayers.parts` hands to `Residual`."""

    scale: nn.Module | None
    drop_path: nn.Module | None
    merge: nn.Module | None
    checkpoint: Checkpoint
    skip: bool


class Layers:
    """Makes the layers of stems, heads and transitions.

    Args:
        dims: number of spatial dimensions of the data: 1, 2 or 3.
        conv: class or callable with the arguments of `nn.Conv2d`, or a triple of them for 1D, 2D and 3D.
        norm: class or callable of the channel count, or a triple of them for 1D, 2D and 3D; None leaves
            normalisation out and gives the convolutions a bias.
        activation: class or callable without arguments; out of place, so that hooks see what left each layer.
        device, dtype: where and as what the parameters are made.

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value outside its range, an in-place activation, a layer for other dims.
    """

    def __init__(
        self,
        *,
        dims: int = 2,
        conv: Layer | Family = convolution,
        norm: Layer | Family | None = batch_norm,
        activation: Layer = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown(unknown, LayerOptions.__annotations__)
        check_dims(dims)
        check_dtype(dtype)
        self.dims = dims
        self.has_norm = norm is not None
        self._conv, self._norm, self._activation = conv, norm, activation
        self._device, self._dtype = device, dtype

    def build(self, layer: Layer | Family, *args: object, option: str = "layer", **kwargs: object) -> nn.Module:
        """Make one layer of the right dims on the asked device and dtype, with its weights drawn.

        Args:
            layer: what makes it, or a triple for 1D, 2D and 3D.
            args, kwargs: handed to it.
            option: the name under which the user gave it, for errors.
        """
        make = self._of_dims(layer, option)
        if isinstance(make, nn.Module):
            raise ValueError(f"{option} must be a class or callable that makes layers, got one already made, {make}")
        if not callable(make):
            raise ValueError(f"{option} must be a class or callable that returns a torch.nn.Module, got {make!r}")
        given = (self, *args) if getattr(inside(make), "wants_layers", False) else args
        device = torch.get_default_device() if self._device is None else torch.device(self._device)
        rewind = _rng_rewind(device)
        with device, Undrawn() if inside(make) in DRAWN_AGAIN else nullcontext():
            try:
                module = make(*given, **kwargs)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{option} {make!r} refused the arguments {args}: {error}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"{option} must return a torch.nn.Module, got {module!r} from {make!r}")
        for child in module.modules():
            _check_dims(child, self.dims, option)
        if draws_all(module):  # what the constructor drew does not count: init_weights repeats the draw below alone
            rewind()
        module = module.to(dtype=self._dtype)  # before the draw, so that init_weights draws the same
        with device:
            init_new_layers(module)
        return module

    def _of_dims(self, layer: Layer | Family, option: str) -> Layer:
        if not isinstance(layer, tuple):
            return layer
        if len(layer) != 3:
            raise ValueError(f"{option} must be one layer or a triple, for 1D, 2D and 3D, got {layer!r}")
        return layer[self.dims - 1]

    def pooling(self, layer: Layer | Family, channels: int, stride: Stride, option: str) -> nn.Module:
        """Make what reduces the resolution of so many channels by the stride."""
        make = inside(self._of_dims(layer, option))
        if isinstance(make, type) and issubclass(make, POOLS):
            raise ValueError(
                f"{option} must take channels and stride, got {make.__name__}, which takes the size of its window: "
                f"try resblocks.average_downsample or lambda channels, stride: nn.{make.__name__}(stride)"
            )
        return self.build(layer, channels, stride, option=option)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Stride,
        stride: Stride = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
    ) -> nn.Module:
        """Convolution that keeps the size at stride 1; biased only where the recipe has no norm."""
        check_positive(in_channels=in_channels, out_channels=out_channels, dilation=dilation, groups=groups)
        size = one_stride(kernel_size, self.dims, "kernel_size")
        sizes = (size,) if isinstance(size, int) else size
        if any(n % 2 == 0 for n in sizes):
            raise ValueError(f"kernel_size must be odd to keep the size of the map, got {kernel_size}")
        padding = tuple(dilation * (n // 2) for n in sizes)
        for name, channels in {"in_channels": in_channels, "out_channels": out_channels}.items():
            if channels % groups:
                raise ValueError(
                    f"groups must divide {name} of the convolution, got groups={groups}, {name}={channels}"
                )
        conv = self.build(
            self._conv,
            in_channels,
            out_channels,
            size,
            option="conv",
            stride=one_stride(stride, self.dims),
            padding=padding[0] if len(padding) == 1 else padding,
            dilation=dilation,
            groups=groups,
            bias=not self.has_norm,
        )
        if type(conv) in weight_standardised and not self.has_norm:
            raise ValueError(f"conv must have a norm behind it where it standardises its weights, got {conv}")
        return conv

    def norm(self, channels: int) -> nn.Module | None:
        """Normalisation of so many channels, None where the recipe has none."""
        norm = None if self._norm is None else self.build(self._norm, channels, option="norm")
        if type(norm) in (nn.LayerNorm, nn.RMSNorm):
            raise ValueError(
                f"norm must normalise over channels, got torch.nn.{type(norm).__name__}, which does so over the last "
                f"dimension; resblocks.LayerNorm does over channels"
            )
        return norm

    def activation(self) -> nn.Module:
        """Activation function, refused if it works in place."""
        module = self.build(self._activation, option="activation")
        if any(getattr(child, "inplace", False) for child in module.modules()):
            raise ValueError(f"activation must work out of place (hooks would see overwritten values), got {module}")
        return module


class BlockLayers(Layers):
    """Makes the layers of a residual block.

    Args:
        attention: class or callable of the channel count (SE, ECA, CBAM), last in the branch; None for none.
        dropout: probability of dropping an element before the last convolution of the branch (Zagoruyko and
            Komodakis 2016, fig. 1d); after it in a dense layer, as torchvision (Huang et al. 2017, sec. 4.2, drop
            after every convolution but the first).
        shortcut: "A", "B", "C", "D", "identity" or a callable of in_channels, out_channels and stride; see
            `resblocks.shortcuts`.
        downsample: class or callable of channels and stride (`average_downsample`, `blur_downsample`) that reduces
            the resolution in place of strided convolutions, in branch and shortcut (D keeps its own average pool);
            None for the strides.
        drop_path: probability of dropping the branch of a sample (Huang et al. 2016); see `DropPath`.
        dilation: of the 3x3 convolutions.
        first_dilation: of the first 3x3 convolution, where that differs: in a block whose stride a dilation replaces,
            it is the dilation of the blocks before (Yu et al. 2017). The stride that is replaced is
            dilation / first_dilation; pools stay, and average over positions first_dilation apart.
        scale: how the branch starts and is scaled: ZeroInit, SkipInit, ReZero, LayerScale, Fixup, or any class
            or callable of the channel count.
        merge: class or callable of the channel count that joins shortcut and branch; None is `Add`.
        checkpoint: what backward computes again instead of keeping it: nothing (False), the block but for its input
            (True), or what its norms and the activations behind them put out ("norms"); see `Residual`.
        options: `Layers` documents them.

    Raises: as `Layers`.
    """

    def __init__(
        self,
        *,
        attention: Layer | Family | None = None,
        dropout: float = 0.0,
        shortcut: str | Layer = "B",
        downsample: Layer | Family | None = None,
        drop_path: float = 0.0,
        dilation: int = 1,
        first_dilation: int | None = None,
        scale: Layer | None = None,
        merge: Layer | Family | None = None,
        checkpoint: Checkpoint = False,
        **options: object,
    ) -> None:
        refuse_unknown(options, BlockOptions.__annotations__)
        super().__init__(**options)  # type: ignore[arg-type]
        check_probability(dropout=dropout, drop_path=drop_path)
        first_dilation = dilation if first_dilation is None else first_dilation
        check_positive(dilation=dilation, first_dilation=first_dilation)
        if dilation % first_dilation:
            raise ValueError(f"first_dilation must divide dilation, got {first_dilation} with dilation={dilation}")
        self.dilation, self.first_dilation = dilation, first_dilation
        if not callable(shortcut) and shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)} or a callable, got {shortcut!r}")
        self.shortcut, self.downsample = shortcut, downsample
        self._attention, self._dropout = attention, dropout
        self._drop_path, self._scale, self._merge = drop_path, scale, merge
        self._checkpoint = checkpoint

    def dropout(self) -> nn.Module | None:
        """Dropout, None where its probability is zero."""
        return nn.Dropout(self._dropout) if self._dropout > 0 else None

    def attention(self, channels: int, norm: nn.Module | None = None) -> nn.Module | None:
        """Attention over so many channels, None where the recipe has none; `norm` is what it reads."""
        attention = None if self._attention is None else self.build(self._attention, channels, option="attention")
        if type(attention) in (SE, ECA) and isinstance(norm, _InstanceNorm):
            raise ValueError(
                f"attention {type(attention).__name__} must not read an instance norm, whose means of channels are the "
                f"same for all samples"
            )
        return attention

    def keeps_shape(self, in_channels: int, out_channels: int, stride: Stride) -> bool:
        """Whether a block puts out the shape that it reads, and would without dilation."""
        return stride == self.dilation // self.first_dilation == 1 and in_channels == out_channels

    def pool(self, channels: int, stride: Stride, layer: Layer | Family | None = None) -> nn.Module | None:
        """What reduces the resolution, None where the stride of a convolution does.

        Where a dilation replaces the stride, the same at every position.

        Args:
            channels, stride: of the block.
            layer: in place of the option `downsample`.
        """
        layer, replaced = layer or self.downsample, self.dilation // self.first_dilation
        if layer is None or stride == replaced == 1:
            return None
        if replaced == 1:
            return self.pooling(layer, channels, stride, "downsample")
        return at_every_position(self.pooling(layer, channels, replaced, "downsample"), self.first_dilation)

    def strided_conv(
        self, in_channels: int, out_channels: int, kernel_size: Stride, stride: Stride, *, groups: int = 1
    ) -> nn.Module:
        """The first 3x3 convolution, which carries the block's stride, unless `pool` does."""
        stride = one_stride(stride, self.dims)
        if stride != 1 and self.first_dilation != self.dilation:
            raise ValueError(
                f"stride must be 1 where a dilation replaces it, got {stride} with dilation={self.dilation} and "
                f"first_dilation={self.first_dilation}"
            )
        conv_stride = stride if self.downsample is None else 1
        return self.conv(
            in_channels, out_channels, kernel_size, conv_stride, dilation=self.first_dilation, groups=groups
        )

    def parts(self, channels: int, skip: bool) -> ResidualParts:
        """What the options say of the way in which a branch with so many channels joins the shortcut."""
        merge = None if self._merge is None else self.build(self._merge, channels, option="merge")
        if isinstance(merge, Gated) and (self._scale is not None or self._drop_path > 0):
            raise ValueError(
                "merge must not be Gated with scale or drop_path: without a branch its gate still takes from the "
                "shortcut, and block by block the signal fades"
            )
        return {
            "scale": None if self._scale is None else self.build(self._scale, channels, option="scale"),
            "drop_path": DropPath(self._drop_path) if self._drop_path > 0 else None,
            "merge": merge,
            "checkpoint": self._checkpoint,
            "skip": skip,
        }


class Undrawn(TorchFunctionMode):
    """Leaves out the draws of torch's constructors, which would take time and count for nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def with_layers(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Mark what makes a layer out of others: it is handed the `Layers` of the options first, and honours them so."""
    make.wants_layers = True  # type: ignore[attr-defined]
    return make


def inside(make: Any) -> Any:
    """The class or function inside a partial."""
    while isinstance(make, partial):
        make = make.func
    return make


def refuse_unknown(options: Iterable[str], known: Iterable[str], taker: str = "") -> None:
    """Raise TypeError for an option that is not among the known ones, which names the nearest; `taker` was given it."""
    names = tuple(known)
    for name in (option for option in options if option not in names):
        close = get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        fault = f"{taker} takes no {name}" if taker else f"unknown option {name!r}"
        raise TypeError(f"{fault}{hint}; the options are {', '.join(names)}")


def _rng_rewind(device: torch.device) -> Callable[[], None]:
    """What sets the random generators back to where they stand now: the CPU's and the device's."""
    on_cpu = torch.get_rng_state()
    if device.type in ("cpu", "meta"):
        return partial(torch.set_rng_state, on_cpu)
    generators = torch.get_device_module(device)
    where = () if device.type == "mps" else (device,)  # of which there is one
    on_device = generators.get_rng_state(*where)

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        generators.set_rng_state(on_device, *where)

    return rewind


def _check_dims(module: nn.Module, dims: int, option: str) -> None:
    made_for = getattr(module, "dims", dims)
    for family in (convolution, batch_norm, instance_norm, max_pool, avg_pool):
        made_for = next((n for n, kind in enumerate(family, 1) if isinstance(module, kind)), made_for)
    if made_for != dims:
        raise ValueError(f"{option} must fit dims={dims}, got {type(module).__name__}, which is for dims={made_for}")
