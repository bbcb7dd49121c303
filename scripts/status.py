"""List the runs: what each has, what it cost, and the next command.

Reads   external_lightning_logs/, gradients/, results/, sampled_tasks/
Writes  nothing

    python scripts/status.py
    python scripts/status.py --save_name law
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import config, console
from src.artifacts import (
    ESTIMATES_FILE,
    GRADIENTS,
    META_INITIALIZATIONS,
    RESULTS_FILE,
    SELECTION_FILE,
    finished,
    results_dir,
    subset_file,
)


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = console.Parser(__doc__)
    config.add_flags(parser, config.NameConfig)
    return parser.parse_args(argv)


def describe(folder: Path, manifest: dict[str, Any], stores: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Lines about one run."""
    values = config.inherit(config.EstimationConfig, {}, manifest)
    name = f" --save_name {values.save_name}" if values.save_name else ""
    fast = "fast_estimate_"
    scripts = [f"{fast}compute_gradients.py", f"{fast}linear_regression.py"] if values.dataset_key else \
        [f"{fast}eval_approximation_alpaca.py --compute_pretrained_outputs", f"{fast}linear_regression_alpaca.py"]  # fmt: skip
    results = results_dir(values.results)
    kept = [*manifest["trajectory"], *filter(None, [manifest["best"]])]
    lines = [
        f"{values.save_name or folder.name}: {values.model_key}, {len(manifest['tasks'])} tasks, run {manifest['run']}",
        f"  training    {folder}, {', '.join(kept)}; {console.duration(manifest['seconds'])}",
    ]
    of_store: dict[Path, list[dict[str, Any]]] = {}
    for path, found in stores:
        of_store.setdefault(path.parent, []).append(found)
    for store, parts in of_store.items():
        rows = f"{parts[0]['num_rows']:,} rows at {len(parts)} checkpoints, d = {parts[0]['dim']}"
        lines.append(f"  gradients   {store}, {rows}; {console.duration(sum(part['seconds'] for part in parts))}")
    selection = subset_file(f"{values.results}_forward_selection")
    has = {
        "estimates": results / ESTIMATES_FILE,
        "selection": results / SELECTION_FILE,
        "results": results / RESULTS_FILE,
    }
    lines += [f"  {what:<11} {path}" for what, path in has.items() if path.is_file()]
    steps = [
        (bool(of_store), f"{scripts[0]}{name}"),
        (has["estimates"].is_file(), f"{scripts[1]}{name}"),
        (has["selection"].is_file(), f"{fast}forward_selection.py{name}"),
        (has["results"].is_file(), f"{values.training_script}{name} --subset_file {selection}"),
        (False, f"scripts/export_selection.py{name} --subset_file {selection}"),
    ]
    command = next(command for done, command in steps if not done)
    return [*lines, f"  next        python {command}"]


def main(args: Any) -> None:
    """Print a few lines about each run."""
    wanted = args.save_name
    stores = finished(f"{GRADIENTS}/*/*")
    runs = [(path, found) for path, found in finished(f"{META_INITIALIZATIONS}/*") if "config" in found]
    shown = [(path, found) for path, found in runs if wanted in (None, found["config"]["save_name"])]
    for path, found in shown:
        own = [(p, s) for p, s in stores if Path(s["checkpoint_dir"]).parent.resolve() == path.resolve()]
        print("\n".join(describe(path, found, own)))
    if not shown:
        print(
            "No finished run"
            + (f" is called {wanted}" if wanted else " here yet: python custom_train_alpaca.py --help")
        )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
