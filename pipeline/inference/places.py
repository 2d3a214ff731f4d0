"""Where pieces of work that ask a model are done: on which device, and with how much of a GPU."""


def check_places(device: str, gpus: float) -> None:
    """ValueError for a device that is none of ours, and for GPUs that make no sense or would be idle."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device is {device!r}; it must be "auto", "cpu" or "cuda"')
    if not 0.0 <= gpus <= 1.0:
        raise ValueError(f"gpus is {gpus}; it must lie in [0, 1]: a model is on one GPU")
    if gpus and device == "cpu":
        raise ValueError(f'gpus is {gpus}, but device is "cpu", which leaves them idle; leave one of them out')
