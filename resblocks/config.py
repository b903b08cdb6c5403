"""A net as plain JSON: the call that builds it, with classes and functions said by the name they are imported by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
from torch import nn

from resblocks.layers import batch_norm
from resblocks.residual import Residual
from resblocks.undisturbed import unwrapped

# Where the names of a config may come from: what is imported from there builds nets and does nothing else.
MODULES = tuple(
    f"resblocks.{module}"
    for module in (
        "nets",
        "blocks",
        "layers",
        "attention",
        "joins",
        "shortcuts",
        "interop.names",
        "interop.other_names",
        "interop.video",
    )
)


def to_config(net: nn.Module) -> dict[str, Any]:
    """The call that builds a net, as plain JSON; `from_config` makes it.

    It holds the arguments of the constructor, with the head that the net has now. The net may be inside the wrappers of
    `torch.compile`, of data-parallel training and of weight averaging.

    Raises:
        ValueError: no net of resblocks; an argument without an importable name, such as a lambda; a head that
            `reset_head` did not make; a net that was changed otherwise, which the call would not build: layers
            replaced, fused or frozen, skips switched.

    Example:
        >>> from resblocks import create_model
        >>> to_config(create_model("resnet20", num_classes=7))["options"]["num_classes"]
        7
    """
    net = unwrapped(net)
    if "built_by" not in vars(net):
        raise ValueError(f"net must be made by a class of resblocks.nets or of its kind, got {type(net).__name__}")
    call: dict[str, Any] = vars(net)["built_by"]
    if unsaid := nameless(call):
        raise ValueError(f"config needs arguments that can be imported by name, got {', '.join(unsaid)}")
    head: Any = net.head
    outputs = 0 if isinstance(head, nn.Identity) else getattr(head, "out_features", None)
    if outputs != net.num_classes:
        raise ValueError(f"config needs a head that reset_head made, with {net.num_classes} outputs, got {head}")
    if outputs != net.built_classes:
        call = with_option(call, type(net), "num_classes", outputs)
    check_built(net, call)
    return call


def from_config(config: dict[str, Any], *, trust: Sequence[str] = ()) -> Any:
    """Build the net of a config again, with weights drawn anew.

    Args:
        config: of a net, by `to_config`.
        trust: modules of your own, whose names the config may hold; a config from a stranger could else run anything.

    Raises:
        ValueError: no config of a net, a name from elsewhere than resblocks, torch.nn or `trust`, or one that is not
            there.

    Example:
        >>> from resblocks import create_model
        >>> net = create_model("resnet20", num_classes=7)
        >>> from_config(to_config(net)).num_classes
        7
    """
    given: Any = config
    if not (isinstance(given, dict) and {"name", "args", "options"} <= given.keys()):
        raise ValueError(f"config must be a dict of name, args and options, as to_config makes it, got {config!r:.200}")
    if isinstance(trust, str):
        raise ValueError(f"trust must be a list of modules, got {trust!r}")
    net = _value(config, tuple(trust))()
    if not isinstance(net, nn.Module):
        raise ValueError(f"config must be of a net, got {config['name']!r}, which makes {type(net).__name__}")
    return net


def plain(value: Any) -> Any:
    """A call or one of its arguments as plain JSON.

    A class or function is `{"name": "resblocks.blocks:Bottleneck"}`, a partial has "args" and "options" besides, and
    what has no importable name (a lambda, a module that is already made) is `{"nameless": ...}` with its repr.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, partial):
        options = {name: plain(option) for name, option in value.keywords.items()}
        return {**_name(value.func), "args": [plain(item) for item in value.args], "options": options}
    return _name(value)


def recorded(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that keeps the call of the outermost class, arguments as plain JSON."""

    @wraps(init)
    def record(self: nn.Module, *args: Any, **options: Any) -> None:
        if "built_by" not in self.__dict__:
            # Where a net is made is no part of what it is.
            said = {name: option for name, option in options.items() if name != "device"}
            self.__dict__["built_by"] = plain(partial(type(self), *args, **said))
        init(self, *args, **options)

    return record


def with_option(config: dict[str, Any], made: type, name: str, value: Any) -> dict[str, Any]:
    """A config with another value for an option, wherever the call gave it.

    Raises:
        ValueError: what it makes does not take the option.
    """
    args, options = list(config["args"]), dict(config["options"])
    taken = inspect.signature(made).parameters
    if name not in taken and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise ValueError(f"config needs a constructor with {name} to say {name}={value!r}, {made.__name__} has none")
    if name in [*taken][: len(args)]:
        args[[*taken].index(name)] = value
    else:
        options[name] = value
    return {**config, "args": args, "options": options}


def check_built(net: nn.Module, config: dict[str, Any]) -> None:
    """Raise unless the net has the layers, the settings and the switches of the one that its config builds.

    Weights are not compared, nor how a norm gathers its statistics in training (`nn.SyncBatchNorm`).

    Raises:
        ValueError: something was changed after construction; the message names the first part that differs.
    """
    parts, built = (dict(one.named_modules(remove_duplicate=False)) for one in (net, _on_meta(config)))
    for name in [*parts, *built]:
        here, there = parts.get(name), built.get(name)
        if here is None or there is None or _setting(here) != _setting(there):
            raise ValueError(
                f"config needs a net that is as it was built, but at {name or 'its root'} it has {_in_words(here)}, "
                f"and its call builds {_in_words(there)}: build it so, or keep the module itself by torch.save"
            )


def _on_meta(config: dict[str, Any]) -> nn.Module:
    """The net of a config that was made here; without memory, unless a constructor reads values of tensors."""
    trust = tuple({name.partition(":")[0] for name in _names(config)})
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                net: nn.Module = from_config(config, trust=trust)
        except (NotImplementedError, RuntimeError):
            net = from_config(config, trust=trust)
    return net


def _names(config: Any) -> list[str]:
    if isinstance(config, dict):
        own = [config["name"]] if isinstance(config.get("name"), str) else []
        return own + _names(list(config.values()))
    return [name for part in config for name in _names(part)] if isinstance(config, list) else []


def _setting(module: nn.Module) -> tuple[type, str, bool]:
    kind = nn.SyncBatchNorm if type(module) in batch_norm else type(module)
    return kind, module.extra_repr(), isinstance(module, Residual) and module.skip


def _in_words(module: nn.Module | None) -> str:
    if module is None:
        return "nothing"
    switch = f" with skip={module.skip}" if isinstance(module, Residual) else ""
    return f"{type(module).__name__}({module.extra_repr()}){switch}"


def nameless(config: Any) -> list[str]:
    """What of a config has no importable name, as repr."""
    if isinstance(config, list):
        return [found for item in config for found in nameless(item)]
    if isinstance(config, dict):
        parts = [*config.get("args", []), *config.get("options", {}).values()]
        return ([config["nameless"]] if "nameless" in config else []) + nameless(parts)
    return []


def _name(value: Any) -> dict[str, Any]:
    if isinstance(value, torch.dtype):
        return {"name": str(value).replace(".", ":")}
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str):
        try:
            if _find(module, name) is value:
                return {"name": f"{module}:{name}"}
        except (ImportError, AttributeError):
            pass
    return {"nameless": repr(value)}


def _value(config: Any, trust: tuple[str, ...]) -> Any:
    if isinstance(config, list):
        return tuple(_value(item, trust) for item in config)
    if not isinstance(config, dict):
        return config
    if "nameless" in config:
        raise ValueError(f"config must hold importable names only, got {config['nameless']}")
    if not isinstance(config.get("name"), str):
        raise ValueError(f"config must give a name in each dict, got {config!r:.200}")
    found = _trusted(config["name"], trust)
    if "options" not in config:
        return found
    options = {name: _value(option, trust) for name, option in config["options"].items()}
    return partial(found, *[_value(item, trust) for item in config["args"]], **options)


def _trusted(full_name: str, trust: tuple[str, ...]) -> Any:
    module, _, name = full_name.partition(":")
    builders = (*MODULES, *trust)
    if module in builders or module.startswith("torch.nn.modules.") or module == "torch":
        try:
            found = _find(module, name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"config must hold names that can be imported, got {full_name!r} ({error})") from error
        own = getattr(found, "__module__", None) == module
        is_layer = isinstance(found, type) and issubclass(found, nn.Module)
        if isinstance(found, torch.dtype) or (own and (module in builders or is_layer)):
            return found
    raise ValueError(
        f"config must hold names of resblocks or torch.nn, or of modules given in trust, got {full_name!r}; "
        f"read the config before you trust it"
    )


def _find(module: str, name: str) -> Any:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
