"""The terminal interface of the scripts: parser, progress bars, notices, one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import gc
import importlib.util
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from src.distributed import is_first_process

ROOT = Path(__file__).resolve().parents[1]
LOG_INTERVAL_SECONDS = 15.0
"""How often a progress bar writes a line when nobody watches it move."""
SHOWN_AFTER_SECONDS = 2.0
"""What ends sooner shows no progress bar."""


class Parser(argparse.ArgumentParser):
    """A parser whose help is the script's docstring; `positionals` stands before the flags in the line of usage."""

    def __init__(self, doc: str | None, positionals: str = "") -> None:
        prog = (_typed or sys.argv)[0]
        usage = " ".join(filter(None, ["python", prog, positionals, "[flags]"]))
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110)
        super().__init__(prog=prog, usage=usage, description=doc, formatter_class=layout, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; refuse unknown flags and suggest the nearest known ones."""
        parsed, strangers = self.parse_known_args(args, namespace)
        if strangers:
            known = [name for action in self._actions for name in action.option_strings]
            flags = [word.partition("=")[0] for word in strangers if word.startswith("-")]
            meant = [name for flag in flags for name in difflib.get_close_matches(flag, known, n=1)]
            guess = f"; did you mean {' '.join(meant)}?" if meant else ""
            self.error(f"unrecognized arguments: {' '.join(strangers)}{guess}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.format_usage().strip()}   (all flags: --help)\nerror: {message}\n")


# --- telling -------------------------------------------------------------------------------------------------

_said: set[str] = set()


def say(message: str) -> None:
    """Print a line above progress bars, on the first process only."""
    if is_first_process():
        tqdm.write(message)
        sys.stdout.flush()


def say_once(message: str) -> None:
    """Print a notice the first time only."""
    if message not in _said:
        _said.add(message)
        say(message)


def say_notices(notices: Iterable[str]) -> None:
    """Print one-line notices, each once."""
    for notice in notices:
        say_once(f"note: {notice}")


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 row, 2 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit: 1.5 min."""
    unit, size = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 60 else ("s", 1)
    return f"{seconds / size:.1f} {unit}"


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", **options: Any
) -> tqdm:
    """A progress bar for what takes over two seconds; in a log file, a line now and then."""
    watched = sys.stderr.isatty()
    if not watched:
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_INTERVAL_SECONDS, "miniters": 1}
    options |= {"dynamic_ncols": watched, "delay": SHOWN_AFTER_SECONDS, "disable": not is_first_process()}
    return tqdm(iterable, desc=desc, total=total, unit=unit, **options)


class _Lines:
    """File wrapper that writes tqdm's updates as separate lines."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()  # a bar inside a bar moves the cursor
        if line and line != self.last:
            self.file.write(f"{line}\n")
            self.last = line

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Print what is running if it takes over two seconds and has no steps to count."""
    timer = threading.Timer(SHOWN_AFTER_SECONDS, tqdm.write, [f"{what} …"], {"file": sys.stderr})
    timer.daemon = True
    if is_first_process():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def loading_libraries() -> Iterator[None]:
    """Print that imports are running if they take long, and collect no garbage meanwhile: there is none, and looking for it
    takes a fifth of their time."""
    gc.disable()
    try:
        with waiting_for("loading the libraries"):
            yield
    finally:
        gc.enable()


def spent(started: float) -> dict[str, float]:
    """Seconds since `started` (`time.perf_counter`) and the process's largest memory so far in bytes, for a manifest."""
    torch = sys.modules.get("torch")
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_gpu = {"peak_gpu_memory": torch.cuda.max_memory_allocated()} if torch and torch.cuda.is_available() else {}
    return {"seconds": time.perf_counter() - started, "peak_memory": taken, **on_gpu}


# --- running -------------------------------------------------------------------------------------------------

_typed: list[str] = []


def command_typed() -> str:
    """The command that is running, as a user types it: for manifests."""
    return shlex.join(["python", *(_typed or sys.argv)])


def load_script(script: str) -> ModuleType:
    """The module of a script of this project, named as a user types it; loaded once."""
    name = "script_" + script.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        if spec is None or spec.loader is None or not (ROOT / script).is_file():
            raise FileNotFoundError(f"no script {ROOT / script}")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
    return sys.modules[name]


def as_typed(name: str, value: Any) -> list[str]:
    """A flag and its value as a user types them; nothing for one that is not set."""
    if value is None or value is False:
        return []
    several = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
    return [f"--{name}", *map(str, several)]


def _print_command() -> None:
    """The command of the script that runs now, bold on a terminal."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}$ {command_typed()}{plain}", flush=True)


def call(script: str, *, apart: bool = False, **values: Any) -> Any:
    """Run a script's stage in this process with these flags, or `apart` in one of its own, as several processes need it: each
    of them runs its command from the beginning. The command that a user would type is printed first."""
    words = [script, *([str(results)] if (results := values.get("results")) else [])]
    _typed[:] = words + [word for name, value in values.items() if name != "results" for word in as_typed(name, value)]
    _print_command()
    if not apart:
        return load_script(script).main(argparse.Namespace(**values))
    if status := subprocess.run([sys.executable, str(ROOT / script), *_typed[1:]], check=False).returncode:
        sys.exit(status)
    return None


def run_command(command: str, *more: str) -> Any:
    """`python <command> <more>` in this process, printed first: for files of commands and scripts that make data."""
    script, *arguments = _typed[:] = [*shlex.split(command), *more]
    _print_command()
    module = load_script(script)
    return run_stage(module.main, module.parse_args(arguments))


def quiet_libraries() -> None:
    """Silence what libraries print on every start and a user cannot act on; to be called before they are imported."""
    for name in ("TOKENIZERS_PARALLELISM=false", "TRANSFORMERS_VERBOSITY=error", "HF_HUB_DISABLE_PROGRESS_BARS=1"):
        os.environ.setdefault(*name.split("="))
    warnings.filterwarnings("ignore", module="pytorch_lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")


_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|bad_alloc|ALLOC_FAILED", re.I)
_SAVES_MEMORY = ("a smaller --batch_size with a larger --accumulate", "a smaller --max_tokens_per_batch",
                 "--gradient_checkpointing", "--precision bf16", "--base_dtype bfloat16", "--use_qlora", "--strategy fsdp",
                 "a smaller --max_length", "a smaller --project_dim")  # fmt: skip
"""What saves memory, where a script has the last flag that is named."""
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), "free space there, or raise the limit"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is to be; move it away"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make that folder writable, or work in another one"),
    errno.EISDIR: "a folder stands where a file is to be; move it away",
}
"""What to do about errors of the operating system that a user can mend."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or CPU memory ran out; for the CPU torch and safetensors say so only in the text of an error."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return not isinstance(error, ValueError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _line_about(error: Exception, flags: Iterable[str]) -> str | None:
    """One line for an error that the user can repair: what, where, how. None for other errors."""
    if is_out_of_memory(error):
        asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
        cures = ", ".join(cure for cure in _SAVES_MEMORY if re.findall(r"--(\w+)", cure)[-1] in flags)
        return f"out of memory{f' (asked for {asked[1]} more)' if asked else ''}" + (f"; try {cures}" if cures else "")
    if isinstance(error, OSError) and error.errno in _CURES:
        what = error.strerror or type(error).__name__
        then = f"{_CURES[error.errno]}, then run the same command again: what was finished is kept"
        return f"cannot use {error.filename}: {what[:1].lower()}{what[1:]}; {then}"
    return str(error) if isinstance(error, (ValueError, FileNotFoundError, FileExistsError)) else None


def end_at_sigterm(where: str) -> NoReturn:
    """Say in one line how to go on, and end the program."""
    if is_first_process():
        print(f"ended by SIGTERM{where}", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def run_stage(main: Callable[[Any], Any], args: Any) -> Any:
    """Run a script's `main`; an error that the user can mend is one line and exit status 1, not a traceback."""
    where = "; the same command goes on, or starts again, where it was"
    before = signal.signal(signal.SIGTERM, lambda *_: end_at_sigterm(where))
    try:
        quiet_libraries()
        return main(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, or starts again, where it was", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        line = _line_about(error, vars(args))
        if line is None or os.environ.get("GRADEX_TRACEBACK"):
            raise
        sys.exit(f"error: {line}")
    finally:
        signal.signal(signal.SIGTERM, before)
