"""How the ranks of a gang reach each other: over the address that their node has in the Ray cluster.

Left alone, gloo takes the address that the name of the host stands for, which many systems say is 127.0.0.1.
"""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_VARIABLE = "GLOO_SOCKET_IFNAME"


def use_node_address() -> None:
    """Name the network interface with the node's address in this process's environment, unless one is named."""
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault(_VARIABLE, interface)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_node_address)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeAddressConfig(TorchConfig):
    """TorchConfig whose ranks meet over the addresses of their nodes."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the process group up."""
        return _Backend
