"""Frames that pandas pickled, read without running what the file asks for: only names that frames need are resolved, and
what memory depends on (types, lengths, offsets, places) is checked, not trusted."""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.compat.pickle_compat import Unpickler

from src.data import require_file


class _Frame:
    """Stands for DataFrame: its state holds `_mgr`, the blocks with their places, and the axes."""

    _mgr: tuple[tuple[tuple[Any, Any], ...], tuple[pd.Index, pd.Index]]


def _dtype(name: str, *_: Any) -> np.dtype:
    if not re.fullmatch(r"[biufUSO]\d+", name):
        raise ValueError(f"values of numpy type {name} are not read; keep text and numbers")
    return np.dtype(name, copy=True)  # numpy's own types must not get the state that the file gives


def _bytes(data: Any = b"", *_: Any) -> bytes:
    """A copy that nothing in the file can change later; old protocols spell bytes as Latin-1 text."""
    return data.encode("latin-1") if isinstance(data, str) else bytes(memoryview(data))


def _arrow(state: tuple) -> pa.Array:
    kind, length, _, start, buffers, *_ = state
    array = pa.Array.from_buffers(kind, length, buffers, offset=start)
    array.validate(full=True)  # its offsets may point anywhere
    return array


_OURS: dict[str, Any] = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": None,
    "numpy._reconstruct": lambda *_: np.empty(0, np.int8),  # gets its values with its state
    "numpy._frombuffer": lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
    "numpy.scalar": lambda dtype, data: np.frombuffer(_bytes(data), dtype, count=1).item(),
    "pandas.DataFrame": _Frame,
    "pandas.BlockManager": lambda blocks, axes: (blocks, axes),
    "pandas._unpickle_block": lambda values, places, _ndim: (values, places),
    "pyarrow._restore_array": _arrow,
    "pyarrow.py_buffer": lambda data: pa.py_buffer(_bytes(data)),
    "pyarrow.type_for_alias": pa.type_for_alias,
    "_codecs.encode": _bytes,
    **dict.fromkeys(("builtins.bytearray", "__builtin__.bytearray", "__builtin__.bytes"), _bytes),
    **dict.fromkeys(("builtins.slice", "__builtin__.slice"), slice),
}
"""Package and name that a pickle asks for -> what it gets. All else that it gets is what `_OF_PANDAS` allows."""
_OF_PANDAS = re.compile(
    r"pandas(\.arrays|\.core\.(arrays|dtypes|indexes)(\.\w+)*|\._libs\.(arrays|missing))?\."
    r"(NA|_new_Index|(Int64|Range)?Index|__pyx_unpickle_NDArrayBacked|Categorical|(Arrow)?StringArray"
    r"|ArrowExtensionArray|(Integer|Floating|Boolean)Array|(U?Int\d+|Float\d+|Boolean|String|Categorical|Arrow)Dtype)"
)


class _FrameUnpickler(Unpickler):
    """pandas' unpickler in pure Python: the one in C sizes its tables by what a damaged file claims."""

    def find_class(self, module: str, name: str) -> Any:
        package = module.split(".")[0]
        if (known := f"{package}.{name}") in _OURS:
            return _OURS[known]
        if _OF_PANDAS.fullmatch(f"{module}.{name}"):
            return super().find_class(module, name)
        hint = " (a Hugging Face Dataset: convert it with .to_pandas() first)" if package == "datasets" else ""
        raise pickle.UnpicklingError(f"refused, it asks for {module}.{name}, which no frame needs{hint}")

    def load_build(self) -> None:
        made, state = self.stack[-2:]
        if isinstance(made, np.dtype):  # only its byte order: with false flags numpy takes bytes for pointers
            order = made.newbyteorder(state[1]) if made.kind not in "Ob" else made
            self.stack[-1] = (3, order.byteorder, None, None, None, made.itemsize, made.alignment, made.flags)
        elif isinstance(made, np.ndarray) and not made.size:  # once: a second state frees values that others look at
            _, shape, dtype, _, values = state
            width = 1 if isinstance(values, list) else dtype.itemsize
            if min(shape, default=0) < 0 or not width or len(values) != math.prod(shape) * width:
                raise ValueError(f"an array of shape {shape} has {len(values)} values or bytes")  # numpy would read on
        elif not isinstance(made, (_Frame, pd.api.extensions.ExtensionArray, pd.api.extensions.ExtensionDtype)):
            raise pickle.UnpicklingError(f"refused, it sets the state of a {type(made).__name__}")
        super().load_build()

    dispatch: ClassVar[dict] = {
        **Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: Unpickler.load_binbytes8,  # a bytearray would be made as long as the file claims
    }


def _columns(frame: _Frame) -> pd.DataFrame:
    blocks, (names, labels) = frame._mgr
    columns: dict[int, np.ndarray] = {}
    for values, places in blocks:
        if isinstance(values, pd.Categorical):  # pandas trusts the codes
            values = np.array([*values.categories, None], dtype=object)[values.codes]
        elif not isinstance(values, np.ndarray):
            values = values.to_numpy(object, na_value=None)
        places = range(*places.indices(len(names))) if isinstance(places, slice) else places.tolist()
        columns |= zip(places, values if values.ndim == 2 else [values], strict=True)
    if not columns or len(columns) != len(names) or set(columns) != set(range(len(names))):
        raise ValueError(f"its blocks do not make up {len(names)} columns")
    return pd.DataFrame(columns, index=labels).sort_index(axis=1).set_axis(list(names), axis=1)


def read_pickle(path: str | Path) -> pd.DataFrame | dict[Any, list]:
    """Read a pickled DataFrame of texts and numbers (categories come back as values), or a dict of lists of index labels.
    FileNotFoundError: no such file. ValueError: compressed, damaged, or neither frame nor dict; names the file and what it
    asks for.
    """
    content = require_file(Path(path)).read_bytes()
    if not content.startswith(b"\x80"):
        raise ValueError(f"{path} is not a pickle of protocol 2 or later; if it is compressed, unpack it")
    try:
        root = _FrameUnpickler(io.BytesIO(content)).load()
        if isinstance(root, _Frame):
            return _columns(root)
        if not isinstance(root, dict):
            raise ValueError(f"it holds a {type(root).__name__}")
        maps = {key: np.asarray(labels).tolist() for key, labels in root.items()}
        if any(len(set(labels)) < len(labels) for labels in maps.values()):
            raise ValueError("some index labels repeat")
        return maps
    except Exception as error:  # a damaged file can make unpickling raise anything
        raise ValueError(
            f"{path} cannot be read as a pickled DataFrame or dev split map: {type(error).__name__}: {error}. "
            "Expected what DataFrame.to_pickle writes for columns of text and numbers; use .jsonl for anything else"
        ) from error
