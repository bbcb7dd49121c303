"""Stage 2: projected gradients at every checkpoint of a run; and how good their first-order approximation is."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src import artifacts, console, gradients, store
from src.config import AUTO, CollectConfig, StoreConfig, recorded
from src.datamodule import tokenizer_fingerprint
from src.distributed import launch
from src.estimation import first_order_error, zero_order_error
from src.figures import approximation_figure
from src.models import LanguageModel, displaced
from src.projection import make_projection
from src.stage_train import base_fingerprint, load_data, make_datamodule, model_at, named
from src.tables import write_result


def checkpoint_folders(config: StoreConfig, run_folder: Path | None) -> list[Path]:
    """The checkpoints to take gradients at: those named, else those that the run's meta-training kept on its way.
    FileNotFoundError: none is named, and there is no meta-training."""
    if config.load_model_dir:
        return [artifacts.resolve_checkpoint(name) for name in config.load_model_dir]
    folder = run_folder or artifacts.META_INITIALIZATIONS / config.name(config.run, config.save_name)
    manifest = artifacts.read_manifest(folder, config.training_script)
    return [folder / name for name in manifest["trajectory"] or [manifest["best"]]]


def step_of(checkpoint: Path, manifest: Mapping[str, Any]) -> int:
    """The optimizer step of a checkpoint, by its manifest or its name (`checkpoint-200`); -1 where neither says it."""
    found = None if manifest else re.search(r"(\d+)$", checkpoint.name)
    return int(found[1] if found else manifest.get("step", -1))


def weights_fingerprint(checkpoint: Path) -> str:
    """`file_fingerprint` of a checkpoint's weights."""
    return artifacts.file_fingerprint(sorted(checkpoint.glob(artifacts.WEIGHTS)))


def request_at(config: CollectConfig, checkpoint: Path, model: LanguageModel, dim: int) -> dict[str, Any]:
    """What a row of a checkpoint's store depends on, besides its tokens."""
    flags = ("model_key", "max_length", "max_target_length", "output_function", "projection", "base_dtype", "use_qlora",
             "representations", "loss_on_prompt", "lora_alpha")  # fmt: skip
    return {
        **{name: getattr(config, name) for name in flags},
        "base_fingerprint": base_fingerprint(config),
        "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
        "lora_rank": config.lora,
        "checkpoint": checkpoint.name,
        "checkpoint_fingerprint": weights_fingerprint(checkpoint),
        "dim": dim,
        "seed": config.run,
        "precision": config.hardware.precision,
        "parameters": model.layout.shapes,
    }


def collect(config: CollectConfig, run_folder: Path | None = None) -> None:
    """Take the projected gradients of every training and validation row that the store has not yet, at each checkpoint."""
    data, hardware = load_data(config), config.hardware
    folders, target = checkpoint_folders(config, run_folder), config.store_dir(run_folder)
    rows = np.sort(np.concatenate([data.indices("train"), data.indices("validation")]))
    names, datamodule, max_tokens = {"tasks": data.tasks, "targets": data.targets}, None, config.max_tokens_per_batch
    with artifacts.locked(*(target / folder.name for folder in folders)):
        processes = launch(hardware)
        for folder in folders:
            started, part = time.perf_counter(), target / folder.name
            model = model_at(config, folder)
            if processes.mesh is None:
                model.to(processes.device)
            else:
                model.shard(processes.mesh)
            if datamodule is None:  # rows and their keys are the same at every checkpoint
                datamodule = make_datamodule(config, data, model)
                columns = {"task": data.task_of_sample, "target": data.target_of_sample}
                columns["target_tokens"] = datamodule.target_tokens
                samples = {name: of_all[rows] for name, of_all in columns.items()}
                samples |= {"sample_index": rows, "key": datamodule.row_keys(rows)}
            num_parameters = model.layout.num_parameters
            dim = None if config.projection == "none" else config.project_dim
            projection = make_projection(config.projection, dim, config.run, shapes=model.layout.shapes)
            if projection.dim > num_parameters:
                console.say_notices([f"--project_dim {projection.dim} is above p = {num_parameters:,}, the numbers of a "
                                     "gradient: projecting buys nothing; --projection none keeps them as they are"])  # fmt: skip
            request = request_at(config, folder, model, projection.dim)
            repair = f"Remove {part} to take the gradients again, or give meta-training a --save_name of its own."
            hidden = model.network.get_output_embeddings().weight.shape[1] if config.representations else None
            for turn in (True, False):  # the first process makes what is missing, then the others join it
                if processes.is_first == turn:
                    writer = store.StoreWriter(part, request, samples, projection.dim, repair, hidden, names,
                                               lambda index: f"sample {index} ({data.where(index)})",
                                               joins=not turn)  # fmt: skip
                processes.wait()
            if processes.is_first and writer.reused:
                there = f"{writer.reused:,} of {len(rows):,} rows were there already"
                console.say(f"{part}: {there}; {len(writer.missing()):,} are new.")
            if not writer.complete:
                if max_tokens == AUTO:  # all processes share it; the default on a CPU and of spread weights
                    max_tokens = datamodule.max_tokens_per_batch
                    if processes.is_first and model.device.type == "cuda" and not model.is_sharded:
                        of_collector = config.output_function, hardware.autocast, config.representations
                        collector = gradients.GradientCollector(model, projection, *of_collector)
                        max_tokens = gradients.fitting_budget(collector, datamodule, rows)
                        console.say(f"Batches of up to {max_tokens:,} tokens fit into the GPU's memory.")
                    max_tokens = int(processes.from_first(max_tokens))
                datamodule.max_tokens_per_batch = max_tokens
                gradients.collect_gradients(
                    model, datamodule, projection, writer, output_function=config.output_function,
                    autocast=hardware.autocast, desc=f"gradients at {folder.name}", processes=processes,
                )  # fmt: skip
            if processes.is_first and writer.complete:
                print(f"{part} is there already and fits; nothing to compute.")
            elif processes.is_first:
                ours = (folder / artifacts.MANIFEST).is_file()
                trained = artifacts.read_manifest(folder, config.training_script) if ours else {}
                facts = {
                    "step": step_of(folder, trained),
                    "loss_over": trained.get("loss_over", config.loss_over),
                    "checkpoint_dir": str(folder),
                    "data_fingerprint": data.fingerprint,
                    "config": recorded(config),
                }
                writer.finish(facts | console.spent(started) | {"command": console.command_typed()})
            if processes.is_first:
                signs = part / store.PROJECTION_SIGNS
                if config.save_projection_matrix and not signs.is_file():
                    store.save_projection_signs(signs, projection, model.layout.shapes)
                stored = store.StoredPart(part, artifacts.read_manifest(part, writer.repair))
                console.say_notices(stored.notices())
            processes.wait()
    stage_3 = "fast_estimate_linear_regression" + ("" if config.dataset_key else "_alpaca")
    print(
        f"Wrote {target}: {len(rows):,} projected gradients (d = {projection.dim}, p = {num_parameters:,}) at each "
        f"checkpoint. Next: python {stage_3}.py{named(config)}"
    )


# --- the model at displaced weights --------------------------------------------------------------------------


class ModelAtPart:
    """The model at a stored part's checkpoint, the rows as the store saw them, and the projection of its gradients.
    ValueError: the rows are not those of the store. FileNotFoundError: the checkpoint is gone."""

    def __init__(self, config: StoreConfig, part: store.StoredPart) -> None:
        self.part, self.hardware, self.data = part, config.hardware, load_data(config)
        manifest, checkpoint = part.manifest, Path(part.manifest["checkpoint_dir"])
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{part.folder} was taken at {checkpoint}, which is gone; train it again with {config.training_script}"
            )
        self.model = model_at(config, checkpoint).to(self.hardware.device)
        self.datamodule = make_datamodule(config, self.data, self.model)
        expected = {
            "data_fingerprint": self.data.fingerprint,
            "checkpoint_fingerprint": weights_fingerprint(checkpoint),
        }
        artifacts.check_manifest(part.folder, manifest, expected, "Take the gradients again (stage 2).")
        shapes = self.model.layout.shapes
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


def approximation_error(config: CollectConfig, store_folder: Path) -> None:
    """How far outputs at displaced weights are from their first-order approximation, by length of the displacement.

    Directions are random in the projected space, where the stored rows give g.δ exactly; outputs are those of the
    validation rows at the last checkpoint of the store, or the one that `load_model_dir` names.
    """
    started, part = time.perf_counter(), store.open_store(store_folder, config.load_model_dir, "stage 2")[-1]
    at, function = ModelAtPart(config, part), part.manifest["output_function"]
    validation = part.samples["target"] >= 0
    indices, rows, start = part.samples["sample_index"][validation], part.rows[validation], part.outputs[validation]
    records = []
    settings = [(seed, scale) for seed in config.seed for scale in config.scale]
    for seed, scale in console.progress(settings, desc="displaced models", unit="model"):
        solution = np.random.default_rng(seed).standard_normal((rows.shape[1],))
        displacement, factor = at.displacement(solution, scale)
        with displaced(at.model, displacement):
            moved = gradients.outputs_of(at.model, at.datamodule, indices, function)
        errors = (first_order_error(start, rows, factor * solution, moved), zero_order_error(start, moved))
        records.append({"scale": scale, "seed": seed, "first_order": errors[0], "zero_order": errors[1]})
    folder, frame = artifacts.results_dir(config.results), pd.DataFrame(records)
    table, figure = folder / artifacts.APPROXIMATION_FILE, folder / artifacts.APPROXIMATION_FIGURE
    facts = {"checkpoint": part.manifest["checkpoint_dir"], **console.spent(started)}
    write_result(table, frame, **facts, command=console.command_typed())
    approximation_figure(frame, figure, title=f"{function} at {part.folder.name}, {len(indices):,} validation rows")
    for scale, row in frame.groupby("scale")[["first_order", "zero_order"]].mean().iterrows():
        print(f"distance {scale:g}: first order {row['first_order']:.2e}, zero order {row['zero_order']:.2e}")
    print(f"Wrote {table} and {figure}. Next: estimates (stage 3).")
