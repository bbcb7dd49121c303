"""Stage 2: projected gradients at every checkpoint of a run, and the error of their first-order approximation."""

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
from src.models import LanguageModel, displaced
from src.projection import make_projection
from src.run_data import load_data, named
from src.run_model import base_fingerprint, make_datamodule, model_at
from src.tables import write_result


def checkpoint_folders(config: StoreConfig, run_folder: Path | None) -> dict[str, Path]:
    """Name -> folder of the checkpoints to take gradients at: those typed, else those that the run's meta-training kept on
    its way; the base model has the folder of a checkpoint that was trained from it. FileNotFoundError: none is typed, and
    there is no meta-training. ValueError: two of one name."""
    if config.load_model_dir:
        trained = [artifacts.resolve_checkpoint(name) for name in config.load_model_dir if name != artifacts.BASE]
        at_base = [(artifacts.BASE, trained[0])] if artifacts.BASE in config.load_model_dir else []
        folders = dict([*at_base, *((path.name, path) for path in trained)])
        if len(folders) < len({*trained, *dict(at_base)}):
            raise ValueError(f"--load_model_dir names two checkpoints {trained[0].name}; rename one of the folders")
        return folders
    folder = run_folder or artifacts.META_INITIALIZATIONS / config.name(config.run, config.save_name)
    manifest = artifacts.read_manifest(folder, config.training_script)
    return {name: folder / name for name in manifest["trajectory"] or [manifest["best"]]}


def step_of(checkpoint: Path, manifest: Mapping[str, Any]) -> int:
    """The optimizer step of a checkpoint, by its manifest, its name (`checkpoint-200`) or its trainer's state; of a folder
    that holds checkpoints, as trainers save the last, the largest of theirs. -1 where nothing says it."""
    if manifest:
        return int(manifest.get("step", -1))
    if found := re.search(r"(\d+)$", checkpoint.name):
        return int(found[1])
    inside = [int(path.name.rpartition("-")[2]) for path in checkpoint.glob("checkpoint-*") if path.name[11:].isdigit()]
    return int(artifacts.described(checkpoint, artifacts.TRAINER_STATE).get("global_step", max(inside, default=-1)))


def weights_fingerprint(name: str, checkpoint: Path) -> str:
    """`file_fingerprint` of a checkpoint's weights; of the base model, which is named elsewhere, that of its adapter's
    shape."""
    files = artifacts.ADAPTER_CONFIG if name == artifacts.BASE else artifacts.WEIGHTS
    return artifacts.file_fingerprint(sorted(checkpoint.glob(files)))


def request_at(config: CollectConfig, name: str, checkpoint: Path, model: LanguageModel, dim: int) -> dict[str, Any]:
    """What a row of a checkpoint's store depends on, besides its tokens."""
    flags = ("model_key", "max_length", "max_target_length", "output_function", "projection", "base_dtype", "use_qlora",
             "representations", "loss_on_prompt", "lora_alpha")  # fmt: skip
    return {
        **{flag: getattr(config, flag) for flag in flags},
        "base_fingerprint": base_fingerprint(config),
        "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
        "lora_rank": config.lora,
        "checkpoint": name,
        "checkpoint_fingerprint": weights_fingerprint(name, checkpoint),
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
    with artifacts.locked(*(target / name for name in folders)):
        processes = launch(hardware)
        for name, folder in folders.items():
            started, part, is_base = time.perf_counter(), target / name, name == artifacts.BASE
            model = model_at(config, folder, config.run if is_base else None)
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
                                     "gradient: projecting saves nothing; --projection none keeps them as they are"])  # fmt: skip
            request = request_at(config, name, folder, model, projection.dim)
            repair = f"Remove {part} to take the gradients again, or give meta-training a --save_name of its own."
            hidden = model.network.get_output_embeddings().weight.shape[1] if config.representations else None
            for turn in (True, False):  # the first process makes what is missing, then the others join it
                if processes.is_first == turn:
                    writer = store.StoreWriter(part, request, samples, projection.dim, repair, hidden, names,
                                               lambda index: f"sample {index} ({data.where(index)})",
                                               joins=not turn)  # fmt: skip
                processes.wait()
            if not writer.complete:
                if writer.reused:
                    there = f"{writer.reused:,} of {len(rows):,} rows were there already"
                    console.say(f"{part}: {there}; {len(writer.missing()):,} are new.")
                if max_tokens == AUTO:  # all processes share it; the default on a CPU
                    max_tokens = datamodule.max_tokens_per_batch
                    if model.device.type == "cuda" and (processes.is_first or model.is_sharded):
                        of_collector = config.output_function, hardware.autocast, config.representations
                        collector = gradients.GradientCollector(model, projection, *of_collector)
                        max_tokens = gradients.fitting_budget(collector, datamodule, rows)
                        console.say(f"Batches of up to {max_tokens:,} tokens fit into the GPU's memory.")
                    max_tokens = int(processes.from_first(max_tokens))
                datamodule.max_tokens_per_batch = max_tokens
                gradients.collect_gradients(
                    model, datamodule, projection, writer, output_function=config.output_function,
                    autocast=hardware.autocast, desc=f"gradients at {name}", processes=processes,
                )  # fmt: skip
            if processes.is_first and writer.complete:
                print(f"{part}: all {len(rows):,} rows are there already; nothing to compute.")
            elif processes.is_first:
                trained = artifacts.manifest_of(folder)
                facts = {
                    "step": 0 if is_base else step_of(folder, trained),
                    "loss_over": trained.get("loss_over", config.loss_over),
                    "checkpoint_dir": str(folder),
                    "data_fingerprint": data.fingerprint,
                    "config": recorded(config),
                }
                writer.finish(facts | console.spent(started) | {"command": console.command_typed()})
            signs = part / store.PROJECTION_SIGNS
            if processes.is_first and config.save_projection_matrix and not signs.is_file():
                store.save_projection_signs(signs, projection, model.layout.shapes)
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
            repair = f"train it again with {config.training_script}"
            raise FileNotFoundError(f"{part.folder} was taken at {checkpoint}, which is gone; {repair}")
        untrained_seed = manifest["seed"] if part.folder.name == artifacts.BASE else None
        self.model = model_at(config, checkpoint, untrained_seed).to(self.hardware.device)
        self.datamodule = make_datamodule(config, self.data, self.model)
        expected = {
            "data_fingerprint": self.data.fingerprint,
            "checkpoint_fingerprint": weights_fingerprint(part.folder.name, checkpoint),
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


def way_to(at: ModelAtPart, config: StoreConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The displacement, name -> (out, in), from a part's checkpoint to a model that was fine-tuned. ValueError: they differ in
    more than the matrices whose gradient is taken."""
    start, model, matrices = at.model.trainable_state(), model_at(config, folder), at.model.layout.matrices
    goal, shapes = model.trainable_state(), at.model.layout.shapes
    other = [name for name in start if name not in shapes and not start[name].equal(goal.get(name, start[name][:0]))]
    if other or model.layout.shapes != shapes:
        found = f"{other[0]}, of which no gradient is taken, differs" if other else "its adapter is of other layers"
        raise ValueError(f"--toward {folder}: {found}; pass LoRA adapters of the layers that {at.part.folder} is of")
    ways = {matrix.name: (goal[matrix.name] - start[matrix.name], matrix.transposed) for matrix in matrices}
    return {name: change.T if transposed else change for name, (change, transposed) in ways.items()}


def approximation_error(config: CollectConfig, store_folder: Path) -> None:
    """Measure how far outputs at displaced weights are from their first-order approximation, by length.

    Outputs are those of the validation rows at the last checkpoint of the store, or the one that `load_model_dir` names.
    Directions are random in the projected space, where the stored rows give g.delta exactly, and towards the models of
    `toward`, for which it is computed; of those the whole way is measured too.
    """
    from src import figures

    started, part = time.perf_counter(), store.open_store(store_folder, config.load_model_dir, "stage 2")[-1]
    at, function = ModelAtPart(config, part), part.manifest["output_function"]
    validation = part.samples["target"] >= 0
    indices, rows, start = part.samples["sample_index"][validation], part.rows[validation], part.outputs[validation]
    ways: list[tuple[dict[str, Any], dict[str, torch.Tensor], np.ndarray]] = []
    for seed in config.seed:
        solution = np.random.default_rng(seed).standard_normal((rows.shape[1],))
        ways.append(({"seed": seed, "toward": ""}, at.displacement(solution, None)[0], rows.astype(float) @ solution))
    folders = [artifacts.resolve_checkpoint(folder) for folder in config.toward]
    models = [way_to(at, config, folder) for folder in folders]
    none = np.zeros((0, len(indices)))
    products = gradients.products_with(at.model, at.datamodule, indices, function, models).T if models else none
    ways += [({"seed": None, "toward": f.name}, *way) for f, *way in zip(folders, models, products, strict=True)]
    records = []
    total = len(ways) * len(config.scale) + len(models)
    with console.progress(desc="displaced models", total=total, unit="model") as bar:
        for direction, way, slopes in ways:
            whole = norm_of(way) / at.norm
            scales = [(scale, False) for scale in config.scale]
            for scale, is_whole in [*scales, *([(whole, True)] if direction["toward"] else [])]:
                factor = scale / max(whole, np.finfo(float).tiny)
                with displaced(at.model, {name: factor * change for name, change in way.items()}):
                    moved = gradients.outputs_of(at.model, at.datamodule, indices, function)
                first = first_order_error(start, slopes[:, None], np.array([factor]), moved)
                errors = {"first_order": first, "zero_order": (zero := zero_order_error(start, moved))}
                errors["change"] = float(np.sqrt(first / zero)) if zero else 0.0
                records.append({"scale": scale, **direction, "whole_way": is_whole, **errors})
                bar.update(1)
    folder, frame = artifacts.results_dir(config.results), pd.DataFrame(records).astype({"seed": "Int64"})
    table, figure = folder / artifacts.APPROXIMATION_FILE, folder / artifacts.APPROXIMATION_FIGURE
    facts = {"checkpoint": part.manifest["checkpoint_dir"], "rows": len(indices), **console.spent(started)}
    write_result(table, frame, **facts, command=console.command_typed())
    where = (f"{len(indices):,} validation rows", f"{function} at {part.folder.name}")
    about = figures.about_run({**part.manifest, "data": config.data_name}, "", *where)
    figures.approximation_figure(frame, figure, about=about)
    kinds = frame["toward"].where(frame["toward"] == "", " towards fine-tuned models")
    for (kind, whole, scale), row in frame.groupby([kinds, "whole_way", "scale"])[list(errors)].mean().iterrows():
        of_change = f"first order {row['first_order']:.2e}, zero order {row['zero_order']:.2e}, of the change {row['change']:.1%}"
        print(f"distance {scale:.3g}{kind}{', the whole way' if whole else ''}: {of_change}")
    print(f"Wrote {table} and {figure}. Next: estimates (stage 3).")
