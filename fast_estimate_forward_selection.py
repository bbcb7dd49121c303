"""Stage 4, either track: forward selection of the subset to train on, by estimates alone.

Reads   the gradients of stage 2
Writes  sampled_tasks/<name>_forward_selection.txt, results/<name>/selection.csv and selection.png

    python fast_estimate_forward_selection.py --save_name law
    python fast_estimate_forward_selection.py --save_name law --target_task find --max_tasks 5 --refine 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console

SHOWN = (
    config.NameConfig, config.CheckpointsConfig, config.ProjectionConfig, config.ClustersConfig, config.TargetConfig,
    config.EstimatorConfig, config.SelectionConfig, config.KeepConfig, config.HardwareConfig,
)  # fmt: skip
INHERITED = (
    config.DataConfig, config.ModelConfig, config.TrainingConfig, config.GradientConfig,
    config.RunsConfig,
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    return config.stage_parser(__doc__, SHOWN, INHERITED).parse_args(argv)


def main(args: Any) -> None:
    """Select."""
    with console.loading_libraries():
        from src import stage_estimate, stage_select

    stage_select.select(*stage_estimate.stored(config.SelectConfig, config.typed_flags(args)))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
