"""Whether what a selection is to keep is kept after real fine-tuning, on a world of the quickstart.

Sources with wrong answers are taken as targets, one after the other: what teaches them harms others. A selection is made freely,
and so that the clean sources which the free one is estimated to harm most are kept (`--keep_task`), by estimates alone and as
the default does, which fine-tunes what it selects with some seeds. All are fine-tuned; unseen are the other seeds.

Reads   the world that `bash scripts/quickstart.sh --seed N` has made
Writes  a run of its own; results/kept_<seed>_epochs_<n>/kept_tasks.csv

    python scripts/benchmark_kept_tasks.py --seed 2
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from src import artifacts, config, console, tables
from src.stage_estimate import Estimator, stored
from src.subsets import membership_matrix, read_subsets

TRAIN = "custom_train_alpaca.py"


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("world")
    group.add_argument("--seed", type=int, default=0, help="the quickstart's world (default: 0)")
    group.add_argument("--kept", type=config.COUNT, default=3, metavar="N", help="sources to keep (default: 3)")
    group.add_argument("--tolerances", type=float, nargs="+", default=[0.0, 0.1], metavar="X",
        help="values of --tolerance_keep (default: 0 0.1)")  # fmt: skip
    group.add_argument(
        "--targets", type=config.COUNT, default=4, metavar="N", help="sources with wrong answers (default: 4)"
    )
    group.add_argument("--epochs", type=config.COUNT, default=4, metavar="N", help="of training (default: 4)")
    group.add_argument("--runs", type=config.COUNT, default=2, metavar="N", help="seeds (default: 2)")
    group.add_argument("--seen", type=config.COUNT, default=1, metavar="N", help="of them, that a selection is fine-tuned "
                       "with before it is taken (default: 1)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: Any) -> None:
    """Train, estimate, select, fine-tune, judge."""
    world = artifacts.DATA / ("synthetic" if args.seed == 0 else f"synthetic_seed_{args.seed}")
    name = f"kept_{args.seed}_epochs_{args.epochs}"
    console.call(TRAIN, data_files=[str(world / "flan.jsonl")], target_files=[str(world / "target.jsonl")], model_key=
                 str(world / "model"), train_lora=True, epochs=args.epochs, lr=2e-3, batch_size=16, heldout_share=0.1, save_name=name,
                 stop_after_checkpoints=True)  # fmt: skip
    console.call("fast_estimate_eval_approximation_alpaca.py", compute_pretrained_outputs=True, save_name=name)
    estimator = Estimator(*stored(config.EstimationConfig, {"save_name": name}))
    wrong = [task for task in estimator.tasks if "noisy100" in task][: args.targets]
    clean = [task for task in estimator.tasks if "clean" in task]

    def selected(target: str, **flags: Any) -> tuple[int, ...]:
        try:
            console.call("fast_estimate_forward_selection.py", save_name=name, target_task=[target], **flags)
        except ValueError as error:  # nothing is within the tolerance: the base model
            print(error)
            return ()
        file = artifacts.subset_file(f"{name}_forward_selection")
        return read_subsets(file, len(estimator.tasks), estimator.tasks)[0]

    def rises(subset: tuple[int, ...], targets: Sequence[str]) -> np.ndarray:
        columns = [estimator.targets.index(target) for target in targets]
        return estimator.above_base(membership_matrix([subset], len(estimator.tasks)), columns)[0]

    chosen: dict[tuple[str, str, str], tuple[tuple[int, ...], list[str]]] = {}
    for target in wrong:
        free = selected(target)
        kept = [clean[place] for place in np.argsort(-rises(free, clean))[: args.kept]]
        chosen[target, "free", ""] = free, kept
        for tolerance, refine in itertools.product(args.tolerances, (0, 1)):
            subset = selected(target, keep_task=kept, tolerance_keep=tolerance, refine=refine, runs=args.seen)
            chosen[target, f"{tolerance:g}", "fine-tuning" if refine else "estimates"] = subset, kept
    for subset in dict.fromkeys([(), *(subset for subset, _ in chosen.values())]):
        console.call(TRAIN, save_name=name, task_idxes=subset, runs=args.runs)
    truth = tables.read_table(artifacts.results_dir(name) / artifacts.RESULTS_FILE, of_subsets=True).set_index("subset")
    losses = truth.filter(like=f"{tables.VALIDATION_LOSS}/").rename(columns=lambda c: c.partition("/")[2])
    changes = losses - losses.loc[[""]].mean()
    measured, unseen = (
        changes[runs].groupby(level=0).mean() for runs in (truth["run"].ge(0), truth["run"].ge(args.seen))
    )
    rows = []
    for (target, tolerance, kept_by), (subset, kept) in chosen.items():
        place = tables.subset_text(subset), [target, *kept]
        values = {"estimated": rises(subset, place[1]), "measured": measured.loc[place].to_numpy(),
                  "unseen": unseen.loc[place].to_numpy()}  # fmt: skip
        row: dict[str, Any] = {
            "seed": args.seed,
            "seen": args.seen,
            "target": target,
            "tolerance": tolerance,
            "kept_by": kept_by,
        }
        row["sources"] = len(subset)
        for kind, of_kind in values.items():
            row |= {f"{kind}_change": of_kind.item(0), f"{kind}_worst_rise": of_kind[1:].max()}
        rows.append(row)
    frame, path = pd.DataFrame(rows), artifacts.results_dir(name) / "kept_tasks.csv"
    tables.write_table(path, frame)
    print(frame.round(3).to_string(index=False), f"\nWrote {path}.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
