"""A device without one: tensors on "meta" stand for it, and whatever makes the host wait for it is written down."""

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class Waits(TorchDispatchMode):
    """While it is entered, ``found`` gets a line of our code for each number read and tensor sent or fetched.

    What is read is ``number``, or True.  What depends on more (``nonzero``, a boolean index) raises by itself.
    """

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.number = number
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first, of_device = args[0] if args else None, [a.device == DEVICE for a in args if isinstance(a, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and of_device == [True]:
            self._write_down()
            return True if first.dtype == torch.bool else self.number
        if func is torch.ops.aten._to_copy.default:
            to = torch.device(kwargs.get("device") or first.device)
            if (to == DEVICE) != of_device[0]:
                self._write_down()
            if to != DEVICE and of_device[0]:
                return torch.full(first.shape, self.number, dtype=kwargs.get("dtype") or first.dtype)
        if func is torch.ops.aten.copy_.default and len(set(of_device)) == 2:
            self._write_down()
        return func(*args, **kwargs)

    def _write_down(self) -> None:
        ours = [frame for frame in traceback.extract_stack() if "dlm_core" in frame.filename]
        self.found.append(f"{ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}" if ours else "outside dlm_core")
