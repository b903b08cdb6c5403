"""What the training part needs beyond torch comes with the extra `train`; here is the one sentence that says so."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, package: str | None = None, extra: str = "train") -> Any:
    """Import `module`, or say how to install it.

    Raises:
        ImportError: the module is missing; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.split(".")[0]
        raise ImportError(
            f'{name} is needed here and could not be imported: pip install "resblocks[{extra}]"'
        ) from error
