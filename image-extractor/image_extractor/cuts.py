"""The dictionary of bins and cuts: which events passed, their reconstructed energy and energy bin.

Reads and writes {(run_number, event_number): (bin_index, reconstructed_energy in TeV)} as *.pkl (a
pickled plain dict, the historic format), *.json (for people to read) or *.h5 (PyTables, for large
dictionaries). An event passed the cuts if it is listed.

In memory the dictionary is three sorted arrays, 20 bytes per event. Pickles are read by an
unpickler that builds only dicts, tuples, lists and numbers, so that a pickle from elsewhere cannot
run code.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .transaction import whole_file

JSON_FORMAT = "bins-cuts-dict"
NUMPY_REMEDY = (
    "Convert NumPy's numbers to plain ones before pickling: "
    "{(int(r), int(e)): (int(b), float(tev)) for (r, e), (b, tev) in d.items()}."
)
REMEDY = "Make it with prepare_cuts_dict.py."
# One entry of a pickled dict: opcodes and, between them, the numbers.
PICKLE_ROW = np.dtype(
    [
        ("J", "S1"),
        ("run", "<i4"),
        ("J2", "S1"),
        ("event", "<i4"),
        ("t", "S1"),
        ("J3", "S1"),
        ("bin", "<i4"),
        ("G", "S1"),
        ("energy", ">f8"),
        ("t2", "S1"),
    ]
)
ROW = np.dtype([("run_number", "<u4"), ("event_number", "<u4"), ("bin", "<i4"), ("energy", "<f8")])


def event_keys(rows: np.ndarray) -> np.ndarray:
    """Combine run_number and event_number of each row in one uint64."""
    return rows["run_number"].astype(np.uint64) << np.uint64(32) | rows["event_number"]


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for plain data, which refuses any class or function in the stream."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


class CutsTable:
    """The events that passed, for look-up by (run_number, event_number).

    Parameters
    ----------
    rows : (n,) array of ROW
        In any order, with each event once.

    Raises
    ------
    DataError
        If an event is listed twice or a bin is negative.
    """

    def __init__(self, rows: np.ndarray, source: str = "bins_cuts_dict") -> None:
        self.source = source
        keys = event_keys(rows)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self.bins = rows["bin"][order]
        self.energies = rows["energy"][order]
        same = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if same.size:
            run, event = divmod(int(self._keys[same[0]]), 1 << 32)
            raise DataError(
                f"{source}: run {run} event {event} is listed twice (expected each event once; "
                f"repeated entries: {same.size}). Make the dictionary again."
            )
        if self.bins.size and self.bins.min() < 0:
            raise DataError(
                f"{source}: has energy bin {self.bins.min()} (expected 0 or higher). "
                "Make the dictionary again."
            )

    def __len__(self) -> int:
        return self._keys.size

    def get(self, run_number: int, event_number: int) -> tuple[int, float] | None:
        """Look up (bin_index, energy in TeV) of an event; None if it did not pass."""
        if not 0 <= event_number < 1 << 32:
            return None
        key = np.uint64(run_number << 32 | event_number)
        i = int(np.searchsorted(self._keys, key))
        if i == self._keys.size or self._keys[i] != key:
            return None
        return int(self.bins[i]), float(self.energies[i])

    @classmethod
    def from_dict(cls, events: Mapping[Any, Any], source: str = "bins_cuts_dict") -> CutsTable:
        """Convert {(run_number, event_number): (bin_index, energy)}. Raises DataError."""
        rows = np.empty(len(events), ROW)
        for i, (key, value) in enumerate(events.items()):
            try:
                (run, event), (bin_index, energy) = key, value
                rows[i] = (run, event, bin_index, energy)
                whole = int(run) == run and int(event) == event and int(bin_index) == bin_index
            except (TypeError, ValueError, OverflowError):
                whole = False
            if not whole:
                raise DataError(
                    f"{source}: not a valid entry: {key!r}: {value!r} (expected "
                    "(run_number, event_number): (bin_index, energy in TeV)). "
                    "Make the dictionary again."
                )
        return cls(rows, source)


def load_cuts(path: str | Path) -> CutsTable:
    """Read a dictionary of bins and cuts; its content decides whether it is pickle, JSON or HDF5.

    Raises
    ------
    DataError
        If the file cannot be read, contains anything but plain data, or has another structure.
    """
    path = Path(path)
    try:
        with path.open("rb") as f:
            start = f.read(8)
            f.seek(0)
            if start == b"\x89HDF\r\n\x1a\n":
                return CutsTable(_read_h5(path), str(path))
            if start[:1] == b"{":
                return CutsTable(_read_json(json.load(f), path), str(path))
            events = _PlainUnpickler(f, encoding="latin1").load()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). {REMEDY}") from error
    except pickle.UnpicklingError as error:
        remedy = NUMPY_REMEDY if "numpy" in str(error) else REMEDY
        raise DataError(
            f"{path}: refused as a pickle of bins and cuts: {error} "
            f"(expected a dict of tuples of numbers). {remedy}"
        ) from error
    # For a damaged pickle the standard library raises almost any error.
    except (
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        struct.error,
        MemoryError,
        OverflowError,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not a pickle of bins and cuts ({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    if not isinstance(events, dict):
        raise DataError(f"{path}: contains a {type(events).__name__} (expected a dict). {REMEDY}")
    return CutsTable.from_dict(events, str(path))


def _read_json(tree: Any, path: Path) -> np.ndarray:
    if not isinstance(tree, dict) or tree.get("format") != JSON_FORMAT or "events" not in tree:
        raise DataError(
            f'{path}: not a JSON file of bins and cuts (expected "format": "{JSON_FORMAT}" and '
            f'"events"). {REMEDY}'
        )
    try:
        return np.array([tuple(row) for row in tree["events"]], ROW)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f'{path}: not a valid entry in "events" ({error}; expected [run, event, bin, '
            f"energy in TeV]). {REMEDY}"
        ) from error


def _read_h5(path: Path) -> np.ndarray:
    import tables

    try:
        with tables.open_file(str(path)) as f:
            return f.root.events.read().astype(ROW)
    except (tables.HDF5ExtError, tables.NoSuchNodeError, ValueError) as error:
        raise DataError(
            f"{path}: not an HDF5 file of bins and cuts (expected a table /events). {REMEDY}"
        ) from error


@contextlib.contextmanager
def cuts_writer(
    path: Path, description: dict[str, Any]
) -> Iterator[Callable[[np.ndarray], object]]:
    """Write a dictionary of bins and cuts in batches; the file appears whole or not at all.

    Parameters
    ----------
    path : Path
        Its suffix determines the format: .pkl, .json, .h5 or .hdf5.
    description : dict
        Cuts, bins and sources, stored in JSON and HDF5 files.

    Yields
    ------
    callable
        Appends events (array of ROW). Each event may occur once in all batches together.
    """
    suffix = path.suffix.lower()
    if suffix not in (".pkl", ".pickle", ".json", ".h5", ".hdf5"):
        raise DataError(
            f"{path}: not a valid name for a dictionary of bins and cuts "
            "(expected an ending .pkl, .json or .h5). Change the ending."
        )
    with whole_file(path) as temporary:
        if suffix in (".h5", ".hdf5"):
            import tables

            with tables.open_file(str(temporary), "w") as h5:
                packed = tables.Filters(complevel=1, shuffle=True)
                table = h5.create_table("/", "events", ROW, filters=packed)
                h5.root._v_attrs.description_json = json.dumps(description)
                yield table.append
        elif suffix == ".json":
            with temporary.open("w") as text:
                head = json.dumps({"format": JSON_FORMAT, "version": 1, **description}, indent=1)
                text.write(head.removesuffix("\n}") + ',\n "events": [')
                separators = itertools.chain(["\n  "], itertools.repeat(",\n  "))
                yield lambda rows: text.writelines(
                    next(separators) + json.dumps(row) for row in rows.tolist()
                )
                text.write("\n ]\n}\n")
        else:
            with temporary.open("wb") as f:
                f.write(b"\x80\x02}")  # protocol 2, an empty dict
                yield lambda rows: f.write(_pickled_entries(rows))
                f.write(b".")


def _pickled_entries(rows: np.ndarray) -> bytes:
    """Opcodes that add events to the dict on the unpickler's stack."""
    packed = np.empty(rows.size, PICKLE_ROW)
    packed["J"] = packed["J2"] = packed["J3"] = b"J"  # BININT
    packed["t"] = packed["t2"] = b"\x86"  # TUPLE2
    packed["G"] = b"G"  # BINFLOAT
    packed["run"], packed["event"] = rows["run_number"], rows["event_number"]
    packed["bin"], packed["energy"] = rows["bin"], rows["energy"]
    return b"(" + packed.tobytes() + b"u" if rows.size else b""  # MARK, entries, SETITEMS


def bin_indices(energies_tev: np.ndarray, edges_tev: Iterable[float]) -> np.ndarray:
    """Find the bin of each energy (lower <= energy < upper); -1 outside all bins and for NaN.

    Parameters
    ----------
    energies_tev : (n,) array, TeV
    edges_tev : sequence of n_bins + 1 floats, TeV, ascending
    """
    edges = np.asarray(list(edges_tev))
    energies = np.asarray(energies_tev, np.float64)
    index = np.searchsorted(edges, energies, side="right") - 1
    return np.where((index >= 0) & (index < edges.size - 1) & ~np.isnan(energies), index, -1)
