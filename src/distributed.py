"""Devices and processes: what this machine has, which process this is, and waiting for the others.

Processes are started by Lightning, or by torchrun or SLURM as Lightning understands them; they share a file system.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from src.config import HardwareConfig


def is_first_process() -> bool:
    """Whether this process speaks and writes for all: a launcher numbers the others in their environment. torchrun's number
    is of all processes, and need not go as srun's, which may have started torchrun on each node."""
    names = ("RANK",) if os.environ.get("RANK") else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return not any(int(os.environ.get(name) or 0) for name in names)


PRECISIONS = {"32-true": "32", "16-mixed": "16", "bf16-mixed": "bf16", "bf16-true": "bf16", "16-true": "bf16"}
"""Lightning's name of a precision -> ours."""


@dataclass(frozen=True)
class Hardware:
    """Resolved hardware flags: what Lightning's Trainer takes."""

    accelerator: str
    devices: list[int] | int
    strategy: str
    precision: str
    num_nodes: int

    @property
    def device(self) -> str:
        """This process's device, for work outside a Trainer."""
        if not isinstance(self.devices, list):
            return "cpu"
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0
        return f"cuda:{self.devices[int(local) % len(self.devices)]}"  # srun: each process has its own alone

    @property
    def num_processes(self) -> int:
        """On all nodes together."""
        return (len(self.devices) if isinstance(self.devices, list) else self.devices) * self.num_nodes

    @property
    def autocast(self) -> str | None:
        """dtype name of mixed precision outside a Trainer, or None."""
        return {"16-mixed": "float16", "bf16-mixed": "bfloat16"}.get(self.precision)


def resolve_hardware(config: HardwareConfig, say: Callable[[str], None]) -> Hardware:
    """Resolve hardware flags against what the machine has; notices go to `say`. Under torchrun or srun the number of
    processes is theirs.

    Raises:
        ValueError: a GPU was asked for that is not there, or as many devices as the launcher did not start.
    """
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.accelerator == "cuda" and not available:
        raise ValueError("--accelerator cuda: this machine has no CUDA GPU; leave the flag out to run on the CPU")
    devices, num_nodes = list(config.devices or ()), config.num_nodes
    outside = started_from_outside()
    if outside:
        per_node, num_nodes = outside
        devices = devices or list(range(per_node))
        if len(devices) != per_node:
            raise ValueError(
                f"--devices {' '.join(map(str, devices))}: the launcher started {per_node} processes on this node, one "
                "for each device; start as many as there are devices, or leave the flag out"
            )
        if cluster():  # --gpus-per-task gives each process one GPU of its own, which it sees as number 0
            local, num_nodes = int(os.environ["SLURM_LOCALID"]), int(os.environ["SLURM_NTASKS"])
            devices = [local % max(1, available) if config.devices is None else devices[local % per_node]]
    bits = PRECISIONS.get(config.precision, config.precision)
    if config.accelerator == "cpu" or not available:
        processes = len(devices) if devices and (config.accelerator == "cpu" or outside) else 1
        if config.accelerator != "cpu":
            say("No CUDA GPU here: everything runs on the CPU" + (", in 32-bit" if bits == "16" else "") + ".")
        elif bits == "16":
            say("note: --precision 16 is for a GPU: the CPU computes in 32 bits")
        precision = {"32": "32-true", "16": "32-true", "bf16": "bf16-mixed"}[bits]
        return Hardware("cpu", processes, config.strategy, precision, num_nodes)
    devices = devices or [0]
    if wrong := [device for device in devices if not 0 <= device < available]:
        raise ValueError(f"--devices {wrong[0]}: this machine has GPUs 0 to {available - 1}")
    precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}[bits]
    if config.strategy == "fsdp" and bits == "16":
        say("note: --strategy fsdp has no loss scaling, which 16 bits need: --precision bf16 is taken.")
        precision = "bf16-mixed"
    return Hardware("cuda", devices, config.strategy, precision, num_nodes)


def started_from_outside() -> tuple[int, int] | None:
    """Processes on this node and number of nodes, where torchrun or srun started this process; else None."""
    if not {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & set(os.environ):  # what Lightning, slow to import, looks at
        return None
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return per_node, int(os.environ["WORLD_SIZE"]) // per_node
    if SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return tasks // nodes, nodes
    return None


def cluster() -> list[Any]:
    """What Lightning is told as `plugins`: that a process of srun has one device, as if it were alone on its node. It would
    otherwise want every process to see all the devices of its node, and each node to have as many processes."""
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    class OneDevice(SLURMEnvironment):
        def local_rank(self) -> int:
            return 0

        def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...

    return [OneDevice(auto_requeue=False)] if started_from_outside() and not TorchElasticEnvironment.detect() else []


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them; `wait` returns when all have called it, `from_first(value)` is the first's."""

    rank: int
    world: int
    device: str
    wait: Callable[[], None]
    from_first: Callable[[Any], Any] = lambda value: value
    mesh: DeviceMesh | None = None
    """Where weights are spread over the processes, the processes."""

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


def launch(hardware: Hardware) -> Processes:
    """Start the processes that the hardware flags ask for, this one among them; only the first prints from then on."""
    if hardware.num_processes == 1:
        return Processes(0, 1, hardware.device, lambda: None)
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import init_device_mesh

    # each process has its own samples, so that no gradient is synchronised: "ddp" names the launcher only, which runs
    # this command again from its beginning in every other process
    machine = {"accelerator": hardware.accelerator, "devices": hardware.devices, "num_nodes": hardware.num_nodes}
    fabric = Fabric(strategy="ddp", plugins=cluster(), **machine)
    fabric.launch()
    if fabric.global_rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 for the rest of the process
    mesh = None
    if hardware.strategy == "fsdp":
        mesh = init_device_mesh(hardware.accelerator, (fabric.world_size,))
    return Processes(fabric.global_rank, fabric.world_size, str(fabric.device), fabric.barrier, fabric.broadcast, mesh)
