"""Which device and which precision: what was asked for, or an error; "auto" is what fits the hardware."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile


def pick_compile_mode(compile: bool, mode: str) -> str | None:
    """The mode of torch.compile, or None for a net that runs as it is.

    Raises:
        ValueError: the mode does not exist or would not be used.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile_mode must be one of {', '.join(COMPILE_MODES)}, got {mode!r}")
    if mode != "default" and not compile:
        raise ValueError(f"compile_mode must be default without compile=True, got {mode!r}")
    return mode if compile else None


def pick_device(device: str = "auto", local_rank: int = 0) -> torch.device:
    """ "auto" is a GPU where there is one and the CPU elsewhere.

    Raises:
        ValueError: another kind of device, on which training was never run.
        RuntimeError: a GPU was asked for and is not there: training never falls back to the CPU in silence.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = torch.device("meta")
    if picked.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1, ..., got {device!r}")
    if picked.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(device.partition(":")[2] or local_rank)
        picked = torch.device("cuda", index)
        if index >= count:
            raise RuntimeError(
                f"device {device} was asked for, but there are {count} CUDA devices: "
                f"take --device cpu or auto, or check the driver"
            )
    return picked


def current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one for a while: the one whose seeds, streams, events and graphs torch takes."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def cudnn_search(deterministic: bool) -> Iterator[None]:
    """Let cuDNN take the fastest of its convolutions, or the deterministic ones.

    `torch.backends.cudnn.flags` would also switch TF32 on, whatever the user chose.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def has_fast_bfloat16(device: torch.device) -> bool:
    """True where the hardware multiplies in bfloat16; emulated, it is correct and many times slower than float32."""
    if device.type == "cuda":
        with current_device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # oneDNN reports support for AVX512 alone, which emulates
        return _processor_has("avx512_bf16") or has_matrix_tiles()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return bool(supported())


def has_matrix_tiles() -> bool:
    """True where the processor multiplies small matrices at once (AMX): products then run far ahead of convolutions."""
    return _processor_has("amx_tile")


def _processor_has(feature: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch had no memory left, on a GPU or on the CPU."""
    signs = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type: "float32", "bfloat16", or "auto", bfloat16 where the hardware has it.

    Raises:
        ValueError: no such precision.
    """
    if precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto, {' or '.join(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]
