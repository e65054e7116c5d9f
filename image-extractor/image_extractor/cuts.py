"""Bins and cuts: which events pass, their reconstructed energy, their energy bin.

Reads and writes the dictionary {(run_number, event_number): (bin_index, reconstructed_energy in
TeV)} as *.pkl (a pickled plain dict, as historic), *.json (for people) and *.h5 (PyTables, for
millions of events). Membership means that the event passed.

In memory it is three sorted arrays, 20 bytes an event. Pickles are read by an unpickler that builds
nothing but dicts, tuples, lists and numbers: a pickle from elsewhere can therefore run no code.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError

JSON_FORMAT = "bins-cuts-dict"
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
    """One uint64 a row, from its run_number and event_number."""
    return rows["run_number"].astype(np.uint64) << np.uint64(32) | rows["event_number"]


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for plain data: any class or function in the stream is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain data")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to outside objects")


class CutsTable:
    """The events that passed, for look-up by (run_number, event_number).

    Parameters
    ----------
    rows : (n,) array of ROW
        In any order; each event once.

    Raises
    ------
    DataError
        If an event is listed twice with different values, or a bin is negative.
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
                f"{source}: run {run} event {event} is listed "
                f"{'twice' if same.size == 1 else 'more than once'}."
            )
        if self.bins.size and self.bins.min() < 0:
            raise DataError(f"{source}: energy bin {self.bins.min()}; bins count from 0.")

    def __len__(self) -> int:
        return self._keys.size

    def get(self, run_number: int, event_number: int) -> tuple[int, float] | None:
        """(bin_index, energy in TeV) of an event that passed, else None."""
        if not 0 <= event_number < 1 << 32:
            return None
        key = np.uint64(run_number << 32 | event_number)
        i = int(np.searchsorted(self._keys, key))
        if i == self._keys.size or self._keys[i] != key:
            return None
        return int(self.bins[i]), float(self.energies[i])

    @classmethod
    def from_dict(cls, events: Mapping[Any, Any], source: str = "bins_cuts_dict") -> CutsTable:
        """Build from {(run_number, event_number): (bin_index, energy)}; raises DataError."""
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
                    f"{source}: entry {key!r}: {value!r}; expected "
                    "(run_number, event_number): (bin_index, energy in TeV)."
                )
        return cls(rows, source)


def load_cuts(path: str | Path) -> CutsTable:
    """Read a dictionary of bins and cuts from *.pkl, *.json or *.h5 (told apart by content).

    Raises
    ------
    DataError
        If the file cannot be read, holds anything but plain data, or has the wrong form.
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
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: broken JSON ({error}).") from error
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused as a pickle of bins and cuts: {error}.") from error
    # A damaged pickle makes the standard library raise nearly anything.
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
            f"{path}: not a pickle of bins and cuts ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(events, dict):
        raise DataError(f"{path}: holds a {type(events).__name__}, expected a dict.")
    return CutsTable.from_dict(events, str(path))


def _read_json(tree: Any, path: Path) -> np.ndarray:
    if not isinstance(tree, dict) or tree.get("format") != JSON_FORMAT or "events" not in tree:
        raise DataError(f'{path}: not a JSON of bins and cuts: expected "format": "{JSON_FORMAT}".')
    try:
        return np.array([tuple(row) for row in tree["events"]], ROW)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f'{path}: an entry of "events" is not [run, event, bin, energy in TeV] ({error}).'
        ) from error


def _read_h5(path: Path) -> np.ndarray:
    import tables

    try:
        with tables.open_file(str(path)) as f:
            return f.root.events.read().astype(ROW)
    except (tables.HDF5ExtError, tables.NoSuchNodeError, ValueError) as error:
        raise DataError(f"{path}: not an HDF5 file of bins and cuts (table /events).") from error


class CutsWriter:
    """Write a dictionary of bins and cuts batch by batch, in bounded memory; whole or not at all.

    Parameters
    ----------
    path : Path
        The suffix chooses the format: .pkl, .json, .h5 or .hdf5.
    description : dict
        Cuts, bins and sources, kept in JSON and HDF5 files.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path, self.description = path, description
        self._temporary = path.with_name(f".{path.name}.partial")
        self.suffix = path.suffix.lower()
        if self.suffix not in (".pkl", ".pickle", ".json", ".h5", ".hdf5"):
            raise DataError(f"{path}: the name must end in .pkl, .json or .h5.")

    def __enter__(self) -> CutsWriter:
        if self.suffix in (".h5", ".hdf5"):
            import tables

            self._h5 = tables.open_file(str(self._temporary), "w")
            self._table = self._h5.create_table(
                "/", "events", ROW, filters=tables.Filters(complevel=1, shuffle=True)
            )
            self._h5.root._v_attrs.description_json = json.dumps(self.description)
            return self
        self._file = self._temporary.open("wb")
        if self.suffix == ".json":
            head = json.dumps({"format": JSON_FORMAT, "version": 1, **self.description}, indent=1)
            self._file.write(head[: head.rindex("}")].rstrip().encode() + b',\n "events": [')
            self._is_empty = True
        else:
            self._file.write(b"\x80\x02}")  # protocol 2, an empty dict
        return self

    def write(self, rows: np.ndarray) -> None:
        """Append events (array of ROW), each event once over all batches."""
        if not rows.size:
            return
        if self.suffix in (".h5", ".hdf5"):
            self._table.append(rows)
        elif self.suffix == ".json":
            self._file.write("".join(self._json_lines(rows)).encode())
        else:
            packed = np.empty(rows.size, PICKLE_ROW)
            for name, code in (
                ("J", b"J"),
                ("J2", b"J"),
                ("J3", b"J"),
                ("G", b"G"),
                ("t", b"\x86"),
                ("t2", b"\x86"),
            ):
                packed[name] = code  # BININT, BINFLOAT, TUPLE2
            packed["run"], packed["event"] = rows["run_number"], rows["event_number"]
            packed["bin"], packed["energy"] = rows["bin"], rows["energy"]
            self._file.write(b"(" + packed.tobytes() + b"u")  # MARK, pairs, SETITEMS

    def _json_lines(self, rows: np.ndarray) -> Iterator[str]:
        for row in rows.tolist():
            yield ("\n  " if self._is_empty else ",\n  ") + json.dumps(row)
            self._is_empty = False

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.suffix in (".h5", ".hdf5"):
            self._h5.close()
        else:
            if self.suffix == ".json":
                self._file.write(b"\n ]\n}\n")
            else:
                self._file.write(b".")
            self._file.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)


def bin_indices(energies_tev: np.ndarray, edges_tev: Iterable[float]) -> np.ndarray:
    """Bin of each energy, half-open (lower <= E < upper); -1 outside, and for NaN.

    Parameters
    ----------
    energies_tev : (n,) array, TeV
    edges_tev : sequence of n_bins + 1 floats, TeV, rising
    """
    edges = np.asarray(list(edges_tev))
    energies = np.asarray(energies_tev, np.float64)
    index = np.searchsorted(edges, energies, side="right") - 1
    return np.where((index >= 0) & (index < edges.size - 1) & ~np.isnan(energies), index, -1)
