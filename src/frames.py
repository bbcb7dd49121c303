"""Frames that pandas pickled, read without running them.

Unpickling calls what the file names. Here the names are only recorded, and the columns are rebuilt from the recorded
bytes and strings: nothing that a file says is imported or called.
"""

from __future__ import annotations

import io
import pickle
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data import require_file

_PICKLE_NAMES = {
    "pandas": r"DataFrame|BlockManager|_unpickle_block|_new_Index|(Int64|Range|)Index|NA|Categorical"
    r"|__pyx_unpickle_NDArrayBacked|(Arrow)?StringArray(NumpySemantics)?|ArrowExtensionArray"
    r"|(Integer|Floating|Boolean)Array|(U?Int\d+|Float\d+|Boolean|String|Categorical|Arrow)Dtype",
    "numpy": r"_reconstruct|_frombuffer|scalar|ndarray|dtype",
    "pyarrow": r"_restore_array|py_buffer|type_for_alias",
    "builtins": r"slice|bytearray",
    "__builtin__": r"slice|bytearray|bytes",
    "_codecs": r"encode",
}


class _Recorded:
    """What a pickle asks to have built, on record and never built: a name, the arguments, the state."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Recorded:
        recorded = super().__new__(cls)
        recorded.args, recorded.state = args, None
        return recorded

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RecordingUnpickler(pickle._Unpickler):
    """Turns every name that a pickle mentions into a recorder; names that no frame needs are refused.

    It builds on the unpickler written in Python: the one in C sizes its tables by what a damaged file claims.
    """

    def find_class(self, module: str, name: str) -> type[_Recorded]:
        package = module.split(".")[0]
        if not re.fullmatch(_PICKLE_NAMES.get(package, r"(?!)"), name):
            hint = " (a Hugging Face Dataset: convert it with .to_pandas() first)" if package == "datasets" else ""
            raise pickle.UnpicklingError(f"refused, it asks for {module}.{name}, which no frame needs{hint}")
        return type(name, (_Recorded,), {"name": name})


def _decode(node: Any) -> Any:
    """The array, range, slice or scalar behind a recorded object; anything else is given back as it is.

    Only the nesting that pandas writes is decoded, and numpy checks every length against the bytes that are there.
    """
    match getattr(node, "name", None):
        case None:
            return node
        case "NA":
            return None
        case "encode" | "bytes" | "bytearray":  # how older pickle protocols spell bytes
            data = node.args[0] if node.args else b""
            return data.encode("latin-1") if isinstance(data, str) else b"".join([_decode(data)])
        case "slice":
            return slice(*node.args)
        case "dtype":  # only kinds whose bytes are plain values; the flags in the pickle are not believed
            if not re.fullmatch(r"[biufUS]\d+", node.args[0]):
                raise ValueError(f"values of numpy type {node.args[0]} are not read; keep text and numbers")
            return np.dtype(node.args[0]).newbyteorder(node.state[1])
        case "scalar":
            return np.frombuffer(_decode(node.args[1]), _decode(node.args[0]), count=1).item()
        case "_frombuffer":
            data, dtype, shape, order = node.args
            return np.frombuffer(_decode(data), _decode(dtype)).reshape(shape, order=order)
        case "_reconstruct":
            _, shape, dtype, is_fortran, data = node.state
            values = _decode_items(data) if isinstance(data, list) else np.frombuffer(_decode(data), _decode(dtype))
            return values.reshape(shape, order="F" if is_fortran else "C")
        case "_new_Index":
            kind, parts = node.args
            is_range = kind.name == "RangeIndex"
            return range(parts["start"], parts["stop"], parts["step"]) if is_range else _decode(parts["data"])
        case "__pyx_unpickle_NDArrayBacked":  # a dtype and an array, in the order of the pandas version
            dtype, array = (node.state or node.args[2])[:2]
            if dtype.name in ("_reconstruct", "_frombuffer"):
                dtype, array = array, dtype
            if node.args[0].name == "Categorical":
                return np.array([*_decode(dtype.state["categories"]), None], dtype=object)[_decode(array)]
            return _decode(array)
        case "ArrowStringArray" | "ArrowStringArrayNumpySemantics" | "ArrowExtensionArray":
            return _decode_arrow_strings(*node.state["_pa_array" if "_pa_array" in node.state else "_data"].args[0])
        case "IntegerArray" | "FloatingArray" | "BooleanArray":
            return np.where(_decode(node.state["_mask"]), None, _decode(node.state["_data"]))
        case name:
            raise ValueError(f"{name} is not expected in this place")


def _decode_items(items: list) -> np.ndarray:
    """(len,) objects; recorded numbers and missing values among them are decoded, and nothing deeper."""
    values = (_decode(item) if getattr(item, "name", None) in ("scalar", "NA") else item for item in items)
    return np.fromiter(values, dtype=object, count=len(items))


def _decode_arrow_strings(
    kind: Any, length: int, _nulls: int, start: int, buffers: list, _children: list, _dictionary: None
) -> np.ndarray:
    """(length,) texts of a pickled Arrow string array: offsets into one UTF-8 buffer, and a validity bitmap."""
    width = {"string": "<i4", "large_string": "<i8"}.get(kind.args[0])
    if width is None:
        raise ValueError(f"values of Arrow type {kind.args[0]} are not read; keep text and plain numpy numbers")
    validity, offsets, text = (b"" if buffer is None else b"".join([_decode(buffer.args[0])]) for buffer in buffers)
    bounds = np.frombuffer(offsets or bytes(8), width)[start : start + length + 1]  # no rows may mean no offsets
    there = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[start : start + length]
    if len(bounds) != length + 1 or (np.diff(bounds, prepend=0, append=len(text)) < 0).any():
        raise ValueError(f"an Arrow text column of {length} rows has damaged offsets")
    texts = (text[first:last].decode("utf-8") for first, last in pairwise(bounds.tolist()))
    flags = there if validity else np.ones(length)
    return _decode_items([value if flag else None for value, flag in zip(texts, flags, strict=True)])


def _decode_frame(node: _Recorded) -> pd.DataFrame:
    blocks, axes = node.state["_mgr"].args
    names, labels = (_decode(axis) for axis in axes)
    columns: dict[int, np.ndarray] = {}
    for block in blocks:
        values, placement = (_decode(part) for part in block.args[:2])
        places = range(*placement.indices(len(names))) if isinstance(placement, slice) else placement.tolist()
        columns |= zip(places, values if values.ndim == 2 else [values], strict=True)
    if len(columns) != len(names) or set(columns) != set(range(len(names))):
        raise ValueError(f"its blocks do not make up {len(names)} columns")
    return pd.DataFrame(columns, index=pd.Index(labels)).sort_index(axis=1).set_axis(list(names), axis=1)


def _decode_labels(node: Any) -> list:
    """Index labels in an array, an index or a list."""
    labels = _decode(node)
    labels = labels.tolist() if isinstance(labels, np.ndarray) else _decode_items(list(labels)).tolist()
    if len(set(labels)) < len(labels):
        raise ValueError(f"among {len(labels)} index labels some repeat")
    return labels


def read_pickle(path: str | Path) -> pd.DataFrame | dict[Any, list]:
    """Read a pickled DataFrame of texts and numbers, or a pickled dict of index labels, and run no code of it.

    Unpickling imports and calls whatever a file asks for. Here every such request is refused unless pandas (2.0
    to 3) or numpy (1.26 to 2) makes it for a frame, and even then it is only recorded; the columns are rebuilt
    from the recorded bytes and strings. Categories come back as their values, missing values as None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: compressed, damaged, or neither frame nor dict; names the file and what it asks for.
    """
    content = require_file(Path(path)).read_bytes()
    if not content.startswith(b"\x80"):
        raise ValueError(
            f"{path} is not a pickle of protocol 2 or later; if it is compressed (gzip, zip), unpack it, or save "
            "it with df.to_pickle(path, compression=None)"
        )
    try:
        root = _RecordingUnpickler(io.BytesIO(content)).load()
        if isinstance(root, dict):
            return {key: _decode_labels(labels) for key, labels in root.items()}
        if getattr(root, "name", None) != "DataFrame":
            raise ValueError(f"it holds a {getattr(root, 'name', type(root).__name__)}")
        return _decode_frame(root)
    except Exception as error:  # a damaged file can make unpickling and decoding raise anything
        raise ValueError(
            f"{path} cannot be read as a pickled DataFrame or dev split map: {type(error).__name__}: {error}. "
            "Expected what DataFrame.to_pickle writes for columns of text and numbers; use .jsonl for anything else"
        ) from error
