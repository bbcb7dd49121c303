"""Several processes, on one machine or on many: which one this is, and waiting for the others.

Processes are started by Lightning, or by torchrun or SLURM as Lightning understands them; they share a file system and
reach each other over the network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from src.cli import Hardware


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them.

    `wait` returns when all have called it; `from_first(value)` is the first's value in all that call it.
    """

    rank: int
    world: int
    device: str
    wait: Callable[[], None]
    from_first: Callable[[Any], Any] = lambda value: value
    mesh: DeviceMesh | None = None
    """Where weights are spread over the processes, the processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def launch(hardware: Hardware) -> Processes:
    """Start the processes that the hardware flags ask for, this one among them; only the first prints from then on.

    Under the "ddp" launcher the others run the same command again from its beginning.
    """
    if hardware.num_processes == 1:
        return Processes(0, 1, hardware.device, lambda: None)
    from lightning_fabric import Fabric

    # each process has its own samples, so that no gradient is synchronised: "ddp" names the launcher only
    fabric = Fabric(
        accelerator=hardware.accelerator, devices=hardware.devices, strategy="ddp", num_nodes=hardware.num_nodes
    )
    fabric.launch()
    if fabric.global_rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 for the rest of the process
    mesh = None
    if hardware.strategy == "fsdp":
        mesh = init_device_mesh(hardware.accelerator, (fabric.world_size,))
    return Processes(fabric.global_rank, fabric.world_size, str(fabric.device), fabric.barrier, fabric.broadcast, mesh)
