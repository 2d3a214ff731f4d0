"""What a GPU can do and hold at most."""

import re
from dataclasses import dataclass

from pipeline.errors import UserError

_WITH_SPARSITY = {
    "H100": 1979.0,  # https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306, as the next two
    "H100 PCIe": 1513.0,
    "H100 NVL": 1671.0,
    "H200": 1979.0,  # https://www.nvidia.com/en-us/data-center/h200/, as the next
    "H200 NVL": 1671.0,
    "B200": 4500.0,  # https://resources.nvidia.com/en-us-blackwell-architecture, in an HGX
}
"""What the data sheets say of bfloat16: of matrices half of which is zeros in a pattern."""
PEAK_TFLOPS = {
    "A100": 312.0,  # https://www.nvidia.com/en-us/data-center/a100/, SXM and PCIe alike
    **{name: tflops / 2 for name, tflops in _WITH_SPARSITY.items()},
}
"""10^12 dense bfloat16 operations a second, by what the driver's name of the GPU says of it; without a word, SXM."""
MEMORY_GB = {
    "A100": 80,
    "H100": 80,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H200": 141,
    "H200 NVL": 141,
    "B200": 180,
}
"""Of the same data sheets, of the larger A100; 10^9 bytes, some percent less than the driver counts: room for its own
needs."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?GB", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    peak_flops: float
    """Dense bfloat16 operations a second; 0 where they are not known."""
    memory_bytes: int


def find_gpu(name: str) -> Gpu:
    """The GPU of that name in any case, with "-" for a space, or any of so many GB; UserError otherwise."""
    if (size := _SIZE.fullmatch(name.strip())) is not None and float(size[1]) > 0:
        return Gpu(f"{float(size[1]):g} GB GPU", 0.0, round(float(size[1]) * 10**9))
    known = {key.lower().replace(" ", "-"): key for key in PEAK_TFLOPS}
    key = known.get(name.lower().replace(" ", "-"))
    if key is None:
        raise UserError(
            f"GPU {name!r} is not known; take one of {', '.join(known)}, or for another one its memory, as in 48GB "
            "(of 10^9 bytes)"
        )
    return Gpu(key, PEAK_TFLOPS[key] * 1e12, MEMORY_GB[key] * 10**9)


def peak_tflops(device_name: str) -> float:
    """The peak of a GPU in 10^12 dense bfloat16 operations a second; 0 for one that is unknown, or a slice of one."""
    if re.search(r"\bMIG\b", device_name):
        return 0.0
    named = [name for name in PEAK_TFLOPS if all(re.search(rf"\b{word}\b", device_name) for word in name.split())]
    return PEAK_TFLOPS[max(named, key=len)] if named else 0.0
