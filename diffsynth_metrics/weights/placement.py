"""One network over several devices, by accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

__all__ = [
    "DeviceMap",
    "check_device_map",
    "choose_device",
    "choose_dtype",
    "dispatch",
    "execution_device",
]

DeviceMap: TypeAlias = "str | Mapping[str, int | str | torch.device]"
"""``"auto"`` and the like, one device, or parts of the network to devices, as in transformers."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def dispatch(model: Any, device_map: DeviceMap, dtype: torch.dtype) -> nn.Module:
    """Distribute the parts of a network over devices, as transformers' ``from_pretrained`` does.

    Args:
        model: A network on the CPU; its ``_no_split_modules`` names the classes that stay whole.
        device_map: A strategy (``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``), a
            device, or names of modules to devices. Beside a GPU, parts on ``"cpu"`` are offloaded: they
            are copied to the GPU for each pass.
        dtype: Dtype of most weights, by which a strategy estimates what fits.

    Raises:
        ValueError: A part is mapped to the disk, or a module is not mapped at all.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if device_map in _STRATEGIES:
        whole = list(model._no_split_modules)
        limits = None
        if device_map != "sequential":
            limits = get_balanced_memory(
                model,
                dtype=dtype,
                no_split_module_classes=whole,
                low_zero=device_map == "balanced_low_0",
            )
        devices = infer_auto_device_map(
            model, max_memory=limits, dtype=dtype, no_split_module_classes=whole
        )
    else:
        devices = _devices(device_map)
    _refuse_disk(devices)
    dispatched: nn.Module = dispatch_model(model, device_map=devices)
    return dispatched


def check_device_map(device_map: DeviceMap | None) -> None:
    """Check what can be checked without the network, which may have to be fetched first.

    Raises:
        TypeError: It is neither a str nor a mapping.
        ValueError: A part is mapped to the disk.
        RuntimeError: torch does not know a device, or it is not there.
    """
    if device_map is None or device_map in _STRATEGIES:
        return
    if not isinstance(device_map, (str, Mapping)):
        raise TypeError(
            f"device_map must be a str or map modules to devices, got {type(device_map).__name__}"
        )
    devices = _devices(device_map)
    _refuse_disk(devices)
    for device in devices.values():
        choose_device(device if isinstance(device, (str, torch.device)) else torch.device(device))


def execution_device(model: nn.Module) -> torch.device:
    """Return the device that a network takes its inputs on; its first weights may be offloaded."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device, or for None the best one that torch reports.

    Raises:
        RuntimeError: torch does not know the device, or it is not there.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:  # each torch's, by backend
            raise RuntimeError(f"the device {str(device)!r} cannot be used: {error}") from error
        return torch.device(device)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def choose_dtype(torch_dtype: torch.dtype | None, official: torch.dtype) -> torch.dtype:
    """Return the dtype of the towers, or for None the official one.

    Raises:
        TypeError: It is not a dtype that networks run in.
    """
    if torch_dtype is None:
        return official
    if torch_dtype not in _DTYPES:
        raise TypeError(
            f"torch_dtype must be one of {', '.join(map(str, _DTYPES))}, got {torch_dtype!r}; by "
            "position it comes before device, as in diffsynth.metrics"
        )
    return torch_dtype


def _devices(device_map: DeviceMap) -> dict[str, Any]:
    return {"": device_map} if isinstance(device_map, str) else dict(device_map)


def _refuse_disk(devices: Mapping[str, Any]) -> None:
    if disk := sorted(name or "the network" for name, device in devices.items() if device == "disk"):
        raise ValueError(
            "Map these parts to a device or to 'cpu', or give a strategy more devices: device_map puts "
            f"{', '.join(disk)} on the disk, which is not supported"
        )
