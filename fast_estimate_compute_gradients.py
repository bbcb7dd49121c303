"""Stage 2, chain of thought: projected gradients of every training and validation row, at each checkpoint.

Reads   the run of stage 1 and its data; checkpoints of --load_model_dir, also those that other trainers saved
Writes  gradients/<run>/<checkpoint>/   projected.npy (R, d), outputs.npy (R,), moments of tasks and targets, manifest.json

    python fast_estimate_compute_gradients.py --save_name my_run
    python fast_estimate_compute_gradients.py --dataset_key strategy_qa --model_key flan_t5_base --preset_key ft_cot_t70_64aug \\
        --load_model_dir flan_t5_base_strategy_qa_ft_cot_t70_64aug_lora_r_16_new_run_0/epoch_epoch=17 --train_lora \\
        --lora_rank 16 --lora_alpha 128 --run 0 --project_dim 100 --device 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console

SHOWN = (
    config.NameConfig, config.CheckpointsConfig, config.ProjectionConfig, config.GradientConfig, config.HardwareConfig,
)  # fmt: skip
INHERITED = (
    config.CotData, config.CotFiles, config.RowsConfig, config.ModelConfig, config.TrainingConfig,
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    return config.stage_parser(__doc__, SHOWN, INHERITED).parse_args(argv)


def main(args: Any) -> None:
    """Take gradients."""
    with console.loading_libraries():
        from src import stage_collect

    stage_collect.collect(*config.from_run(config.CollectConfig, config.typed_flags(args), model_key="flan_t5_base"))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
