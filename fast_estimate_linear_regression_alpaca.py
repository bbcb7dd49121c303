"""Stage 3, instruction tuning: the estimated loss of every target for every subset, one row each.

Reads   the gradients of stage 2; sampled_tasks/<run>.txt, drawn and written where it is not there
Writes  results/<name>/estimates.csv and manifest.json

    python fast_estimate_linear_regression_alpaca.py --save_name my_run
    python fast_estimate_linear_regression_alpaca.py --save_name my_run --calibrate results/my_run/results.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console

SHOWN = (
    config.NameConfig, config.CheckpointsConfig, config.ProjectionConfig, config.ClustersConfig, config.SubsetsConfig,
    config.TargetConfig, config.EstimatorConfig, config.HardwareConfig,
)  # fmt: skip
INHERITED = (
    config.InstructionData, config.RowsConfig, config.ModelConfig, config.TrainingConfig, config.GradientConfig,
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    return config.stage_parser(__doc__, SHOWN, INHERITED).parse_args(argv)


def main(args: Any) -> None:
    """Estimate."""
    with console.loading_libraries():
        from src import stage_estimate

    stage_estimate.estimate_subsets(*stage_estimate.stored(config.EstimateConfig, config.typed_flags(args)))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
