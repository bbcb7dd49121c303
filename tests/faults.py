"""Stages that die, and stages of several processes: a process that has imported everything forks a child for each and
kills it when told to.

    python -m tests.faults      reads a request, a line of JSON, from standard input and answers with a line

A child costs no imports, so that many can be killed; to the files it is a process like any other.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.console import ROOT, load_script, quiet_libraries, run_stage

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"}
"""Audit events of changes to folders: between two of them lie the moments at which a kill could tear them apart."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit status (negative: the signal; None: it has not ended, but stopped), its process id, what it
    printed, how long it took."""

    status: int | None
    process: int
    output: str
    seconds: float


class Stages:
    """Runs stage scripts in a folder, each in a process of its own."""

    def __enter__(self) -> Stages:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-m", "tests.faults"], env=environment, cwd=ROOT, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=600)

    def run(self, folder: Path, command: Sequence[str], **faults: Any) -> Outcome:
        """`python <command>` in a folder.

        Args:
            folder: Where.
            command: The script and its arguments.
            faults: `kill_after`: kill it with SIGKILL after so many seconds. `kill_at`: it kills itself so, or with the
                signal `kill_with`, just before its k-th change of a folder. `stop_at`: it stops (SIGSTOP) before a change
                of a folder that names this, and is left so; the answer comes as soon as it has stopped. `largest_file`:
                bytes beyond which no file can grow. `memory`: bytes of address space that it may take besides what it
                has. `refused`: number of the error of the system with which it cannot open to write what has this `named` in its
                path. `unprivileged`: give up the right of root to write in spite of file modes. `offline`: it ends with
                status 99 where it makes a socket of a network, or asks for the address of a name.
        """
        (outcome,) = self.run_together(folder, command, [{}], **faults)
        return outcome

    def run_together(self, folder: Path, command: Sequence[str], environments: list, **faults: Any) -> list[Outcome]:
        """`python <command>` in a folder, as many processes at once as there are environments, each with its
        own; `kill_at` and `kill_with` are for the first, and when it is killed the others are, as a launcher does it."""
        request = {"folder": str(folder), "command": [str(word) for word in command], "environments": environments}
        print(json.dumps(request | faults), file=self.server.stdin, flush=True)
        return [Outcome(**outcome) for outcome in json.loads(self.server.stdout.readline())]


def meeting_point() -> dict[str, str]:
    """Where processes find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def torchrun_environments(count: int, nodes: int = 1) -> list[dict[str, str]]:
    """What torchrun tells the processes that it starts, as many on each node."""
    job = {**meeting_point(), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count // nodes)}
    places = [divmod(rank, count // nodes) for rank in range(count)]
    return [{**job, "TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node),
             "SLURM_PROCID": str(nodes - 1 - node)} for rank, (node, local) in enumerate(places)]  # fmt: skip


def srun_environments(count: int, nodes: int = 1) -> list[dict[str, str]]:
    """What srun tells the processes that it starts; the last node has fewer where it does not come out even."""
    per_node = -(-count // nodes)
    job = {
        **meeting_point(),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
    }
    job |= {"SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(count), "SLURM_NTASKS_PER_NODE": str(per_node)}
    places = [divmod(rank, per_node) for rank in range(count)]
    return [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
            for rank, (node, local) in enumerate(places)]  # fmt: skip


def node_environments(nodes: int) -> list[dict[str, str]]:
    """What a user sets on each node where the same command is started by hand."""
    return [{**job, "NODE_RANK": str(node)} for job in [meeting_point()] for node in range(nodes)]


def give_up_override() -> None:
    """Let file modes bind root as they bind everybody (capset without CAP_DAC_OVERRIDE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~(1 << 1)
        libc.capset(header, sets)


def end_on_network(event: str, details: tuple) -> None:
    """An audit hook; an exception could be caught by a library that goes on without."""
    if event == "socket.getaddrinfo" or (event == "socket.__new__" and details[1] != socket.AF_UNIX):
        print(f"{event}: {details}", file=sys.stderr, flush=True)
        os._exit(99)


def child(request: dict, output: int, environment: dict[str, str]) -> None:
    """The stage itself, in the forked process."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(request["folder"])
    script, *arguments = sys.argv[:] = request["command"]
    if environment:
        from pytorch_lightning.utilities import rank_zero_only

        os.environ.update(environment)
        rank_zero_only.rank = int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))  # as its import reads it
    if request.get("largest_file") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request.get("memory") is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + request["memory"],) * 2)
    if request.get("refused"):

        def refuse(event: str, details: tuple) -> None:
            if event == "open" and request["named"] in str(details[0]) and details[2] & (os.O_WRONLY | os.O_RDWR):
                raise OSError(request["refused"], os.strerror(request["refused"]), details[0])

        sys.addaudithook(refuse)
    if request.get("unprivileged"):
        give_up_override()
    if request.get("offline"):
        sys.addaudithook(end_on_network)
    changes, stop_at, kill_at = 0, request.get("stop_at"), request.get("kill_at")

    def watch(event: str, details: tuple) -> None:
        nonlocal changes
        if event in CHANGES:
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), request.get("kill_with", signal.SIGKILL))
            if stop_at and stop_at in str(details):
                os.kill(os.getpid(), signal.SIGSTOP)

    if kill_at or stop_at:
        sys.addaudithook(watch)
    module = load_script(script)
    run_stage(module.main, module.parse_args(arguments))


def fork(request: dict, number: int, environment: dict[str, str]) -> tuple[int, int]:
    """Start a child; its process id, and where its output can be read."""
    request = request | ({"kill_at": None} if number else {})
    reading, output = os.pipe()  # a file would be bound by a limit on file sizes
    process = os.fork()
    if not process:
        status = 1
        try:
            child(request, output, environment)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
            print("" if isinstance(error.code, int) else error, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(output)
    return process, reading


def serve() -> None:
    """Answer requests until standard input ends."""
    quiet_libraries()
    import src.stage_collect
    import src.stage_select  # noqa: F401 what a child would have to import

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        children = [fork(request, *place) for place in enumerate(request["environments"])]
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(children[0][0], signal.SIGKILL)  # not yet waited for, so the number is still its own
        outcomes = []
        for process, reading in children:
            if outcomes and outcomes[0]["status"] == -signal.SIGKILL:
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, os.WUNTRACED if request.get("stop_at") else 0)
            text = os.read(reading, 1 << 20).decode(errors="replace")
            os.close(reading)
            ended = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
            outcomes.append({"status": ended, "process": process, "output": text, "seconds": seconds})
        print(json.dumps(outcomes), file=answers, flush=True)


if __name__ == "__main__":
    serve()
