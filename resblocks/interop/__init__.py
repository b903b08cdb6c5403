"""Weights, names and files of other libraries and of the Hugging Face Hub, in and out.

The core does not import it, but to word the error for a name that it does not have.
"""

from resblocks.interop.compare import differences
from resblocks.interop.hub import from_pretrained, push_to_hub, save_pretrained
from resblocks.interop.names import TIMM, TIMM_OUT, TORCHVISION
from resblocks.interop.official import pretrained
from resblocks.interop.other_names import NAMES, biased_projection, centred_padding, unstrided_stem
from resblocks.interop.video import FactorisedBlock, factorised_stem, spatial_convolution, video_stem
from resblocks.interop.weights import load, to_timm, to_torchvision, to_vocabulary

__all__ = [
    "NAMES",
    "TIMM",
    "TIMM_OUT",
    "TORCHVISION",
    "FactorisedBlock",
    "biased_projection",
    "centred_padding",
    "differences",
    "factorised_stem",
    "from_pretrained",
    "load",
    "pretrained",
    "push_to_hub",
    "save_pretrained",
    "spatial_convolution",
    "to_timm",
    "to_torchvision",
    "to_vocabulary",
    "unstrided_stem",
    "video_stem",
]
