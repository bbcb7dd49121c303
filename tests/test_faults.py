"""Processes that are killed, disks that are full, files that are not what they should be, numbers that are none."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src import config, store
from src.artifacts import ARTIFACT_VERSION, MANIFEST, atomic_write, locked, write_json
from src.gradients import GradientCollector
from src.stage_train import load_data
from tests.commands import COLLECT, ENSEMBLE, ESTIMATE, EXPORT, SELECT, TRAIN, load_script, refused, run_script
from tests.conftest import build_model_folder, write_sources
from tests.faults import Outcome, Stages

NAMED, DIM = ("--save_name", "toy"), ("--project_dim", "16")
SMALL_BATCHES = ("--max_tokens_per_batch", "200")


class World:
    """A folder with data and a model beside it, the commands of every stage, and what they leave undisturbed."""

    def __init__(self, root: Path, stages: Stages, model: Path | None = None, rows: int = 20) -> None:
        self.root, self.stages = root, stages
        if model is None:
            build_model_folder("llama", root / "model")
        else:
            (root / "model").symlink_to(model.resolve())
        self.empty = root / "empty"
        self.empty.mkdir()
        write_sources(self.empty / "sources.jsonl", dict.fromkeys(("up a", "down", "up b", "down/2"), rows))
        write_sources(self.empty / "target.jsonl", {"goal": rows})
        (self.empty / "three.txt").write_text("0\n1\n2 3\n")
        flags = "--data_files sources.jsonl --target_files target.jsonl --heldout_share 0.1 --model_key ../model --train_lora "
        self.flags = (flags + "--lora_rank 4 --lora_alpha 8 --batch_size 8 --lr 1e-2").split()
        training = [TRAIN, *self.flags, *NAMED]
        drawn = ["--sampled_tasks", "sampled_tasks/toy.txt", "--number_of_subsets", "6", "--subset_size", "2"]
        selected = ["--subset_file", "sampled_tasks/toy_forward_selection.txt"]
        self.commands = [
            [*training, "--epochs", "2", "--checkpoint_at", "0.5", "1.0"],
            [*COLLECT, *NAMED, *DIM, "--representations", "--save_projection_matrix", *SMALL_BATCHES],
            [TRAIN, *NAMED, "--subset_file", "three.txt"],
            [ESTIMATE, *NAMED, *drawn],
            [SELECT, *NAMED],
            [ENSEMBLE, "results/toy"],
            [EXPORT, *NAMED, *selected],
        ]
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
def world(tmp_path_factory, stages):
    return World(tmp_path_factory.mktemp("faults"), stages)


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder, hidden ones too but locks, without the seconds that things took and the commands typed."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name.endswith(".lock"):
            continue
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


def kill_until(world: World, kills: int, seed: int, kills_of_each: int) -> None:
    """In one folder after the other, until there are so many kills; what it took is printed."""
    started, found, first = time.perf_counter(), 0, seed
    while found < kills:
        found, seed = found + kill_and_go_on(world, seed, kills_of_each), seed + 1
    took = f"{time.perf_counter() - started:.0f} s; undisturbed, a folder takes {sum(world.seconds):.0f} s"
    print(f"\n{found} kills in {seed - first} folders, {took}")


def test_killed_stages_go_on_and_leave_what_one_run_leaves(world):
    kill_until(world, 10, seed=0, kills_of_each=3)


@pytest.mark.slow
def test_killed_many_times(world):
    kill_until(world, 150, seed=100, kills_of_each=4)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif("KILLED_MODEL" not in os.environ, reason="KILLED_MODEL names no folder of a pretrained model")
def test_killed_with_a_real_model(tmp_path_factory, stages):
    """KILLED_MODEL=data/smollm2, on rows of a few words."""
    world = World(tmp_path_factory.mktemp("real"), stages, Path(os.environ["KILLED_MODEL"]), rows=8)
    kill_until(world, 40, seed=200, kills_of_each=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
def test_killed_before_each_change_of_a_folder(world, number):
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


def test_killed_while_the_store_is_finished(world):
    """From the last row to the folder's name: the moments, the manifest, the rename, the signs."""
    folder = world.after(1, "finishing")
    part = ".step_step=16.part"
    files = (f"{part}/samples.npz", f"{part}/moments_tasks.npz", f"{part}/{MANIFEST}", f"{part}'")
    for moment in (*files, "step_step=16/projection_signs.npz"):
        kill(world.stages.run(folder, world.commands[1], stop_at=moment))
    assert world.stages.run(folder, world.commands[1]).status == 0
    assert_same(folder, world.states[2])


def test_a_dead_writers_files_are_removed_and_a_living_ones_kept(tmp_path):
    path = tmp_path / "[a] table.v2.json"
    (tmp_path / ".[a] table.v2.99999999.part.json").write_text("half")
    (tmp_path / f".[a] table.v2.{os.getppid()}.part.json").write_text("of a living process")
    with atomic_write(path) as first:
        first.write_text("{}")
    write_json(path, {"second": True})
    assert json.loads(path.read_text()) == {"second": True}
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, f".[a] table.v2.{os.getppid()}.part.json"}


MOMENTS = ["step_step=8/manifest.json", "step_step=8.part/samples.npz", "results.csv"]


@pytest.mark.parametrize(("number", "moment"), enumerate(MOMENTS))
def test_the_second_process_is_refused(world, number, moment):
    """While the first is at work; when it has died, its place is taken."""
    folder, command = world.after(number, "two"), world.commands[number]
    first = world.stages.run(folder, command, stop_at=moment)
    assert first.status is None, first.output
    second = world.stages.run(folder, command)
    kill(first)
    assert second.status == 1 and "is being written by another process" in error_line(second.output)
    third = world.stages.run(folder, command)
    assert third.status == 0, third.output
    assert_same(folder, world.states[number + 1])


def test_a_lock_ends_with_its_block(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="run is being written by"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"), locked(tmp_path / "deep" / "er" / "run"):
        pass


def error_line(output: str) -> str:
    """The one line that a user is shown."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


ROOM = (100, 2_000, 5_000, 12_000, 25_000)


@pytest.mark.parametrize("largest_file", [7_000, *(pytest.param(size, marks=pytest.mark.slow) for size in ROOM)])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(world, largest_file):
    """Files of every stage in turn find no room."""
    folder, refused = world.copy(world.empty, "full"), []
    for number, command in enumerate(world.commands):
        outcome = world.stages.run(folder, command, largest_file=largest_file)
        if outcome.status:
            refused.append(number)
            line = error_line(outcome.output)
            assert "cannot use " in line and "file too large" in line, line
            outcome = world.stages.run(folder, command)
            assert outcome.status == 0, outcome.output
    assert refused
    assert_same(folder, world.states[-1])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A disk of its own in memory, of so many bytes, or as many more than are taken; the same one each time."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", place], check=False, capture_output=True).returncode:
        pytest.skip("not allowed to mount a file system")

    def with_room(bytes_free: int) -> Path:
        found = os.statvfs(place)
        size = (found.f_blocks - found.f_bfree) * found.f_frsize + bytes_free
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
        return place

    yield with_room
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("room", [20_000, *(pytest.param(size, marks=pytest.mark.slow) for size in (0, 4_096, 60_000))])
def test_a_disk_that_is_really_full_is_one_line_and_the_same_command_goes_on(world, disk, room):
    """In the middle of rows, moments, checkpoints, tables and manifests: whatever finds no room."""
    shutil.copytree(world.root / "model", disk(1 << 24) / "model")
    folder, full = shutil.copytree(world.empty, disk(1 << 24) / "folder"), 0
    for command in world.commands:
        disk(room)
        outcome = world.stages.run(folder, command)
        if outcome.status:
            full += 1
            assert re.search(
                r"cannot use .*no space left on device.*; free space there", error_line(outcome.output).lower()
            )
        disk(1 << 24)
        if outcome.status:
            outcome = world.stages.run(folder, command)
        assert outcome.status == 0, outcome.output
    assert full >= 2
    assert_same(folder, world.states[-1])


WRITTEN = [
    "step_step=8.part/projected.npy",
    "step_step=8.part/.manifest.",
    "external_lightning_logs/",
    "results/toy/.results.",
]


@pytest.mark.parametrize("named", WRITTEN)
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS], ids=["quota", "read-only"])
def test_what_the_system_refuses_is_one_line_and_the_same_command_goes_on(world, named, number):
    """Rows, manifests, weights and tables beyond a quota, or on a disk that became read-only."""
    stage = {"s": 1, "e": 0, "r": 2}[named[0]]
    folder = world.after(stage, "refused")
    outcome = world.stages.run(folder, world.commands[stage], refused=number, named=named)
    assert outcome.status == 1, outcome.output
    cure = "free space there" if number == errno.EDQUOT else "make that folder writable"
    message = rf"cannot use .*{os.strerror(number)}( \(the rows need .* bytes\))?; {cure}"
    assert re.search(message, error_line(outcome.output), re.IGNORECASE), outcome.output
    assert world.stages.run(folder, world.commands[stage]).status == 0
    assert_same(folder, world.states[stage + 1])


FOLDERS = ["external_lightning_logs", "gradients", "results", "sampled_tasks"]


@pytest.mark.parametrize("number, name", enumerate(FOLDERS))
def test_a_file_in_the_place_of_a_folder(world, number, name):
    folder = world.after(number, "occupied")
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).write_text("mine")
    outcome = world.stages.run(folder, world.commands[number])
    assert outcome.status == 1
    line = error_line(outcome.output)
    assert name in line and "a file stands where a folder is to be; move it away" in line
    (folder / name).unlink()
    assert world.stages.run(folder, world.commands[number]).status == 0


def test_a_folder_that_cannot_be_written(world):
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


def results(folder: Path) -> Path:
    return folder / "results" / "toy" / "results.csv"


def saved_by_excel(folder: Path) -> None:
    """With a mark of the byte order and other ends of lines; the last row has been removed."""
    lines = results(folder).read_text().splitlines()[:-1]
    results(folder).write_text("\ufeff" + "\r\n".join(lines) + "\r\n", newline="")


def saved_by_excel_with_semicolons(folder: Path) -> None:
    edit(results(folder), lambda text: "\ufeff" + text.replace(",", ";"))


def cell_became_a_date(folder: Path) -> None:
    edit(results(folder), lambda text: text.replace("\n2 3,", "\n02. Mrz,"))


def manifest_half_copied(folder: Path) -> None:
    (path,) = folder.glob(f"external_lightning_logs/*/step_step=8/{MANIFEST}")
    path.write_bytes(path.read_bytes()[:100])


def weights_not_yet_copied(folder: Path) -> None:
    (path,) = folder.glob("external_lightning_logs/*/step_step=8/adapter_model.safetensors")
    path.unlink()


def clock_jumped_back(folder: Path) -> None:
    """What is there is from the future, and newer files seem older."""
    for place, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (4e9 - place, 4e9 - place))


def lock_of_another_user(folder: Path) -> None:
    locks = list((folder / "cache" / "locks").glob("*.lock"))
    assert locks
    for path in locks:
        path.chmod(0o444)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (2, saved_by_excel, None),
        (2, saved_by_excel_with_semicolons, r"no column 'subset'; expected commas between columns"),
        (2, cell_became_a_date, r"results\.csv, line 4: subset is '02\. Mrz', expected task ids separated by spaces"),
        (1, manifest_half_copied, r"manifest\.json is damaged \(.*remove external_lightning_logs.*and run: python"),
        (1, weights_not_yet_copied, r"adapter_model\.safetensors is gone.*train it again"),
        (1, clock_jumped_back, None),
        (3, clock_jumped_back, None),
        (2, lock_of_another_user, r"cannot use .*\.lock: permission denied; make that folder writable"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_of_others_is_one_line_or_does_no_harm(
    world: World, number: int, change: Callable[[Path], None], message: str | None
) -> None:
    is_of_result = change.__name__.startswith(("saved_by", "cell", "lock"))  # what the stage itself has left
    folder = world.after(number + is_of_result, "others")
    change(folder)

    def there() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}

    before = there()
    outcome = world.stages.run(folder, world.commands[number], unprivileged=change is lock_of_another_user)
    if message is None:
        assert outcome.status == 0, outcome.output
        assert_same(folder, world.states[number + 1])
    else:
        assert outcome.status == 1 and re.search(message, error_line(outcome.output)), outcome.output
        assert there() == before  # nothing wrong is kept


def test_a_workspace_that_was_moved_goes_on(world: World) -> None:
    """All of it, deeper and under another name, with the model beside it."""
    moved = world.root / "elsewhere" / "deeper" / "moved"
    shutil.rmtree(world.root / "elsewhere", ignore_errors=True)
    shutil.copytree(world.states[2], moved)
    shutil.copytree(world.root / "model", moved.parent / "model")
    for command in world.commands[2:]:
        outcome = world.stages.run(moved, command)
        assert outcome.status == 0, outcome.output
    assert_same(moved, world.states[-1])


def test_no_stage_asks_the_network(world: World) -> None:
    """With HF_HUB_OFFLINE=1, as all tests run."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    folder = world.copy(world.empty, "offline")
    for command in world.commands:
        outcome = world.stages.run(folder, command, offline=True)
        assert outcome.status == 0, outcome.output
    assert_same(folder, world.states[-1])
    (folder / "dials.py").write_text("def parse_args(_): ...\ndef main(_):\n    import socket; socket.socket()\n")
    assert world.stages.run(folder, [str(folder / "dials.py")], offline=True).status == 99  # it would have been seen


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    path.write_text(change(before), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before


def retrained(folder: Path) -> None:
    """Another adapter in the checkpoint's place, whole in itself."""
    run = next((folder / "external_lightning_logs").iterdir())
    shutil.rmtree(run / "step_step=8")
    shutil.copytree(run / "step_step=16", run / "step_step=8")


def other_weights(folder: Path) -> None:
    (path,) = (folder / "model").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


def other_tokenizer(folder: Path) -> None:
    edit(folder / "model" / "tokenizer.json", lambda text: text.replace('"→"', '"←"'))


OTHERS = [
    (other_weights, [], "is an adapter of the base model|base_fingerprint: found "),
    (other_tokenizer, [], "tokenizer_fingerprint: found "),
    (retrained, [], "checkpoint_fingerprint: found "),
    (None, ["--projection", "dense"], "projection: found sketch, expected dense"),
    (None, ["--max_length", "99"], "--max_length 512 there, 99 typed"),
    (None, ["--lora_alpha", "16"], "--lora_alpha 8 there, 16 typed"),
    (None, ["--run", "1"], "--run 0 there, 1 typed"),
]


@pytest.mark.parametrize(("change", "flags", "message"), OTHERS)
def test_a_store_of_something_else_is_refused(world, change, flags, message, monkeypatch):
    """Stage 2 goes on with its own rows only."""
    folder = world.after(2, "changed")
    shutil.copytree(world.root / "model", folder / "model")
    for path in folder.rglob(MANIFEST):
        path.write_text(path.read_text().replace('"../model"', '"model"'))
    monkeypatch.chdir(folder)
    command = [*COLLECT, *NAMED, *DIM, "--representations"]
    run_script(*command)  # it fits as it is
    if change:
        change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        run_script(*command, *flags)
    assert any(cure in str(caught.value).lower() for cure in ("remove ", "leave these flags out", "pass --"))


def test_artifacts_of_another_version_are_no_parents(world, monkeypatch):
    monkeypatch.chdir(world.after(2, "version"))
    for path in Path("gradients").glob(f"*/*/{MANIFEST}"):
        edit(path, lambda text: text.replace(f'"version": {ARTIFACT_VERSION}', '"version": 2'))
    message = r"called that|no projected gradients"
    refused(message, run_script, ESTIMATE, *NAMED, error=(ValueError, FileNotFoundError))
    message = f"has version 2, this code reads version {ARTIFACT_VERSION}; remove"
    refused(message, run_script, *COLLECT, *NAMED, *DIM, "--representations")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["projected", "outputs", "representations", "samples"])
def test_a_damaged_part_is_found(world, damage, name, monkeypatch):
    monkeypatch.chdir(world.after(2, "damaged"))
    (path,) = Path("gradients").glob(f"*/step_step=8/{name}.np[yz]")
    damage(path)
    message = rf"{name}\.np. is (damaged|gone).*Remove .*step_step=8 and"
    refused(message, run_script, ESTIMATE, *NAMED, error=(ValueError, FileNotFoundError))


def test_estimates_from_moments_do_not_read_the_rows(world, monkeypatch):
    """Moments that are cut, or of other rows, are made anew."""
    monkeypatch.chdir(world.after(2, "unread"))
    (path,) = Path("gradients").glob("*/step_step=8/moments_tasks.npz")
    with monkeypatch.context() as patch:
        patch.setattr(store.StoredPart, "rows", property(lambda part: pytest.fail("the rows were read")))
        run_script(ESTIMATE, *NAMED)
        kept, whole = pd.read_csv("results/toy/estimates.csv"), path.read_bytes()
        path.write_bytes(whole[:-100])
        with pytest.raises(pytest.fail.Exception, match="the rows were read"):
            run_script(ESTIMATE, *NAMED)
    run_script(ESTIMATE, *NAMED)
    pd.testing.assert_frame_equal(pd.read_csv("results/toy/estimates.csv"), kept)


def test_a_damaged_checkpoint_and_a_changed_table_are_found(world, monkeypatch):
    monkeypatch.chdir(world.after(4, "checkpoint"))
    edit(Path("results/toy/estimates.csv"), lambda text: text + "0,0,1,1,1,1,1\n")
    refused(r"estimates\.csv is damaged.*Run stage 3 again", run_script, ENSEMBLE, "results/toy")
    (path,) = Path("external_lightning_logs").glob("*/step_step=8/adapter_model.safetensors")
    cut(path)
    again = [*COLLECT, *NAMED, "--project_dim", "8"]
    refused(r"adapter_model\.safetensors is damaged.*train it again", run_script, *again)
    path.with_name(MANIFEST).unlink()
    refused("step_step=8 is not finished", run_script, *again, error=FileNotFoundError)


def test_a_gradient_that_is_no_number_stops_and_names_its_sample(world, monkeypatch):
    monkeypatch.chdir(world.after(1, "numbers"))
    typed = config.typed_flags(load_script(TRAIN).parse_args(world.flags))
    examples = load_data(config.inherit(config.TrainConfig, typed)).examples
    sample = [example.sample_index for example in examples if (example.split, example.task) == ("train", "down/2")][3]
    original = GradientCollector.__call__

    def collect(self, batch):
        indices = batch["sample_index"]
        rows, outputs = original(self, batch)
        rows[[index == sample for index in indices.tolist()]] = float("inf")
        return rows, outputs

    monkeypatch.setattr(GradientCollector, "__call__", collect)
    message = rf"sample {sample} \(train row of task down/2: 'down/2 .*its gradient is not finite at step_step=8"
    refused(message, run_script, *COLLECT, *NAMED, *DIM)


@pytest.mark.parametrize("more", [[], ["--subset_file", "three.txt"]], ids=["meta-training", "truth"])
def test_a_training_loss_that_is_no_number_stops(world, more, monkeypatch):
    monkeypatch.chdir(world.after(0, "diverging"))
    training = [TRAIN, *world.flags[:-4], "--batch_size", "4", "--lr", "1e30", "--epochs", "1"]
    message = r"the training loss is (nan|inf) after \d+ optimizer steps, at samples (\d+ \(.*\)(, |;)){4}.*--lr"
    refused(message, run_script, *training, *more)
    assert not list(Path().rglob("results.csv")) and not list(Path().glob(f"external_lightning_logs/*/{MANIFEST}"))


def test_estimates_do_not_depend_on_batches_and_the_order_of_files(world, monkeypatch):
    monkeypatch.chdir(world.after(1, "order"))
    lines = Path("sources.jsonl").read_text().splitlines(keepends=True)
    for number in (0, 1):
        Path(f"part_{number}.jsonl").write_text("".join(lines[40 * number : 40 * number + 40]))
    Path("pairs.txt").write_text("0 1\n0 3\n1 2\n2\n")
    tables = []
    for order, tokens in (((0, 1), "4096"), ((0, 1), "100"), ((1, 0), "300")):
        files = ["--data_files", *(f"part_{number}.jsonl" for number in order)]
        run_script(*COLLECT, *NAMED, *DIM, *files, "--max_tokens_per_batch", tokens)
        run_script(ESTIMATE, *NAMED, "--sampled_tasks", "pairs.txt")
        tables.append(pd.read_csv("results/toy/estimates.csv", dtype={"subset": str}))
        shutil.rmtree("gradients")
    for table in tables[1:]:
        np.testing.assert_allclose(table.iloc[:, 2:], tables[0].iloc[:, 2:], rtol=1e-4)
