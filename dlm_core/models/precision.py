"""What autocast makes of a product, and how to keep it out of one."""

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products inside run in the dtype of their arguments; nothing to do on a device that has no autocast (meta)."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of products of such tensors: that of autocast where it is on, which leaves float64 alone."""
    has_autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if has_autocast and dtype != torch.float64 else dtype
