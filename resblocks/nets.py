"""Networks: stem + stages of blocks + head, for any block and any number of stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from resblocks.blocks import DENSE_OPTIONS, NOT_DENSE, DenseBlock, Transition
from resblocks.chain import run_layers
from resblocks.checks import (
    check_flag,
    check_fraction,
    check_integer,
    check_positive,
    check_probability,
    check_sequence,
)
from resblocks.config import recorded
from resblocks.dense_plan import Memory
from resblocks.init import Draw, init_weights
from resblocks.joins import Fixup
from resblocks.layers import Family, GlobalAvgPool, Layer, Stride, max_pool, named, one_stride, times
from resblocks.options import (
    LayerOptions,
    Layers,
    NetOptions,
)
from resblocks.protocol import (
    LAYER_OPTIONS,
    Block,
    asked_options,
    block_of_stages,
    check_block,
    is_preactivated,
    make_block,
    refuse_foreign,
)
from resblocks.rebuild import ACTIVATIONS, start_rebuild
from resblocks.residual import Checkpoint, residuals, set_skip
from resblocks.stems import Stem, make_stem
from resblocks.watched import is_traced


class Network(nn.Module):
    """What all nets share: `head(pool(final(stages(stem(x)))))`.

    Args:
        stem: from the input to the first stage.
        stages: the stages in order.
        final: what comes between the last stage and the pool: norm and activation after pre-activation blocks.
        num_classes: outputs of the head; 0 leaves the pooled features.
        stage_channels: channels that each stage puts out.
        stage_strides: pixels of the input for one of each stage's output: a number, or a tuple where dimensions differ.
        checkpoint: with "norms" stem and `final` rebuild norms and activations as blocks do; see `Residual`.

    Shape: (N, in_channels, H, W) -> (N, num_classes), or (N, num_features) with num_classes=0; likewise in 1D and 3D.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = recorded(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        final: nn.Module,
        *,
        num_classes: int,
        stage_channels: Sequence[int],
        stage_strides: Sequence[Stride],
        checkpoint: Checkpoint = False,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.stage_channels, self.stage_strides = tuple(stage_channels), tuple(stage_strides)
        self.num_features = self.stage_channels[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.final = final
        self.pool = GlobalAvgPool()
        self.head: nn.Module
        self.reset_head(num_classes)
        self.built_classes = num_classes
        for block in residuals(self, lambda _, block: isinstance(block.scale, Fixup)).values():
            block.start_weights()  # once more: only now do they know how many they are

    @property
    def skip(self) -> bool:
        """Whether all blocks use their shortcuts; set it to switch all of them, as `resblocks.set_skip` does."""
        blocks = residuals(self).values()
        return bool(blocks) and all(block.skip for block in blocks)

    @skip.setter
    def skip(self, on: bool) -> None:
        set_skip(self, on)

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by a new linear layer, or by nothing with num_classes=0, where and as what the net is.

        Raises:
            ValueError: num_classes is no integer, or below 0.
        """
        check_integer(0, num_classes=num_classes)
        self.num_classes = num_classes
        here = next(self.stages.parameters(), torch.empty(0))
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=here.device, dtype=here.dtype)
        self.start_weights()

    def start_weights(self) -> None:
        """Tell the Fixup blocks how many they are, and start the head at zero if there are any."""
        fixups = [module for module in self.modules() if isinstance(module, Fixup)]
        for fixup in fixups:
            fixup.num_blocks = len(fixups)
        if fixups and isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def init_weights(self, draw: Draw | None = None) -> None:
        """Draw all weights anew, by your own rule or after `to_empty`; see `resblocks.init_weights`."""
        init_weights(self, draw)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map before the pool. Shape: (N, in_channels, H, W) -> (N, num_features, H / stride, W / stride)."""
        return self._run(self.final, self.stages(self._run(self.stem, x)))

    def _run(self, layers: nn.Module, x: Tensor) -> Tensor:
        """`layers(x)`, the stem's or the last ones; what nobody can see is written over, or rebuilt in backward."""
        if is_traced(x):
            out: Tensor = layers(x)
            return out
        if self.checkpoint != "norms" or not torch.is_grad_enabled():
            return run_layers(layers, x)
        # An activation that ends the stem is kept by the blocks that read it.
        kept = layers is self.stem and type([*layers.modules()][-1]) in ACTIVATIONS
        return run_layers(layers, x, None if kept else start_rebuild())

    def forward_head(self, features: Tensor) -> Tensor:
        """From that map to the logits. Shape: (N, num_features, H, W) -> (N, num_classes)."""
        logits: Tensor = self.head(self.pool(features))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """The maps that the stages put out, a pyramid for detection or segmentation.

        Their channels and strides are `stage_channels` and `stage_strides`. After pre-activation blocks the maps are
        not activated, but for the last, which passes `final`.

        Args:
            x: the input.
            stages: which stages, counted from 0; None takes all. What comes behind the last of them does not run.

        Shape: (N, in_channels, H, W) -> for each stage (N, channels, ceil(H / stride), ceil(W / stride)); the pools
        between the stages of `DenseNet` and `BaselineCNN` round down.

        Raises:
            ValueError: a stage that the net does not have.
        """
        count = len(self.stages)
        wanted = range(count) if stages is None else stages
        check_sequence(stages=wanted)
        for stage in wanted:
            if stage not in range(count):
                raise ValueError(f"stages must be from 0 to {count - 1}, got {stage!r}")
        maps = {}
        x = self._run(self.stem, x)
        for stage, layers in enumerate([*self.stages][: max(wanted, default=-1) + 1]):
            x = layers(x)
            if stage == count - 1:
                x = self._run(self.final, x)
            if stage in wanted:
                maps[stage] = x
        return [maps[stage] for stage in wanted]


class ResNet(Network):
    """Stem, stages of residual blocks, head (He et al. 2015, table 1), for any block that keeps the protocol.

    The protocol: `block(in_channels, out_channels, stride, **options)` makes a module with an attribute
    `out_channels`. A block is handed only those options that are asked for, so a block with three arguments will do;
    one that takes no `dims` is itself made for those of the data.
    A block class with `preactivated = True` puts out maps that are not activated: the net then leaves norm and
    activation out of the stem and puts them before the head (He et al. 2016).

    Args:
        block: block class or partial, or a list with one for each stage; `partial(Bottleneck, groups=32, base_width=4)`
            makes a ResNeXt. An option that a partial has is its own, whatever the net's is.
        depths: number of blocks in each stage.
        widths: channels that come out of each stage, 256, 512, 1024, 2048 for resnet50.
        strides: of the first block of each stage, each a number or a tuple with one for each dimension; None is 1, then
            2 for each further stage.
        stem: "imagenet" (7x7 stride 2, max-pool), "cifar" (3x3), "deep" (three 3x3, max-pool: ResNet-C, He et al.
            2019), "tiered" (deep with a narrower first 3x3: ResNet-T of timm), or a callable of in_channels and
            stem_width; its module tells its total `stride`, unless it is an `nn.Sequential` of layers that do.
        stem_width: channels that come out of the stem.
        stem_pool: class or callable of channels and stride in place of the stem's max-pool; None is the max-pool.
        num_classes: outputs of the head; 0 leaves the pooled features.
        in_channels: channels of the input.
        output_stride: largest total stride; further stages dilate their convolutions instead (Yu et al. 2017), and put
            out at the positions of the net without it what that puts out there, unless a layer takes means over
            positions (attention, group or instance norm, batch norm in training). `downsample` is then one of ours.
        drop_path: probability of dropping the last block's branch; block l of L drops with l / L of it
            (Huang et al. 2016, eq. 4).
        skip: False builds the plain net, without shortcuts and their weights.
        options: of blocks (`BlockLayers`), stem and head (`Layers`).

    Shape: (N, in_channels, H, W) -> (N, num_classes); likewise in 1D and 3D.

    Raises:
        ValueError: lists of different lengths, an unknown stem, an option that the block does not take, a block
            without `out_channels`, stages with and without pre-activation; what the blocks raise.
        TypeError: an option that does not exist.
    """

    def __init__(
        self,
        block: Block | Sequence[Block],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        strides: Sequence[Stride] | None = None,
        stem: Stem = "imagenet",
        stem_width: int = 64,
        stem_pool: Layer | Family | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        output_stride: int | None = None,
        drop_path: float = 0.0,
        skip: bool = True,
        **options: Unpack[NetOptions],
    ) -> None:
        check_sequence(depths=depths)
        blocks = block_of_stages(block, len(depths))
        for one in blocks:
            check_block(ResNet, one, options)
        strides = [1] + [2] * (len(depths) - 1) if strides is None else strides
        check_lengths(depths=depths, widths=widths, strides=strides)
        check_stages(depths=depths, widths=widths)
        check_probability(drop_path=drop_path)
        check_flag(skip=skip)
        make = Layers(**layer_options(options))
        preactivated = is_preactivated(blocks)
        stem_module, stem_stride = make_stem(make, stem, in_channels, stem_width, stem_pool, activated=not preactivated)
        each = [one_stride(stride, make.dims, f"strides[{stage}]") for stage, stride in enumerate(strides)]
        plans = plan_stages(each, stem_stride, output_stride)
        drops = iter([drop_path * (number + 1) / sum(depths) for number in range(sum(depths))])
        stages, stage_channels, channels = [], [], stem_width
        for of_stage, depth, width, plan in zip(blocks, depths, widths, plans, strict=True):
            stage = nn.Sequential()
            for stride, first in [(plan.stride, plan.first_dilation)] + [(1, plan.dilation)] * (depth - 1):
                given = asked_options(
                    of_stage, options, skip, next(drops), dilation=plan.dilation, first_dilation=first
                )
                stage.append(make_block(of_stage, channels, width, stride, given))
                channels = cast(int, stage[-1].out_channels)
            stages.append(stage)
            stage_channels.append(channels)
        final = named(norm=make.norm(channels), act=make.activation()) if preactivated else nn.Identity()
        super().__init__(
            stem_module,
            stages,
            final,
            num_classes=num_classes,
            stage_channels=stage_channels,
            stage_strides=[plan.total for plan in plans],
            checkpoint=options.get("checkpoint", False),
        )


class DenseNet(Network):
    """Stem, dense blocks with transitions between them, head (Huang et al. 2017, table 1).

    Args:
        growth_rate: channels that each layer adds, k of the paper.
        depths: number of layers in each dense block.
        stem, stem_pool: as in `ResNet`.
        stem_width: channels that come out of the stem; None is 2 * growth_rate.
        bn_size: width of the 1x1 convolutions in growth rates; None leaves them out (no "-B").
        compression: part of the channels that a transition keeps, theta of the paper; 1 keeps all (no "-C").
        num_classes, in_channels: as in `ResNet`.
        skip: False chains the layers without concatenation.
        memory: what training keeps for backward, "shared", "lean" or "plain"; see `DenseBlock`.
        options: of dense blocks (`BlockLayers`), stem, transitions and head (`Layers`).

    Shape: (N, in_channels, H, W) -> (N, num_classes); likewise in 1D and 3D.

    Raises:
        ValueError: a size below 1, compression outside (0, 1], an option without meaning in a dense block.
        TypeError: an option that does not exist.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        depths: Sequence[int] = (6, 12, 24, 16),
        *,
        stem: Stem = "imagenet",
        stem_width: int | None = None,
        stem_pool: Layer | Family | None = None,
        bn_size: int | None = 4,
        compression: float = 0.5,
        num_classes: int = 1000,
        in_channels: int = 3,
        skip: bool = True,
        memory: Memory = "shared",
        **options: Unpack[NetOptions],
    ) -> None:
        refuse_foreign(DenseNet, [name for name in options if name not in NOT_DENSE], DENSE_OPTIONS)
        check_stages(depths=depths)
        check_positive(growth_rate=growth_rate)
        check_fraction(compression=compression)
        of_layers = layer_options(options)
        make = Layers(**of_layers)
        channels = 2 * growth_rate if stem_width is None else stem_width
        # The first norm of a dense layer follows the CIFAR stem at once, the ImageNet stem only after its pool.
        stem_module, total = make_stem(make, stem, in_channels, channels, stem_pool, activated=stem != "cifar")
        stages, stage_channels, stage_strides = [], [], []
        for number, depth in enumerate(depths):
            transition = None
            if number > 0:
                transition = Transition(channels, max(1, int(channels * compression)), memory=memory, **of_layers)
                channels, total = transition.out_channels, times(total, 2)
            grown = channels + depth * growth_rate
            block = DenseBlock(
                channels, grown, growth_rate=growth_rate, bn_size=bn_size, skip=skip, memory=memory, **options
            )
            channels = block.out_channels
            stages.append(named(transition=transition, block=block))
            stage_channels.append(channels)
            stage_strides.append(total)
        super().__init__(
            stem_module,
            stages,
            named(norm=make.norm(channels), act=make.activation()),
            num_classes=num_classes,
            stage_channels=stage_channels,
            stage_strides=stage_strides,
            checkpoint=options.get("checkpoint", False),
        )


class BaselineCNN(Network):
    """A traditional deep CNN: 3x3 convolutions with activations, max-pooling between stages, no skip (as in VGG).

    Liu and Goh compare with such a net, whose layers are not known to us; these are ours: the convolutions of the plain
    ResNet-18, one in the stem and four in each stage, without batch norm and with pools in place of strides.

    Args:
        depths: number of convolutions in each stage.
        widths: channels that come out of each stage.
        stem, stem_width, num_classes, in_channels: as in `ResNet`.
        options: `Layers` documents them; `norm` is None by default, the traditional net.

    Shape: (N, in_channels, H, W) -> (N, num_classes); likewise in 1D and 3D.
    """

    def __init__(
        self,
        depths: Sequence[int] = (4, 4, 4, 4),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        stem: Stem = "cifar",
        stem_width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        **options: Unpack[LayerOptions],
    ) -> None:
        refuse_foreign(BaselineCNN, options, LAYER_OPTIONS)
        check_stages(depths=depths, widths=widths)
        options.setdefault("norm", None)
        make = Layers(**options)
        stem_module, total = make_stem(make, stem, in_channels, stem_width, None, activated=True)
        stages, channels = [], stem_width
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            layers: dict[str, nn.Module | None] = {"pool": make.build(max_pool, 2) if number > 0 else None}
            for conv in range(1, depth + 1):
                layers[f"conv{conv}"] = make.conv(channels, width, 3)
                layers[f"norm{conv}"] = make.norm(width)
                layers[f"act{conv}"] = make.activation()
                channels = width
            stages.append(named(**layers))
        super().__init__(
            stem_module,
            stages,
            nn.Identity(),
            num_classes=num_classes,
            stage_channels=widths,
            stage_strides=[times(total, 2**number) for number in range(len(depths))],
        )


class StagePlan(NamedTuple):
    """How a stage reduces the resolution: the stride and dilation of its first block, the dilation of the others."""

    stride: Stride
    first_dilation: int
    dilation: int
    total: Stride


def plan_stages(strides: Sequence[Stride], stem_stride: Stride, output_stride: int | None) -> list[StagePlan]:
    """Turn strides into dilations from where the total stride would pass output_stride (as in torchvision)."""
    check_output_stride(output_stride, stem_stride, strides)
    plans, total, dilation = [], stem_stride, 1
    for stride in strides:
        first, further = dilation, times(total, stride)
        if output_stride is not None and cast(int, further) > output_stride:
            dilation, stride = dilation * cast(int, stride), 1
        total = times(total, stride)
        plans.append(StagePlan(stride, first, dilation, total))
    return plans


def check_output_stride(output_stride: object, stem_stride: Stride, strides: Sequence[Stride]) -> None:
    """Raise unless dilations can keep the total stride at output_stride, or it is None."""
    if output_stride is None:
        return
    if tuples := [stride for stride in (stem_stride, *strides) if not isinstance(stride, int)]:
        raise ValueError(f"output_stride must be None where strides differ between dimensions, got strides {tuples}")
    if type(output_stride) is not int or output_stride < cast(int, stem_stride):
        raise ValueError(
            f"output_stride must be an integer of at least the stride of the stem, {stem_stride}, got {output_stride!r}"
        )


def layer_options(options: NetOptions) -> LayerOptions:
    """The part of the options that stems, transitions and heads have too."""
    return cast(LayerOptions, {name: value for name, value in options.items() if name in LAYER_OPTIONS})


def check_stages(**lists: Sequence[int]) -> None:
    """Raise unless the lists have one length of at least 1 and hold integers of at least 1."""
    check_lengths(**lists)
    for name, values in lists.items():
        for stage, value in enumerate(values):
            check_positive(**{f"{name}[{stage}]": value})


def check_lengths(**lists: Sequence[object]) -> None:
    """Raise unless the lists have one length of at least 1."""
    check_sequence(**lists)
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        said = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(lists)} must have one entry for each of at least one stage, got {said}")
