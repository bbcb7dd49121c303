"""Processes that are killed, disks that are full, files that are not what they should be, numbers that are none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from src.gradients import GradientCollector
from src.paths import ARTIFACT_VERSION, MANIFEST, atomic_write, locked, write_json
from src.store import StoredPart, open_store
from tests.commands import load_script, run_script
from tests.conftest import build_model_folder, write_sources
from tests.faults import Outcome, Stages

STAGE_2 = ("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs")
STAGE_3, STAGE_4 = "fast_estimate_linear_regression_alpaca.py", "fast_estimate_forward_selection.py"
TRAINING = ("--batch_size", "8", "--lr", "1e-2", "--max_tokens_per_batch", "200")
DIM = ("--project_dim", "16")
NAMED = ("--save_name", "toy")


class World:
    """A folder with data and a model beside it, the commands of every stage, and what they leave undisturbed."""

    def __init__(self, root: Path, stages: Stages) -> None:
        self.root, self.stages = root, stages
        build_model_folder("llama", root / "model")
        self.empty = root / "empty"
        self.empty.mkdir()
        write_sources(self.empty / "sources.jsonl", {"up a": 20, "down": 20, "up b": 20, "down/2": 20})
        write_sources(self.empty / "target.jsonl", {"goal": 20})
        (self.empty / "three.txt").write_text("0\n1\n2 3\n")
        data = [
            "--data_files",
            "sources.jsonl",
            "--target_files",
            "target.jsonl",
            "--heldout_share",
            "0.1",
            "--data_key",
            "toy",
        ]
        self.flags = [*data, "--model_key", "../model", "--train_lora", "--lora_rank", "4", "--lora_alpha", "8"]
        training = ["custom_train_alpaca.py", *self.flags, *TRAINING[:4]]
        drawn = ["--sampled_tasks", "sampled_tasks/toy.txt", "--number_of_subsets", "6", "--subset_size", "2"]
        self.commands = [
            [*training, "--epochs", "2", "--checkpoint_at", "0.5", "1.0"],
            [*STAGE_2, *self.flags, *DIM, "--representations", "--save_projection_matrix", *TRAINING[4:]],
            [*training, *NAMED, "--epochs", "1", "--subset_file", "three.txt"],
            [STAGE_3, *self.flags, *DIM, *NAMED, *drawn],
            [STAGE_4, *self.flags, *DIM, *NAMED],
            ["notebook/select_random_ensemble.py", "results/toy"],
            ["scripts/export_selection.py", *self.flags, *NAMED, "--subset_file", "sampled_tasks/toy_forward_selection.txt"],
        ]  # fmt: skip
        self.states, self.seconds = [self.empty], []
        for number, command in enumerate(self.commands):
            state = self.copy(self.states[-1], f"after_{number}")
            outcome = stages.run(state, command)
            assert outcome.status == 0, outcome.output
            self.states.append(state)
            self.seconds.append(outcome.seconds)

    def copy(self, folder: Path, name: str) -> Path:
        """A fresh copy of a folder, times included."""
        target = self.root / name
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(folder, target)

    def after(self, number: int, name: str) -> Path:
        """A fresh copy of what so many stages leave."""
        return self.copy(self.states[number], name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, stages: Stages) -> World:
    return World(tmp_path_factory.mktemp("faults"), stages)


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder, hidden ones too, without the seconds that things took and the commands typed."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.suffix == ".json" and (path.name == MANIFEST or "results" in path.parts):
            timed = ("seconds", "peak_memory", "command", "commands")
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in timed}
        elif path.name == "results.csv":
            found[name] = pd.read_csv(path, dtype=str).drop(columns="seconds").to_csv()
        else:
            found[name] = path.read_bytes()
    return found


def assert_same(found: Path, expected: Path) -> None:
    """The same files with the same bytes, and no other file."""
    found, expected = contents(found), contents(expected)
    assert found.keys() == expected.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []


def kill(stopped: Outcome) -> None:
    """Kill a process that has stopped, and wait until it is dead."""
    assert stopped.status is None, stopped.output
    os.kill(stopped.process, signal.SIGKILL)
    stat = Path(f"/proc/{stopped.process}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


# --- killed ---------------------------------------------------------------------------------------------------


def kill_and_go_on(world: World, seed: int, kills_of_each: int) -> int:
    """All stages, each killed some times at random moments and started again until it is done; the number of kills."""
    rng, folder, kills = random.Random(seed), world.copy(world.empty, "killed"), 0
    for number, command in enumerate(world.commands):
        for _ in range(kills_of_each):
            moment = {"kill_after": rng.uniform(0.02, 0.95) * world.seconds[number]}
            if rng.random() < 0.5:
                moment = {"kill_at": rng.randrange(1, 12)}
            outcome = world.stages.run(folder, command, **moment)
            assert outcome.status in (0, -signal.SIGKILL), outcome.output
            if outcome.status == 0:
                break
            kills += 1
        outcome = world.stages.run(folder, command)
        assert outcome.status == 0, outcome.output
    assert_same(folder, world.states[-1])
    return kills


def test_killed_stages_go_on_and_leave_what_one_run_leaves(world: World) -> None:
    kills, seed = 0, 0
    while kills < 10:
        kills, seed = kills + kill_and_go_on(world, seed, kills_of_each=3), seed + 1


@pytest.mark.slow
def test_killed_many_times(world: World) -> None:
    assert sum(kill_and_go_on(world, seed, kills_of_each=4) for seed in range(100, 112)) >= 150


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
def test_killed_before_each_change_of_a_folder(world: World, number: int) -> None:
    """Between any two renames, removals and new folders of a stage."""
    command = world.commands[number]
    for change in range(1, 1000):
        folder = world.after(number, "torn")
        killed = world.stages.run(folder, command, kill_at=change)
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.output
        outcome = world.stages.run(folder, command)
        assert outcome.status == 0, outcome.output
        assert_same(folder, world.states[number + 1])
    assert change > 1


def test_killed_while_the_store_is_finished(world: World) -> None:
    """From the last row to the folder's name: the moments, the manifest, the rename, the signs."""
    folder = world.after(1, "finishing")
    part = ".step_step=16.part"
    moments = [f"{part}/{name}" for name in ("samples.npz", "moments_tasks.npz", MANIFEST)]
    for moment in (*moments, f"{part}'", "step_step=16/projection_signs.npz"):
        stopped = world.stages.run(folder, world.commands[1], stop_at=moment)
        kill(stopped)
    assert world.stages.run(folder, world.commands[1]).status == 0
    assert_same(folder, world.states[2])


def test_a_dead_writers_files_are_removed_and_a_living_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "[a] table.v2.json"
    (tmp_path / ".[a] table.v2.deadbeef.json").write_text("half")
    (tmp_path / ".[a] table.v2.of somebody else.json").write_text("kept")
    with atomic_write(path) as first:
        write_json(path, {"second": True})
        assert first.exists()
        first.write_text("{}")
    assert path.read_text() == "{}"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, ".[a] table.v2.of somebody else.json"}


# --- two at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, moment", [(0, "step_step=8/manifest.json"), (1, "step_step=8.part/samples.npz"), (2, "results.csv")]
)
def test_the_second_process_is_refused(world: World, number: int, moment: str) -> None:
    """While the first is at work; when it has died, its place is taken."""
    folder, command = world.after(number, "two"), world.commands[number]
    first = world.stages.run(folder, command, stop_at=moment)
    assert first.status is None, first.output
    second = world.stages.run(folder, command)
    kill(first)
    assert second.status == 1
    last = second.output.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"process {first.process} on {socket.gethostname()}" in last
    assert command[0] in last and "Traceback" not in second.output
    third = world.stages.run(folder, command)
    assert third.status == 0, third.output
    assert_same(folder, world.states[number + 1])


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    held_by = f"run is being written by process {os.getpid()} on "
    with locked(tmp_path / "run"), pytest.raises(ValueError, match=held_by), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
    with locked(), locked(tmp_path / "deep" / "er" / "run"):
        assert {path.name for path in tmp_path.rglob("*")} == {"deep", "er", ".run.lock"}
    assert not list(tmp_path.iterdir())


# --- disks ----------------------------------------------------------------------------------------------------


def error_line(output: str) -> str:
    """The one line that a user is shown."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


ROOM = (100, 2_000, 5_000, 12_000, 25_000)


@pytest.mark.parametrize("largest_file", [7_000, *(pytest.param(size, marks=pytest.mark.slow) for size in ROOM)])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(world: World, largest_file: int) -> None:
    """Files of every stage in turn find no room."""
    folder, refused = world.copy(world.empty, "full"), []
    for number, command in enumerate(world.commands):
        outcome = world.stages.run(folder, command, largest_file=largest_file)
        if outcome.status:
            refused.append(number)
            line = error_line(outcome.output)
            assert "cannot use " in line and "file too large" in line and "ulimit -f" in line, line
            outcome = world.stages.run(folder, command)
            assert outcome.status == 0, outcome.output
    assert refused
    assert_same(folder, world.states[-1])


@pytest.mark.parametrize(
    "number, name", enumerate(["external_lightning_logs", "gradients", "results", "sampled_tasks"])
)
def test_a_file_in_the_place_of_a_folder(world: World, number: int, name: str) -> None:
    folder = world.after(number, "occupied")
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).write_text("mine")
    outcome = world.stages.run(folder, world.commands[number])
    assert outcome.status == 1
    line = error_line(outcome.output)
    assert name in line and "a file stands where a folder is to be; move it away" in line
    (folder / name).unlink()
    assert world.stages.run(folder, world.commands[number]).status == 0


def test_a_folder_that_cannot_be_written(world: World) -> None:
    """For root too: the stage gives up root's rights first."""
    with tempfile.TemporaryDirectory() as name:
        open_to_all, number = Path(name), 3
        shutil.copytree(world.states[number], open_to_all / "workspace")
        shutil.copytree(world.root / "model", open_to_all / "model")
        for path in [open_to_all, *open_to_all.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            outcome = world.stages.run(open_to_all / "workspace", world.commands[number], unprivileged=True)
        finally:
            for path in [open_to_all, *open_to_all.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)
    assert outcome.status == 1
    line = error_line(outcome.output)
    assert "permission denied" in line and "make that folder writable" in line


# --- another than expected ------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    path.write_text(change(before), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before


def store_of(folder: Path) -> Path:
    return next((folder / "gradients").iterdir())


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """The store under a name that other flags give it."""
    return lambda folder: store_of(folder).rename(str(store_of(folder)).replace(old, new)) and None


def retrained(folder: Path) -> None:
    """Another adapter in the checkpoint's place, whole in itself."""
    run = next((folder / "external_lightning_logs").iterdir())
    shutil.rmtree(run / "step_step=8")
    shutil.copytree(run / "step_step=16", run / "step_step=8")


def version_2(folder: Path) -> None:
    for path in store_of(folder).glob(f"*/{MANIFEST}"):
        edit(path, lambda text: text.replace(f'"version": {ARTIFACT_VERSION}', '"version": 2'))


def other_weights(folder: Path) -> None:
    path = next((folder.parent / "other_model").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


MISMATCHES = {
    "model": (other_weights, [], "base_fingerprint: found "),
    "tokenizer": (
        lambda folder: edit(folder.parent / "other_model" / "tokenizer.json", lambda text: text.replace('"→"', '"←"')),
        [],
        "tokenizer_fingerprint: found ",
    ),
    "data file": (
        lambda folder: edit(folder / "sources.jsonl", lambda text: text.replace("ALPHA", "OMEGA")),
        [],
        "data_fingerprint: found ",
    ),
    "split": (lambda folder: None, ["--heldout_share", "0.2"], "data_fingerprint: found "),
    "output function": (
        renamed("dim_16", "dim_16_margin"),
        ["--output_function", "margin"],
        "output_function: found loss, expected margin",
    ),
    "projection": (lambda folder: None, ["--projection", "dense"], "projection: found sketch, expected dense"),
    "d": (renamed("dim_16", "dim_8"), ["--project_dim", "8"], "dim: found 16, expected 8"),
    "seed": (renamed("run_0", "run_1"), ["--run", "1"], "seed: found 0, expected 1"),
    "version": (version_2, [], f"has version 2, this code reads version {ARTIFACT_VERSION}"),
    "adapter's shape": (lambda folder: None, ["--lora_alpha", "16"], "alpha"),
    "adapter": (retrained, [], "checkpoint_fingerprint: found "),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_store_of_something_else_is_refused(world: World, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At stage 2, which would go on with it, unless only the data changed, whose rows it takes again; and at stages 3 and
    4, which would estimate from it."""
    change, flags, message = MISMATCHES[what]
    folder = world.after(2, "changed")
    shutil.rmtree(world.root / "other_model", ignore_errors=True)
    shutil.copytree(world.root / "model", world.root / "other_model")
    # the store as stage 2 leaves it for a model in that place
    for path in folder.rglob(MANIFEST):
        path.write_text(path.read_text().replace('"../model"', '"../other_model"'))
    for run in (*folder.glob("external_lightning_logs/*"), *folder.glob("gradients/*")):
        run.rename(run.with_name(run.name.replace("model_toy", "other_model_toy")))
    shared = ["../other_model" if word == "../model" else word for word in world.flags]
    monkeypatch.chdir(folder)
    checkpoint = [str(next(Path("external_lightning_logs").glob("*/step_step=8")))]
    commands = [[*STAGE_2, "--representations"], [STAGE_3], [STAGE_4]]
    for command in commands:
        run_script(*command, *shared, *DIM, "--load_model_dir", *checkpoint)  # it fits as it is
    change(folder)
    for command in commands[what in ("data file", "split") : 1 if what == "adapter" else 3]:
        with pytest.raises(ValueError, match=message) as caught:
            run_script(*command, *shared, *DIM, *flags, "--load_model_dir", *checkpoint)
        assert any(cure in str(caught.value).lower() for cure in ("remove ", "give the flags", "pass --"))
    if what in ("data file", "split", "model"):
        with pytest.raises(ValueError, match=r"external_lightning_logs/.*_fingerprint: found .*--load_model_dir"):
            run_script(*commands[0], *shared, *DIM, *flags)


def test_data_that_was_only_touched_fits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times decide whether the files are read again, not whether they fit."""
    monkeypatch.chdir(world.after(2, "touched"))
    os.utime("sources.jsonl", (0, 0))
    run_script(STAGE_3, *world.flags, *DIM, *NAMED)


# --- damaged files --------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 4
    path.write_bytes(content)


def swap(path: Path) -> None:
    shutil.copy(path.parent.with_name("step_step=16") / path.name, path)


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["projected", "outputs", "representations"])
def test_a_damaged_array_is_found(world: World, damage: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.after(2, "damaged"))
    (path,) = Path("gradients").glob(f"*/step_step=8/{name}.npy")
    damage(path)
    estimator = {"projected": "kernel", "outputs": "ridge", "representations": "representation"}[name]
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"{name}\.npy is (damaged|gone).*Remove .*step_step=8 and"
    ):
        run_script(STAGE_3, *world.flags, *DIM, *NAMED, "--estimator", estimator)


def test_estimates_from_moments_do_not_read_the_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of gigabytes are checked when they are read; moments name the rows they are of."""
    monkeypatch.chdir(world.after(2, "unread"))
    monkeypatch.setattr(StoredPart, "rows", property(lambda part: pytest.fail("the rows were read")))
    run_script(STAGE_3, *world.flags, *DIM, *NAMED)


def test_damaged_moments_and_tokens_are_made_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Wherever a byte of the file is another: its numbers never are."""
    folder = world.after(2, "moments")
    monkeypatch.chdir(folder)
    (part,) = open_store(store_of(folder), ["step_step=8"], "")
    path, rng, expected = part.folder / "moments_tasks.npz", random.Random(0), part.estimation_part()
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        headers = [info.header_offset + byte for info in archive.infolist() for byte in (0, 8, 10, 30)]
    for position in [*headers, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole)
        flip(path, position)
        found = part.estimation_part()
        for field, values in vars(expected.train).items():
            np.testing.assert_allclose(getattr(found.train, field), values, rtol=1e-6)
    assert "is damaged" in capsys.readouterr().out
    (cached,) = Path("cache/tokens").iterdir()
    cached = cached / "completion.bin"
    tokens = cached.read_bytes()
    for damage in (truncate,):
        damage(cached)
        args = load_script("custom_train_alpaca.py").parse_args(world.flags)
        from src import stages

        stages.make_datamodule(args, stages.load_data(args), stages.starting_model(args, 0))
        assert cached.read_bytes() == tokens
    assert "cache/tokens" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.after(1, "checkpoint"))
    (path,) = Path("external_lightning_logs").glob("*/step_step=8/adapter_model.safetensors")
    truncate(path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged.*train it again"):
        run_script(*STAGE_2, *world.flags, *DIM)
    path.with_name(MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="step_step=8 is not finished"):
        run_script(*STAGE_2, *world.flags, *DIM)


def test_a_table_that_was_changed_is_not_scored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.after(4, "table"))
    edit(Path("results/toy/estimates.csv"), lambda text: text + "0,0,1,1,1,1,1\n")
    with pytest.raises(ValueError, match=r"estimates\.csv is damaged.*Run stage 3 again"):
        run_script("notebook/select_random_ensemble.py", "results/toy")


# --- numbers that are none ------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, samples: set[int]) -> None:
    """Gradients of these samples are not numbers."""
    original = GradientCollector.__call__

    def collect(self: GradientCollector, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        indices = batch["sample_index"]
        rows, outputs = original(self, batch)
        rows[[index in samples for index in indices.tolist()]] = float("inf")
        return rows, outputs

    monkeypatch.setattr(GradientCollector, "__call__", collect)


def samples_of(world: World, split: str, task: str) -> list[int]:
    args = load_script("custom_train_alpaca.py").parse_args(world.flags)
    from src.stages import load_data

    return [
        example.sample_index for example in load_data(args).examples if (example.split, example.task) == (split, task)
    ]


@pytest.fixture
def at_stage_2(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In a folder where stage 1 has run; the command of stage 2."""
    monkeypatch.chdir(world.after(1, "numbers"))
    return [*STAGE_2, *world.flags, *DIM]


def test_a_gradient_that_is_no_number_stops_and_names_its_sample(
    world: World, at_stage_2: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = samples_of(world, "train", "down/2")[3]
    poisoned(monkeypatch, {sample})
    message = rf"sample {sample} \(train row of task down/2: 'down/2 .*its gradient is not finite at step_step=8"
    with pytest.raises(ValueError, match=message):
        run_script(*at_stage_2)


def test_more_dimensions_than_the_gradient_has(at_stage_2: list[str], capsys: pytest.CaptureFixture) -> None:
    run_script(*at_stage_2[: -len(DIM)], "--project_dim", "1300")
    assert "--project_dim 1300 is above p = 1,280" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--subset_file", "three.txt"]], ids=["meta-training", "truth"])
def test_a_training_loss_that_is_no_number_stops(
    world: World, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.after(0, "diverging"))
    training = ["custom_train_alpaca.py", *world.flags, "--batch_size", "4", "--lr", "1e30", "--epochs", "1"]
    with pytest.raises(ValueError, match=r"the training loss is (nan|inf) after \d+ optimizer steps, at samples (\d+ \(.*\)(, |;)){4}.*--lr"):  # fmt: skip
        run_script(*training, *more)
    assert not list(Path().rglob("results.csv")) and not list(Path().glob(f"external_lightning_logs/*/{MANIFEST}"))


def test_estimates_do_not_depend_on_batches_and_the_order_of_files(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one checkpoint, by the tasks' names."""
    folder = world.after(1, "order")
    monkeypatch.chdir(folder)
    lines = Path("sources.jsonl").read_text().splitlines(keepends=True)
    for number in (0, 1):
        Path(f"part_{number}.jsonl").write_text("".join(lines[40 * number : 40 * number + 40]))
    (checkpoint,) = Path("external_lightning_logs").glob("*/step_step=8")
    Path("pairs.txt").write_text("0 1\n0 3\n1 2\n2\n")
    tables = []
    for name, order, tokens in (("a", (0, 1), "4096"), ("b", (0, 1), "100"), ("c", (1, 0), "300")):
        shared = ["--data_files", *(f"part_{number}.jsonl" for number in order), *world.flags[2:]]
        shared[shared.index("toy")] = name
        shared += [*DIM, "--load_model_dir", str(checkpoint)]
        run_script(*STAGE_2, *shared, "--max_tokens_per_batch", tokens)
        run_script(STAGE_3, *shared, "--sampled_tasks", "pairs.txt", "--save_name", name)
        tables.append(pd.read_csv(f"results/{name}/estimates.csv", dtype={"subset": str}))
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], rtol=1e-4)
