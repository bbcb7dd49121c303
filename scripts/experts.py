"""Baselines without a gradient: one expert for each source, fine-tuned on it alone, together about one meta-training.

For a subset the experts' probabilities of each target token are averaged (MDE, arXiv:2502.15950), or their weights are and the
merged model is run (as in Merge to Mix, arXiv:2505.16066); both by the sources' numbers of rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from src import config, console, finetune
from src.artifacts import atomic_write
from src.data import TaskData, read_arrays, write_arrays
from src.run_data import load_data
from src.stage_train import make_datamodule, starting_model, training_plan

PROBABILITIES, MERGED = "experts' probabilities", "merged experts"


class Experts:
    """The experts of a training's sources, kept below `folder`: m subsets, n sources, k targets with validation rows.

    `probabilities` and `merged` map membership (m, n) bool to validation losses (m, k) in nats per token, a mean over rows.
    """

    def __init__(self, settings: config.TrainConfig, folder: Path, data: TaskData | None = None) -> None:
        self.data = load_data(settings) if data is None else data
        self.model = starting_model(settings, 0)
        self.datamodule = make_datamodule(settings, self.data, self.model)
        self.hardware, self.plan, self.folder = settings.hardware, training_plan(settings), folder
        self.validation = self.data.indices("validation")
        self.rows_of_task = np.bincount(
            self.data.task_of_sample[self.data.indices("train")], minlength=len(self.data.tasks)
        )
        start, folder = self.model.trainable_state(), folder / "experts"
        self.states, of_experts = [], []
        names = [*map(str, range(len(self.data.tasks))), "base"]
        for task, name in enumerate(console.progress(names, desc="experts", unit="source")):
            weights, tokens = folder / f"{name}.safetensors", folder / f"{name}.npz"
            if not tokens.is_file():
                self.model.load_trainable_state(start)
                if name != "base":
                    self.datamodule.select_training_rows(self.data.indices("train", [task]), 0)
                    finetune.fit(self.model, self.datamodule, self.plan, self.hardware, seed=0)
                with atomic_write(weights) as temporary:
                    save_file(self.model.trainable_state(), temporary)
                write_arrays(tokens, {"probabilities": np.exp(self._log_probabilities())})
            self.states.append(load_file(weights))
            of_experts.append((read_arrays(tokens) or {})["probabilities"])
        self.of_experts = np.stack(of_experts)  # of every target token of the validation rows, (n + 1, tokens)

    @torch.no_grad()
    def _log_probabilities(self) -> np.ndarray:
        """Of every target token of the validation rows under the model as it is, (tokens,); `row_of_token` says whose."""
        self.model.eval().to(self.hardware.device)
        values, rows = [], []
        for batch in self.datamodule.evaluation_batches(self.validation):
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            logits, labels, row = self.model.target_logits(batch)
            values.append(logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0].cpu())
            rows.append(batch["sample_index"][row].cpu())
        self.row_of_token = torch.cat(rows).numpy()
        return torch.cat(values).numpy()

    def _losses(self, log_probabilities: np.ndarray) -> list[float]:
        size = len(self.data)
        sums = np.bincount(self.row_of_token, log_probabilities, size) / np.maximum(
            np.bincount(self.row_of_token, minlength=size), 1
        )
        return list(finetune.target_losses(self.data, -sums).values())

    def _shares(self, membership: np.ndarray) -> np.ndarray:
        rows = np.concatenate([membership * self.rows_of_task, ~membership.any(axis=1, keepdims=True)], axis=1)
        return rows / rows.sum(axis=1, keepdims=True)  # of no sources: the base model

    def probabilities(self, membership: np.ndarray) -> np.ndarray:
        """The loss of the experts' mean probabilities."""
        if not hasattr(self, "row_of_token"):
            self._log_probabilities()
        return np.array([self._losses(np.log(shares @ self.of_experts)) for shares in self._shares(membership)])

    def merged(self, membership: np.ndarray) -> np.ndarray:
        """The loss of the model with the experts' mean weights."""
        losses = []
        for shares in console.progress(self._shares(membership), desc=MERGED, unit="subset"):
            chosen = np.flatnonzero(shares)
            self.model.load_trainable_state(
                {name: sum(shares[task] * self.states[task][name] for task in chosen) for name in self.states[0]}
            )
            losses.append(self._losses(self._log_probabilities()))
        return np.array(losses)
