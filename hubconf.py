"""Entry points of torch.hub: every named net of `resblocks.list_models()`.

net = torch.hub.load("OWNER/resblocks", "resnet18", num_classes=10)
net = torch.hub.load("OWNER/resblocks", "resnet50", pretrained=True)
"""

from collections.abc import Callable
from typing import Any

from resblocks import Network, create_model, list_models

dependencies = ["torch", "einops", "typing_extensions"]


def _entry(name: str) -> Callable[..., Network]:
    def build(pretrained: bool = False, **options: Any) -> Network:
        if not pretrained:
            return create_model(name, **options)
        from resblocks.interop import pretrained as official

        return official(name, **options)

    build.__name__ = name
    build.__doc__ = (
        f"Build {name}. Options are those of `resblocks.create_model`; `pretrained=True` takes torchvision's weights."
    )
    return build


globals().update({_name: _entry(_name) for _name in list_models()})
