"""Stage 2, instruction tuning (--compute_pretrained_outputs): projected gradients of every training and validation row, at
each checkpoint. Without that flag, either track: the first-order approximation error at the last of them.

Reads   the run of stage 1 and its data; checkpoints of --load_model_dir, also those that other trainers saved
Writes  gradients/<run>/<checkpoint>/   projected.npy (R, d), outputs.npy (R,), moments of tasks and targets, manifest.json
        results/<name>/approximation_error.csv and .png (without --compute_pretrained_outputs)

    python fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs --save_name law
    python fast_estimate_eval_approximation_alpaca.py --save_name law
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console

SHOWN = (
    config.NameConfig, config.CheckpointsConfig, config.ProjectionConfig, config.GradientConfig,
    config.ApproximationConfig, config.HardwareConfig,
)  # fmt: skip
INHERITED = (config.DataConfig, config.ModelConfig, config.TrainingConfig)


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    return config.stage_parser(__doc__, SHOWN, INHERITED).parse_args(argv)


def main(args: Any) -> None:
    """Take gradients, or measure the approximation error."""
    with console.loading_libraries():
        from src import stage_collect

    typed = config.typed_flags(args)
    if typed.get("compute_pretrained_outputs"):
        for name in ("scale", "seed"):
            if name in typed:
                console.say_once(f"note: --{name} has no effect with --compute_pretrained_outputs")
        stage_collect.collect(*config.from_run(config.CollectConfig, typed))
    else:
        stage_collect.approximation_error(*config.from_store(config.CollectConfig, typed))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
