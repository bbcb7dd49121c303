"""Bad input: one line that names the culprit and the cure, a status that is not 0, and a folder left as it was."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from src.console import run_stage
from tests import commands
from tests.commands import COLLECT, ENSEMBLE, ESTIMATE, EXPORT, ROOT, SELECT, TRAIN, load_script, run_script
from tests.conftest import write_sources

GRADIENTS, BASE_MODEL = " ".join(COLLECT), "data/make_base_model.py"
COMPARE, COT, COT_ESTIMATE = commands.COMPARE, commands.COT, commands.COT_ESTIMATE
COT_COLLECT, MEASURE = commands.COT_COLLECT, commands.MEASURE


class Executes:
    """What a hostile pickle asks for."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch bad/executed",)


def rows(count: int = 6, **change: object) -> str:
    """Lines of FLAN layout."""
    alike = {"targets": "y", "_task_name": "t"} | change
    return "".join(json.dumps({"inputs": f"x{i}", **alike}) + "\n" for i in range(count))


def prepare(folder: Path, model: Path) -> None:
    """Everything bad that the cases name, below `bad/`."""
    bad = folder / "bad"
    bad.mkdir()
    configuration = json.loads((model / "config.json").read_text())
    changed = "no_config cut_weights no_end pickled_weights no_tokenizer broken_tokenizer shapes code tokens"
    for name in changed.split():
        shutil.copytree(model, bad / name)
    for name in ("folder.jsonl", "folder.txt", "gguf", "adapter"):
        (bad / name).mkdir()
    ending = json.loads((model / "tokenizer_config.json").read_text())
    ending.pop("eos_token")
    contents = {
        "file": "",
        "empty.jsonl": "",
        "long.jsonl": rows(targets="y" * 400),
        "goal.jsonl": rows(_task_name="up a"),
        "arrow.jsonl": rows(targets="→"),
        "columns.csv": "q,a\n1,2\n",
        "empty.txt": "",
        "word.txt": "0 one\n",
        "range.txt": "0 1\n2 99\n",
        "weights.csv": "name,share\nup a,1\nnobody,1\n",
        "zero.csv": "name,share\nup a,0\n",
        "names.csv": "name\nup a\n",
        "estimates.csv": "subset,other\n0 1,2\n",
        "results.csv": "subset,run\n0 1,0\n",
        "not.csv": "\x00\x01\n",
        "plain.pkl": "no pickle",
        "code.pkl": pickle.dumps(Executes()),
        "broken_tokenizer/tokenizer.json": "{}",
        "shapes/config.json": json.dumps({**configuration, "hidden_size": 64}),
        "code/config.json": json.dumps({"model_type": "new", "auto_map": {"AutoConfig": "code.Configuration"}}),
        "gguf/model.gguf": b"GGUF",
        "adapter/adapter_config.json": "{}",
        "cut_weights/model.safetensors": (model / "model.safetensors").read_bytes()[:-100],
        "no_end/tokenizer_config.json": json.dumps(ending),
    }
    for name, content in contents.items():
        (bad / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for path in (bad / "no_config" / "config.json", *(bad / "no_tokenizer").glob("tokenizer*")):
        path.unlink()
    shutil.copytree(next(folder.glob("external_lightning_logs/*/step_step=8")), bad / "checkpoint")
    smaller = AutoModelForCausalLM.from_pretrained(model)
    smaller.resize_token_embeddings(configuration["vocab_size"] - 1)
    smaller.save_pretrained(bad / "tokens")
    (bad / "pickled_weights" / "model.safetensors").rename(bad / "pickled_weights" / "pytorch_model.bin")


def data(file: str) -> list[str]:
    return ["--data_files", f"bad/{file}"]


def model(folder: str) -> list[str]:
    return ["--model_key", f"bad/{folder}"]


OF_ANOTHER = ["--load_model_dir", "bad/checkpoint", *model("tokens")]

CASES: dict[str, tuple[str, list[str], str]] = {
    # files of rows
    "no file": (TRAIN, data("none.jsonl"), r"bad/none\.jsonl does not exist; check the name"),
    "unknown format": (TRAIN, data("file.xlsx"), r"bad/file\.xlsx: instruction data are"),
    "nothing in the file": (TRAIN, data("empty.jsonl"), r"bad/empty\.jsonl is empty"),
    "unknown columns": (TRAIN, data("columns.csv"), r"columns\.csv, row 1 has the columns q, a; expected .*--prompt_column"),
    "column of no source": (TRAIN, ["--task_column", "kind"], r"--task_column kind: none of .*sources\.jsonl.* has such a column"),
    "target trained on": (TRAIN, ["--target_files", "bad/goal.jsonl"], r"goal\.jsonl, line 1: target 'up a' is a task of the training data"),
    "a folder for a file": (TRAIN, data("folder.jsonl"), r"bad/folder\.jsonl is a folder without data files"),
    "a pickle that runs code": (TRAIN, data("code.pkl"), r"bad/code\.pkl cannot be read .* asks for (posix|os)\.system"),
    "no pickle": (TRAIN, data("plain.pkl"), r"bad/plain\.pkl is not a pickle"),
    "both kinds of data": (TRAIN, ["--train_instruction"], r"--train_instruction names files of its own; leave it or --data_files out"),
    "nothing left to train on": (TRAIN, ["--heldout_share", "0.5", "--save_name", "n"], r"held-out shares 0\.5 and 0\.5"),
    # models
    "unknown model": (TRAIN, ["--model_key", "nobody/nothing", "--save_name", "n"], r"--model_key nobody/nothing: cannot load"),
    "no configuration": (TRAIN, model("no_config"), r"--model_key bad/no_config: cannot load bad/no_config \(.*config\.json.*; give a folder"),
    "truncated weights": (TRAIN, model("cut_weights"), r"--model_key bad/cut_weights: cannot load"),
    "pickled weights": (TRAIN, model("pickled_weights"), r"cannot load bad/pickled_weights \(.*model\.safetensors.*\(pickled weights are not read\)"),
    "no tokenizer": (TRAIN, model("no_tokenizer"), r"--model_key bad/no_tokenizer: cannot load the tokenizer of bad/no_tokenizer .*and tokenizer"),
    "broken tokenizer": (TRAIN, model("broken_tokenizer"), r"--model_key bad/broken_tokenizer: cannot load the tokenizer of bad/broken_tokenizer"),
    "weights of other shapes": (TRAIN, model("shapes"), r"bad/shapes .its weights have other shapes than its config\.json says"),
    "code in the folder": (TRAIN, model("code"), r"--model_key bad/code: cannot load bad/code \(.*custom code"),
    "GGUF": (TRAIN, model("gguf/model.gguf"), r"bad/gguf/model\.gguf is a GGUF file.*python data/convert_gguf\.py bad/gguf/model\.gguf FOLDER"),
    "an adapter for a model": (TRAIN, model("adapter"), r"bad/adapter is an adapter without its base model.*--load_model_dir"),
    "tokens without a row": (TRAIN, [*data("arrow.jsonl"), *model("tokens")], r"bad/tokens: the tokenizer has 104 tokens, the embedding 103 rows, and none for → in sample \d+ .*resize_token_embeddings\(104\)"),
    "no end token": (TRAIN, model("no_end"), r"tokenizer of bad/no_end has no end-of-text token"),
    "longer than the context": (TRAIN, [*data("long.jsonl"), "--max_length", "5000", "--save_name", "m"], r"--max_length 5000: a row has \d+ tokens, .* reads 256"),
    "4 bits that are trained": ("custom_train_alpaca.py", ["--use_qlora", "-no-lora"], r"--use_qlora is for a base model"),
    # flags
    "no epochs": (TRAIN, ["--epochs", "-1"], r"--epochs"),
    "no learning rate": (TRAIN, ["--lr", "nan"], r"--lr.*nan"),
    "share above one": (TRAIN, ["--checkpoint_at", "2"], r"--checkpoint_at.*expected a number from 0 to 1"),
    "unknown strategy": (TRAIN, ["--strategy", "magic"], r"--strategy.*invalid choice"),
    "half precision without an adapter": (TRAIN, ["--base_dtype", "bfloat16", "-no-lora"], r"--train_lora"),
    "one and a half tasks": (ESTIMATE, ["--subset_size", "1.5"], r"--subset_size"),
    "no GPU": (TRAIN, ["--accelerator", "cuda"], r"--accelerator cuda: this machine has no CUDA GPU"),
    "a flag with a typing error": (TRAIN, ["--lora_rnak", "8"], r"--lora_rnak 8; did you mean --lora_rank\?"),
    "unknown flag": (TRAIN, ["--learning_rate", "1"], r"unrecognized arguments: --learning_rate"),
    "4 bits to be spread": (TRAIN, ["--use_qlora", "--strategy", "fsdp"], r"--use_qlora is for .* and not --strategy fsdp"),
    "both tracks": (SELECT, ["--dataset_key", "strategy_qa"], r"--dataset_key none there, strategy_qa typed"),
    "adapter of another model": (TRAIN, [*OF_ANOTHER, "--save_name", "n"], r"bad/checkpoint is an adapter of the base model .*, and --model_key is bad/tokens; pass --model_key"),
    "adapter of another rank": (TRAIN, ["--load_model_dir", "bad/checkpoint", "--lora_rank", "8", "--save_name", "n"], r"bad/checkpoint has an adapter of rank 4.*--lora_rank 4"),
    "no checkpoint": (TRAIN, ["--load_model_dir", "none/step_step=1", "--save_name", "n"], r"--load_model_dir none/step_step=1: no folder"),
    # subsets
    "task out of range": (TRAIN, ["--task_idxes", "0", "9"], r"--task_idxes 9: this data has tasks 0 to 3"),
    "negative task": (TRAIN, ["--task_idxes", "-3"], r"--task_idxes"),
    "task twice": (TRAIN, ["--task_idxes", "1", "1"], r"--task_idxes 1 1: a task is named twice"),
    "no subset file": (TRAIN, ["--subset_file", "bad/none.txt"], r"bad/none\.txt does not exist"),
    "empty subset file": (TRAIN, ["--subset_file", "bad/empty.txt"], r"bad/empty\.txt holds no subset"),
    "out of range": (TRAIN, ["--subset_file", "bad/range.txt"], r"bad/range\.txt, line 2: '99' is no task id"),
    "a folder of subsets": (TRAIN, ["--subset_file", "bad/folder.txt"], r"bad/folder\.txt"),
    "weights of a stranger": (TRAIN, ["--task_weights", "bad/weights.csv"], r"task 'nobody' is not among the data's 4 tasks"),
    "weights without shares": (TRAIN, ["--task_weights", "bad/names.csv"], r"no column 'share'"),
    "no weight at all": (TRAIN, ["--task_weights", "bad/zero.csv"], r"shares must be numbers, not negative and not all 0"),
    # gradients
    "other rank": (GRADIENTS, ["--lora_rank", "8"], r"does not exist|rank"),
    "no dimension": (GRADIENTS, ["--project_dim", "0"], r"--project_dim.*at least 1"),
    "other run": (GRADIENTS, ["--run", "3"], r"--run 0 there, 3 typed"),
    # estimates
    "no store": (ESTIMATE, ["--project_dim", "77"], r"--project_dim 32 there, 77 typed"),
    "rho": (ESTIMATE, ["--rho", "-1"], r"--rho.*above 0"),
    "more than exist": (ESTIMATE, ["--number_of_subsets", "99", "--sampled_tasks", "bad/new.txt"], r"99 subsets of 2 out of 4 tasks.*only 6 exist"),
    "margins of losses": (ESTIMATE, ["--estimator", "logistic"], r"margin"),
    "no representations": (ESTIMATE, ["--estimator", "representation"], r"--representations"),
    "truth without losses": (ESTIMATE, ["--calibrate", "bad/results.csv"], r"bad/results\.csv"),
    "no truth": (ESTIMATE, ["--calibrate", "bad/none.csv"], r"bad/none\.csv"),
    # selection
    "start out of range": (SELECT, ["--start_from", "9"], r"9"),
    "budget below every task": (SELECT, ["--budget_rows", "1"], r"budget"),
    "nothing estimated": (ENSEMBLE, ["results/none"], r"results/none"),
    "estimates without columns": (COMPARE, ["bad/estimates.csv", "bad/results.csv"], r"bad/estimates\.csv"),
    "no table": (COMPARE, ["bad/not.csv", "bad/results.csv"], r"bad/not\.csv"),
    "nothing to export": (EXPORT, [], r"found 0 subsets to export, expected one"),
    "nothing trains by that name": (EXPORT, ["--task_idxes", "0", "--for", "axolotle"], r"--for axolotle: expected one of axolotl, llamafactory, trl,"),
    "a seed for no rows": (EXPORT, ["--task_idxes", "0", "--seed", "1"], r"--seed has no effect without --for"),
    "half a row": (EXPORT, ["--max_repeat", "0.5"], r"argument --max_repeat: 0\.5: expected a"),
    # chain of thought
    "data set that climbs": (COT, ["--dataset_key", "../../etc/passwd", "--model_key", "-llama"], r"\.\./\.\./etc/passwd"),
    "no texts for a model": (BASE_MODEL, ["--data_files", "bad/empty.jsonl", "--output_dir", "bad/new"], r"bad/empty\.jsonl is empty"),
}  # fmt: skip


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with size and time."""
    found = (path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts[:1])
    times = ((str(path), path.stat(), path.is_file()) for path in found)
    return {path: (stat.st_size, stat.st_mtime_ns) if is_file else (0, 0) for path, stat, is_file in times}


@pytest.fixture(scope="module")
def place(track, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input") / "workspace"
    shutil.copytree(track[0], folder)
    flags = track[1]
    prepare(folder, Path(flags[flags.index("--model_key") + 1]))
    return folder, flags


def arguments_of(script: str, own: list[str], flags: list[str]) -> tuple[str, list[str]]:
    """The script, and its flags: those that all stages share where it takes them, then the case's own."""
    name, *more = script.split()
    shared = list(flags)
    if name in (ENSEMBLE, COMPARE, COT, COT_ESTIMATE, BASE_MODEL):
        shared = []
    elif name in (ESTIMATE, SELECT):
        shared += ["--project_dim", "32"]
    if name in (ESTIMATE, SELECT, EXPORT) or script == GRADIENTS:
        shared += ["--save_name", "toy"]
    if "-no-lora" in own:
        shared.remove("--train_lora")
    llama = flags[flags.index("--model_key") + 1]
    return name, [*more, *shared, *(llama if word == "-llama" else word for word in own if word != "-no-lora")]


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(case, place, monkeypatch, capsys):
    script, own, pattern = CASES[case]
    folder, flags = place
    monkeypatch.chdir(folder)
    name, arguments = arguments_of(script, own, flags)
    module, before = load_script(name), state(folder)
    with pytest.raises(SystemExit) as stopped:
        run_stage(module.main, module.parse_args(arguments))
    message = stopped.value.code
    if message == 2:  # usage, then one line
        message = capsys.readouterr().err.strip().splitlines()[-1]
    assert isinstance(message, str) and "error: " in message and "\n" not in message and "Traceback" not in message
    assert re.search(pattern, message), message
    assert state(folder) == before
    assert not (folder / "bad" / "executed").exists()


def test_a_script_says_it_on_the_terminal(place):
    """The same from a shell: one line on the error stream, status 1."""
    folder, flags = place
    command = [sys.executable, str(ROOT / TRAIN), *flags, "--subset_file", "bad/word.txt"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1 and "bad/word.txt, line 1: 'one' is no task id" in line
    assert "Traceback" not in ended.stderr


def test_odd_names_of_tasks_work(model_folders, tmp_path, monkeypatch):
    """From training to a selection and its export; nothing is written outside of the workspace."""
    folder = tmp_path / "deep" / "workspace"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    names = ["../../a", "/b é漢🙂\nsecond/", '="c",#']
    rows = ({"inputs": f"{n} {i}", "targets": "yes", "_task_name": n} for n in names for i in range(6))
    commands.write_jsonl("rows.jsonl", rows)
    odd = f"--data_files rows.jsonl --model_key {model_folders['llama']} --train_lora --lora_rank 2 --save_name odd"
    for command in (
        f"{TRAIN} --epochs 1 --checkpoint_at 1.0",
        f"{GRADIENTS} --project_dim 8",
        f"{ESTIMATE} --number_of_subsets 3",
        f"{SELECT} --per_target --weights",
        f"{EXPORT} --task_idxes 0 2",
        f"{TRAIN} --task_weights sampled_tasks/odd_weights.csv",
    ):
        commands.run_script(f"{command} {odd}")
    exported = [row["task"] for row in commands.read_jsonl("results/odd/selected.jsonl")]
    assert sorted(set(exported)) == sorted({sorted(names)[0], sorted(names)[2]})
    assert [path.name for path in [*tmp_path.iterdir(), *(tmp_path / "deep").iterdir()]] == ["deep", "workspace"]


NO_NAME = r"no projected gradients in gradients/ fit; make them with: python \w+\.py"
NO_RUN = r"--save_name toy: nothing finished is called that; there is nothing; make it with stage 2"
NO_TRAINING = r"--save_name toy: nothing finished is called that; there is nothing; make it with stage 1 \(custom_train"
NO_DATA = r"no data: name your files with --data_files.*alpaca_final\.pkl is expected, which does not exist"
NO_RESULTS = r"results/toy does not exist; make it with: python fast_estimate_linear_regression"
TOY = "--save_name toy"
WITHOUT_TRAINING = {
    GRADIENTS: NO_DATA,
    f"{GRADIENTS} {TOY}": NO_TRAINING,
    f"{GRADIENTS} {TOY} --data_files rows.jsonl": NO_TRAINING,
    f"{GRADIENTS} --data_files rows.jsonl": r"external_lightning_logs/\S+ does not exist; make it with: python custom_train_alpaca",
    f"{GRADIENTS} --load_model_dir toy_run_0/step_step=8": r"--load_model_dir \S+: no folder \S+ \(.* no checkpoint yet\); train it",
    f"{COT_COLLECT} {TOY}": NO_TRAINING,
    MEASURE: NO_NAME,
    f"{MEASURE} {TOY}": NO_RUN,
    ESTIMATE: NO_NAME,
    f"{ESTIMATE} {TOY}": NO_RUN,
    f"{COT_ESTIMATE} {TOY}": NO_RUN,
    SELECT: NO_NAME,
    f"{SELECT} {TOY}": NO_RUN,
    f"{TRAIN} {TOY} --subset_file chosen.txt": NO_DATA,
    f"{COT} {TOY} --task_idxes 0": NO_DATA,
    f"{ENSEMBLE} results/toy": NO_RESULTS,
    f"{COMPARE} results/toy/estimates.csv results/toy/results.csv": r"results/toy/results\.csv does not exist; the stage",
    f"{EXPORT} {TOY} --subset_file chosen.txt": NO_DATA,
    "scripts/report.py results/toy": NO_RESULTS,
}


@pytest.mark.parametrize("command", WITHOUT_TRAINING)
def test_a_folder_without_a_meta_training(command, workspace):
    """Every later stage says in one line what is not there and what makes it, and leaves nothing."""
    if "rows.jsonl" in command:
        write_sources(workspace / "rows.jsonl", {"up": 20})
    script, *arguments = command.split()
    module, before = load_script(script), state(workspace)
    with pytest.raises(SystemExit) as stopped:
        run_stage(module.main, module.parse_args(arguments))
    assert re.search(f"error: {WITHOUT_TRAINING[command]}", line := str(stopped.value.code)) and "\n" not in line, line
    assert state(workspace) == before


def test_the_status_of_a_folder_without_a_meta_training(workspace, capsys):
    run_script("scripts/status.py")
    assert capsys.readouterr().out == "No finished run here yet: python custom_train_alpaca.py --help\n"
    assert not list(workspace.iterdir())
