"""Nets on the Hugging Face Hub: weights as safetensors, config.json by `to_config`, through the hub's own mixin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from resblocks.config import from_config, to_config
from resblocks.interop.weights import load
from resblocks.nets import Network


def save_pretrained(net: Network, folder: str | Path, **options: Any) -> None:
    """Write model.safetensors, config.json and a model card into a folder.

    Args:
        net: whose constructor's arguments have importable names, and which is as the constructor made it.
        folder: made if it is not there.
        options: of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`: repo_id, push_to_hub, ...

    Raises:
        ValueError: a net without a config, as `to_config` says: fused, frozen, switched, ...
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    config = to_config(net)
    _hub_net()(**config, module=net).save_pretrained(folder, config=config, **options)


def push_to_hub(net: Network, repo_id: str, **options: Any) -> str:
    """Upload to the Hub what `save_pretrained` writes, and return the address of the commit.

    Args:
        repo_id: "user/name".
        options: of `huggingface_hub.PyTorchModelHubMixin.push_to_hub`: private, token, commit_message, ...

    Raises: as `save_pretrained`.
    """
    config = to_config(net)
    url: str = _hub_net()(**config, module=net).push_to_hub(repo_id, config=config, **options)
    return url


def from_pretrained(source: str | Path, *, trust: Sequence[str] = (), **options: Any) -> Network:
    """The net of a folder or a repository of the Hub, in evaluation mode, its weights checked as by `load`.

    Args:
        source: folder, or "user/name".
        trust: modules of your own whose names the config may hold; see `resblocks.config.from_config`.
        options: of `huggingface_hub.PyTorchModelHubMixin.from_pretrained`: revision, token, cache_dir, ...

    Raises:
        ValueError: no config.json of ours, a config with names from elsewhere, weights that do not fit.
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    net: Network = _hub_net().from_pretrained(source, trust=tuple(trust), **options).module
    return net


@cache
def _hub_net() -> Any:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the Hub needs its client: pip install 'resblocks[hub]' ({error})") from error

    class HubNet(nn.Module, PyTorchModelHubMixin, library_name="resblocks"):
        """What the mixin saves and loads: a net under the name `module`, whose keys it writes without that prefix."""

        def __init__(
            self,
            name: str = "",
            args: Sequence[Any] = (),
            options: dict[str, Any] | None = None,
            module: nn.Module | None = None,
            trust: tuple[str, ...] = (),
        ) -> None:
            super().__init__()
            if not name or not isinstance(options, dict) or not (module is None or isinstance(module, nn.Module)):
                raise ValueError("source must have a config.json of resblocks beside its weights, or use `load`")
            config = {"name": name, "args": args, "options": options}
            self.module = from_config(config, trust=trust) if module is None else module

        @classmethod
        def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
            load(model.module, model_file, vocabulary="resblocks")
            return model.to(map_location).eval()

        _load_as_pickle = _load_as_safetensor  # the mixin's own lets a file without any of the net's names pass

    return HubNet
