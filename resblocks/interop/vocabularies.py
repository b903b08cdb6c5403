"""What other libraries call our layers: one table of names for each family of their nets."""

from __future__ import annotations

import re

from resblocks.interop.words import Table

_RESNET: dict[str, str] = {
    "stem.norm": "bn1",
    "stem.pool": "maxpool",
    "stages.{s}.{b}.branch.conv{n}": "layer{s+1}.{b}.conv{n}",
    "stages.{s}.{b}.branch.norm{n}": "layer{s+1}.{b}.bn{n}",
    "head": "fc",
}
_PLAIN_STEM: dict[str, str] = {"stem.conv": "conv1"}
_DEEP_STEM: dict[str, str] = {
    "stem.conv1": "conv1.0",
    "stem.norm1": "conv1.1",
    "stem.conv2": "conv1.3",
    "stem.norm2": "conv1.4",
    "stem.conv": "conv1.6",
    "stem.pool.conv": "maxpool.0",
    "stem.pool.norm": "maxpool.1",
}
_PROJECTION: dict[str, str] = {
    "stages.{s}.{b}.shortcut.conv": "layer{s+1}.{b}.downsample.0",
    "stages.{s}.{b}.shortcut.norm": "layer{s+1}.{b}.downsample.1",
}
_POOLED_PROJECTION: dict[str, str] = {
    "stages.{s}.{b}.shortcut.pool": "layer{s+1}.{b}.downsample.0",
    "stages.{s}.{b}.shortcut.conv": "layer{s+1}.{b}.downsample.1",
    "stages.{s}.{b}.shortcut.norm": "layer{s+1}.{b}.downsample.2",
}
_ATTENTION: dict[str, str] = {
    "stages.{s}.{b}.branch.attention.reduce": "layer{s+1}.{b}.se.fc1",
    "stages.{s}.{b}.branch.attention.expand": "layer{s+1}.{b}.se.fc2",
    "stages.{s}.{b}.branch.attention": "layer{s+1}.{b}.se.conv",
}
_PREACT_RESNET: dict[str, str] = {
    "stem.conv": "stem.conv",
    "stem.pool": "stem.pool",
    "stages.{s}.{b}.preact.norm{n}": "stages.{s}.blocks.{b}.norm{n}",
    "stages.{s}.{b}.branch.norm{n}": "stages.{s}.blocks.{b}.norm{n}",
    "stages.{s}.{b}.branch.conv{n}": "stages.{s}.blocks.{b}.conv{n}",
    "stages.{s}.{b}.shortcut.pool": "stages.{s}.blocks.{b}.downsample.pool",
    "stages.{s}.{b}.shortcut.conv": "stages.{s}.blocks.{b}.downsample.conv",
    "final.norm": "norm",
    "head": "head.fc",
}
_DEEP_PREACT_RESNET: dict[str, str] = {
    **_PREACT_RESNET,
    "stem.conv{n}": "stem.conv{n}",
    "stem.norm{n}": "stem.norm{n}",
    "stem.conv": "stem.conv3",
}
_DENSENET: dict[str, str] = {
    "stem.conv": "features.conv0",
    "stem.norm": "features.norm0",
    "stem.pool": "features.pool0",
    "stages.{s}.block.layer{n}.branch.conv{m}": "features.denseblock{s+1}.denselayer{n}.conv{m}",
    "stages.{s}.block.layer{n}.branch.norm{m}": "features.denseblock{s+1}.denselayer{n}.norm{m}",
    "stages.{s}.transition.conv": "features.transition{s}.conv",
    "stages.{s}.transition.norm": "features.transition{s}.norm",
    "final.norm": "features.norm5",
    "head": "classifier",
}
_DEEP_DENSENET: dict[str, str] = {
    **_DENSENET,
    "stem.conv1": "features.conv0",
    "stem.norm1": "features.norm0",
    "stem.conv2": "features.conv1",
    "stem.norm2": "features.norm1",
    "stem.conv": "features.conv2",
    "stem.norm": "features.norm2",
}
_VIDEO_RESNET: dict[str, str] = {
    "stem.conv": "stem.0",
    "stem.norm": "stem.1",
    "stages.{s}.{b}.branch.conv{n}": "layer{s+1}.{b}.conv{n}.0",
    "stages.{s}.{b}.branch.norm{n}": "layer{s+1}.{b}.conv{n}.1",
    **_PROJECTION,
    "head": "fc",
}
_FACTORISED_RESNET: dict[str, str] = {
    **_VIDEO_RESNET,
    "stem.spatial": "stem.0",
    "stem.spatial_norm": "stem.1",
    "stem.conv": "stem.3",
    "stem.norm": "stem.4",
    "stages.{s}.{b}.branch.spatial{n}": "layer{s+1}.{b}.conv{n}.0.0",
    "stages.{s}.{b}.branch.spatial_norm{n}": "layer{s+1}.{b}.conv{n}.0.1",
    "stages.{s}.{b}.branch.conv{n}": "layer{s+1}.{b}.conv{n}.0.3",
}
_MONAI_DENSENET: dict[str, str] = {
    **_DENSENET,
    "stages.{s}.block.layer{n}.branch.conv{m}": "features.denseblock{s+1}.denselayer{n}.layers.conv{m}",
    "stages.{s}.block.layer{n}.branch.norm{m}": "features.denseblock{s+1}.denselayer{n}.layers.norm{m}",
    "head": "class_layers.out",
}
_CIFAR_REPOSITORIES: dict[str, str] = {
    **_RESNET,
    **_PLAIN_STEM,
    "stages.{s}.{b}.shortcut.conv": "layer{s+1}.{b}.shortcut.0",
    "stages.{s}.{b}.shortcut.norm": "layer{s+1}.{b}.shortcut.1",
    "head": "linear",
}
_DETECTRON: dict[str, str] = {
    "stem.conv": "stem.conv1",
    "stem.norm": "stem.conv1.norm",
    "stem.pool": "stem.pool",
    "stages.{s}.{b}.branch.conv{n}": "res{s+2}.{b}.conv{n}",
    "stages.{s}.{b}.branch.norm{n}": "res{s+2}.{b}.conv{n}.norm",
    "stages.{s}.{b}.shortcut.conv": "res{s+2}.{b}.shortcut",
    "stages.{s}.{b}.shortcut.norm": "res{s+2}.{b}.shortcut.norm",
    "head": "linear",
}
_CV_RESNET: dict[str, str] = {
    "stages.{s}.{b}.branch.conv{n}": "features.stage{s+1}.unit{b+1}.body.conv{n}.conv",
    "stages.{s}.{b}.branch.norm{n}": "features.stage{s+1}.unit{b+1}.body.conv{n}.bn",
    "stages.{s}.{b}.branch.attention.reduce": "features.stage{s+1}.unit{b+1}.se.conv1",
    "stages.{s}.{b}.branch.attention.expand": "features.stage{s+1}.unit{b+1}.se.conv2",
    "stages.{s}.{b}.shortcut.conv": "features.stage{s+1}.unit{b+1}.identity_conv.conv",
    "stages.{s}.{b}.shortcut.norm": "features.stage{s+1}.unit{b+1}.identity_conv.bn",
    "head": "output",
}
_CV_CIFAR_STEM: dict[str, str] = {"stem.conv": "features.init_block.conv", "stem.norm": "features.init_block.bn"}
_CV_STEM: dict[str, str] = {
    "stem.conv": "features.init_block.conv.conv",
    "stem.norm": "features.init_block.conv.bn",
    "stem.pool": "features.init_block.pool",
}
_CV_PREACT: dict[str, str] = {
    **_CV_RESNET,
    "stem.conv": "features.init_block",
    "stages.{s}.{b}.preact.norm{n}": "features.stage{s+1}.unit{b+1}.body.conv{n}.bn",
    "stages.{s}.{b}.shortcut.conv": "features.stage{s+1}.unit{b+1}.identity_conv",
    "final.norm": "features.post_activ.bn",
}
_CV_DENSE: dict[str, str] = {
    "stem.conv": "features.init_block",
    "stages.{s}.transition.conv": "features.stage{s+1}.trans{s+1}.conv.conv",
    "stages.{s}.transition.norm": "features.stage{s+1}.trans{s+1}.conv.bn",
    "final.norm": "features.post_activ.bn",
    "head": "output",
}
_CV_PLAIN_DENSENET: dict[str, str] = {
    **_CV_DENSE,
    "stages.{s}.block.layer{n}.branch.conv2": "features.stage{s+1}.unit{n}.conv.conv",
    "stages.{s}.block.layer{n}.branch.norm1": "features.stage{s+1}.unit{n}.conv.bn",
}
_CV_CIFAR_DENSENET: dict[str, str] = {
    **_CV_DENSE,
    "stages.{s}.block.layer{n}.branch.conv{m}": "features.stage{s+1}.unit{n}.conv{m}.conv",
    "stages.{s}.block.layer{n}.branch.norm{m}": "features.stage{s+1}.unit{n}.conv{m}.bn",
}
_CV_DENSENET: dict[str, str] = {
    **_CV_CIFAR_DENSENET,
    "stem.conv": "features.init_block.conv",
    "stem.norm": "features.init_block.bn",
    "stem.pool": "features.init_block.pool",
}
_HF_BASE: dict[str, str] = {
    "stem.conv": "embedder.embedder.convolution",
    "stem.norm": "embedder.embedder.normalization",
    "stem.pool": "embedder.pooler",
    "stages.{s}.{b}.branch.conv{n}": "encoder.stages.{s}.layers.{b}.layer.{n-1}.convolution",
    "stages.{s}.{b}.branch.norm{n}": "encoder.stages.{s}.layers.{b}.layer.{n-1}.normalization",
    "stages.{s}.{b}.shortcut.conv": "encoder.stages.{s}.layers.{b}.shortcut.convolution",
    "stages.{s}.{b}.shortcut.norm": "encoder.stages.{s}.layers.{b}.shortcut.normalization",
}
_HF_RESNET: dict[str, str] = {**{ours: f"resnet.{theirs}" for ours, theirs in _HF_BASE.items()}, "head": "classifier.1"}

# Of each library its tables in the order of trying: a net is named by the first that has a name for each of its layers.
VOCABULARIES: dict[str, tuple[Table, ...]] = {
    "torchvision": (_RESNET | _PLAIN_STEM | _PROJECTION, _DENSENET),
    "torchvision.video": (_VIDEO_RESNET, _FACTORISED_RESNET),
    "timm": (
        _RESNET | _PLAIN_STEM | _PROJECTION | _ATTENTION,
        _RESNET | _PLAIN_STEM | _POOLED_PROJECTION | _ATTENTION,
        _RESNET | _DEEP_STEM | _PROJECTION | _ATTENTION,
        _RESNET | _DEEP_STEM | _POOLED_PROJECTION | _ATTENTION,
        _PREACT_RESNET,
        _DEEP_PREACT_RESNET,
        _DENSENET,
        _DEEP_DENSENET,
    ),
    "transformers": (_HF_BASE, _HF_RESNET),
    "monai": (_RESNET | _PLAIN_STEM | _PROJECTION, _MONAI_DENSENET),
    "pytorchcv": (
        _CV_RESNET | _CV_CIFAR_STEM,
        _CV_RESNET | _CV_STEM,
        _CV_PREACT,
        _CV_PLAIN_DENSENET,
        _CV_CIFAR_DENSENET,
        _CV_DENSENET,
    ),
    "detectron2": (_DETECTRON, {**_DETECTRON, "head": "stem.fc"}),  # the second in what its converter writes
    # kuangliu/pytorch-cifar and akamaster/pytorch_resnet_cifar10, and the many that took theirs over.
    "pytorch-cifar": (_CIFAR_REPOSITORIES,),
}

# Linear layers of ours that are 1x1 convolutions elsewhere.
POINTWISE = re.compile(r"(.*\.se\.(fc|conv)[12]|head\.fc)\.weight")
