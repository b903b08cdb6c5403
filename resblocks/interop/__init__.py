"""Weights, names and files of torchvision, timm and the Hugging Face Hub, in and out.

The core does not import it, but to word the error for a name that it does not have.
"""

from resblocks.interop.compare import differences
from resblocks.interop.hub import from_pretrained, push_to_hub, save_pretrained
from resblocks.interop.names import TIMM, TIMM_OUT, TORCHVISION
from resblocks.interop.weights import load, pretrained, to_timm, to_torchvision

__all__ = [
    "TIMM",
    "TIMM_OUT",
    "TORCHVISION",
    "differences",
    "from_pretrained",
    "load",
    "pretrained",
    "push_to_hub",
    "save_pretrained",
    "to_timm",
    "to_torchvision",
]
