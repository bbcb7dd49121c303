"""Stage 2: projected gradients at every checkpoint of a run; and how good their first-order approximation is."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from src.artifacts import (
    APPROXIMATION_FIGURE,
    APPROXIMATION_FILE,
    MANIFEST,
    META_INITIALIZATIONS,
    WEIGHTS,
    check_manifest,
    file_fingerprint,
    locked,
    read_manifest,
    resolve_checkpoint,
    results_dir,
)
from src.config import AUTO, CollectConfig, StoreConfig, recorded
from src.console import command_typed, progress, say, say_notices, spent
from src.data import TaskData
from src.datamodule import TaskDataModule, tokenizer_fingerprint
from src.distributed import Hardware, Processes, is_first_process, launch
from src.estimation import first_order_error, zero_order_error
from src.figures import approximation_figure
from src.gradients import GradientCollector, collect_gradients, fitting_budget, outputs_of
from src.models import LanguageModel, displaced
from src.projection import Projection, make_projection
from src.stage_train import base_fingerprint, load_data, make_datamodule, model_at, named
from src.store import PROJECTION_SIGNS, StoredPart, StoreWriter, open_store, save_projection_signs
from src.tables import write_result


def checkpoint_folders(config: StoreConfig, run_folder: Path | None) -> list[Path]:
    """The checkpoints to take gradients at: those named, else those that the run's meta-training kept on its way.

    Raises:
        FileNotFoundError: none is named, and there is no meta-training.
    """
    if config.load_model_dir:
        return [resolve_checkpoint(name) for name in config.load_model_dir]
    folder = run_folder or META_INITIALIZATIONS / config.name(config.run, config.save_name)
    manifest = read_manifest(folder, config.training_script)
    return [folder / name for name in manifest["trajectory"] or [manifest["best"]]]


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, by its manifest or its name (`checkpoint-200`); -1 where neither says it."""
    if (checkpoint / MANIFEST).is_file():
        return int(read_manifest(checkpoint, "").get("step", -1))
    found = re.search(r"(\d+)$", checkpoint.name)
    return int(found[1]) if found else -1


def collect(config: CollectConfig, run_folder: Path | None = None) -> None:
    """Take the projected gradients of every training and validation row that the store has not yet, at each checkpoint."""
    data, hardware = load_data(config), config.hardware
    folders = checkpoint_folders(config, run_folder)
    store = config.store_dir(run_folder)
    with locked(*([store / folder.name for folder in folders] if is_first_process() else [])):
        processes = launch(hardware)
        datamodule, max_tokens = None, config.max_tokens_per_batch
        rows = np.sort(np.concatenate([data.indices("train"), data.indices("validation")]))
        for folder in folders:
            started = time.perf_counter()
            model = model_at(config, folder)
            if processes.mesh is None:
                model.to(processes.device)
            else:
                model.shard(processes.mesh)
            datamodule = datamodule or make_datamodule(config, data, model)
            dim = None if config.projection == "none" else config.project_dim
            projection = make_projection(config.projection, dim, config.run, shapes=model.layout.shapes)
            part = store / folder.name
            writer = open_writer(config, hardware, processes, data, datamodule, rows, model, projection, folder, part)
            if not writer.complete:
                if max_tokens == AUTO:
                    max_tokens = fitting_tokens(config, hardware, processes, datamodule, rows, model, projection)
                datamodule.max_tokens_per_batch = max_tokens
                collect_gradients(
                    model,
                    datamodule,
                    projection,
                    writer,
                    output_function=config.output_function,
                    autocast=hardware.autocast,
                    desc=f"gradients at {folder.name}",
                    processes=processes,
                )
            if processes.is_first:
                finish(config, data, writer, projection, model, folder, started)
            processes.wait()
    stage_3 = "fast_estimate_linear_regression" + ("" if config.dataset_key else "_alpaca")
    print(
        f"Wrote {store}: {len(rows):,} projected gradients (d = {projection.dim}, "
        f"p = {model.layout.num_parameters:,}) at each checkpoint. Next: python {stage_3}.py{named(config)}"
    )


def fitting_tokens(
    config: CollectConfig, hardware: Hardware, processes: Processes, datamodule: TaskDataModule, rows: np.ndarray,
    model: LanguageModel, projection: Projection,
) -> int:  # fmt: skip
    """The token budget of `auto`, which all processes share; the default on a CPU and of spread weights."""
    budget = datamodule.max_tokens_per_batch
    if processes.is_first and model.device.type == "cuda" and not model.is_sharded:
        collector = GradientCollector(
            model, projection, config.output_function, hardware.autocast, config.representations
        )
        budget = fitting_budget(collector, datamodule, rows)
        say(f"Batches of up to {budget:,} tokens fit into the GPU's memory.")
    return int(processes.from_first(budget))


def open_writer(
    config: CollectConfig, hardware: Hardware, processes: Processes, data: TaskData, datamodule: TaskDataModule,
    rows: np.ndarray, model: LanguageModel, projection: Projection, checkpoint: Path, part: Path,
) -> StoreWriter:  # fmt: skip
    """The writer of a part in every process: the first makes what is missing, the others join it."""
    if projection.dim > model.layout.num_parameters:
        say_notices([f"--project_dim {projection.dim} is above p = {model.layout.num_parameters:,}, the numbers of a "
                     "gradient: projecting buys nothing; --projection none keeps them as they are"])  # fmt: skip
    flags = ("model_key", "max_length", "max_target_length", "output_function", "projection", "base_dtype", "use_qlora",
             "representations", "loss_on_prompt", "lora_alpha")  # fmt: skip
    request = {
        **{name: getattr(config, name) for name in flags},
        "base_fingerprint": base_fingerprint(config),
        "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
        "lora_rank": config.lora,
        "checkpoint": checkpoint.name,
        "checkpoint_fingerprint": file_fingerprint(sorted(checkpoint.glob(WEIGHTS))),
        "dim": projection.dim,
        "seed": config.run,
        "precision": hardware.precision,
        "parameters": model.layout.shapes,
    }
    samples = {
        "sample_index": rows,
        "task": data.task_of_sample[rows],
        "target": data.target_of_sample[rows],
        "target_tokens": datamodule.target_tokens[rows],
        "key": datamodule.row_keys(rows),
    }

    def writer() -> StoreWriter:
        return StoreWriter(
            part,
            request,
            samples,
            projection.dim,
            f"Remove {part} to take the gradients again, or give meta-training a --save_name of its own.",
            model.network.get_output_embeddings().weight.shape[1] if config.representations else None,
            {"tasks": data.tasks, "targets": data.targets},
            lambda index: f"sample {index} ({data.where(index)})",
        )

    opened = writer() if processes.is_first else None
    processes.wait()
    opened = opened or writer()
    processes.wait()
    if processes.is_first and opened.reused:
        say(f"{part}: {opened.reused:,} of {len(rows):,} rows were there already; {len(opened.missing()):,} are new.")
    return opened


def finish(
    config: CollectConfig, data: TaskData, writer: StoreWriter, projection: Projection, model: LanguageModel,
    checkpoint: Path, started: float,
) -> None:  # fmt: skip
    """Make a part whole where it is not, add the projection's signs where they are wanted, and say what it lacks."""
    if writer.complete:
        print(f"{writer.folder} is there already and fits; nothing to compute.")
    else:
        ours = (checkpoint / MANIFEST).is_file()
        trained = read_manifest(checkpoint, config.training_script) if ours else {}
        writer.finish(
            {
                "step": step_of(checkpoint),
                "loss_over": trained.get("loss_over", config.loss_over),
                "checkpoint_dir": str(checkpoint),
                "data_fingerprint": data.fingerprint,
                "config": recorded(config),
                **spent(started),
                "command": command_typed(),
            }
        )
    signs = writer.folder / PROJECTION_SIGNS
    if config.save_projection_matrix and not signs.is_file():
        save_projection_signs(signs, projection, model.layout.shapes)
    say_notices(StoredPart(writer.folder, read_manifest(writer.folder, writer.repair)).notices())


# --- the model at displaced weights --------------------------------------------------------------------------


class ModelAtPart:
    """The model at a stored part's checkpoint, the rows as the store saw them, and the projection of its gradients.

    Raises:
        ValueError: the rows are not those of the store.
        FileNotFoundError: the checkpoint is gone.
    """

    def __init__(self, config: StoreConfig, part: StoredPart) -> None:
        self.part, self.hardware, self.data = part, config.hardware, load_data(config)
        checkpoint = Path(part.manifest["checkpoint_dir"])
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{part.folder} was taken at {checkpoint}, which is gone; train it again with {config.training_script}"
            )
        self.model = model_at(config, checkpoint).to(self.hardware.device)
        self.datamodule = make_datamodule(config, self.data, self.model)
        expected = {
            "data_fingerprint": self.data.fingerprint,
            "checkpoint_fingerprint": file_fingerprint(sorted(checkpoint.glob(WEIGHTS))),
        }
        check_manifest(part.folder, part.manifest, expected, "Take the gradients again (stage 2).")
        manifest, shapes = part.manifest, self.model.layout.shapes
        self.projection = make_projection(manifest["projection"], manifest["dim"], manifest["seed"], shapes=shapes)
        self.norm = norm_of(self.model.trainable_state())

    def displacement(self, solution: np.ndarray, scale: float | None) -> tuple[dict[str, torch.Tensor], float]:
        """lift(x) and the factor that gives it `scale` times the norm of the trained weights (1 without a scale)."""
        lifted = self.projection.lift(torch.as_tensor(solution, dtype=torch.float32), self.model.layout.shapes)
        factor = scale * self.norm / max(norm_of(lifted), np.finfo(float).tiny) if scale else 1.0
        return {name: factor * change for name, change in lifted.items()}, factor


def norm_of(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm of all the numbers together."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


def approximation_error(config: CollectConfig, store: Path) -> None:
    """How far outputs at displaced weights are from their first-order approximation, by length of the displacement.

    Directions are random in the projected space, where the stored rows give g.δ exactly; outputs are those of the
    validation rows at the last checkpoint of the store, or the one that `load_model_dir` names.
    """
    started = time.perf_counter()
    part = open_store(store, config.load_model_dir, "stage 2")[-1]
    at = ModelAtPart(config, part)
    validation = part.samples["target"] >= 0
    indices, rows, start = part.samples["sample_index"][validation], part.rows[validation], part.outputs[validation]
    records = []
    settings = [(seed, scale) for seed in config.seed for scale in config.scale]
    for seed, scale in progress(settings, desc="displaced models", unit="model"):
        solution = np.random.default_rng(seed).standard_normal((rows.shape[1],))
        displacement, factor = at.displacement(solution, scale)
        with displaced(at.model, displacement):
            moved = outputs_of(at.model, at.datamodule, indices, part.manifest["output_function"])
        errors = (first_order_error(start, rows, factor * solution, moved), zero_order_error(start, moved))
        records.append({"scale": scale, "seed": seed, "first_order": errors[0], "zero_order": errors[1]})
    folder, frame = results_dir(config.results), pd.DataFrame(records)
    facts = {"checkpoint": part.manifest["checkpoint_dir"], **spent(started), "command": command_typed()}
    write_result(folder / APPROXIMATION_FILE, frame, **facts)
    about = f"{part.manifest['output_function']} at {part.folder.name}, {len(indices):,} validation rows"
    approximation_figure(frame, folder / APPROXIMATION_FIGURE, title=about)
    for scale, row in frame.groupby("scale")[["first_order", "zero_order"]].mean().iterrows():
        print(f"distance {scale:g}: first order {row['first_order']:.2e}, zero order {row['zero_order']:.2e}")
    print(f"Wrote {folder / APPROXIMATION_FILE} and {folder / APPROXIMATION_FIGURE}. Next: estimates (stage 3).")
