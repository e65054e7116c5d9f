"""Damage every kind of file that is read, and see what becomes of it.

Each mutation is read by the functions that the commands use, in a process of its own. It must end
in one line of error or in exactly the content of the sound file; anything else is counted:
tracebacks (of any kind, or a crash), silent (other content, no error), hangs, over_memory.
Each stage is also interrupted in every way (interruptions.py): kills_different and
interruptions_different count those after which the next run's files are not those of an
undisturbed run.

Writes  results/faults/summary.json; exit code 1 unless all of these are 0.

    PYTHONPATH=. python tests/faults.py --mutations 2400 --seed 1      # or make test-faults
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import utils
from utils import DataError

import h5py
import mock_cubes
import numpy as np
import pandas as pd
from astropy.io import fits
from conftest import train, write_fits
from interruptions import interrupt_stages, summed

import archive_files
import data_io
import fits_utils
import h5_files
import loops
import mock.truth
from mock.galaxy import draw_params, simulate_galaxy
from recipe import Recipe, digest_of, sealed, sealed_text

TIME_LIMIT_S, MEMORY_LIMIT = 10, 2 << 30
FAULTS = ("kills_different", "interruptions_different", "tracebacks", "silent", "hangs",
          "over_memory")  # fmt: skip
OUTCOMES = ("refused", "same", "other request", *FAULTS)
COUNTED = ("kills", "interruptions", "mutations")
GALAXY = "8485-1901"


@dataclass
class Target:
    """One file, and how it is read.

    `read` gets the folder of the file. Of `forged` content, made with a right checksum or none,
    only the manner of refusal is judged: to the reader it is what somebody wrote.
    """

    file: str
    read: Callable[[Path], Any]
    forged: list[tuple[str, Callable[[Path], None]]] = field(default_factory=list)
    has_checksum: bool = True
    is_sum: bool = False
    """A FITS file's DATASUM is a sum of words: it cannot notice that two change places."""


# Bytes


def damaged(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One random damage of a file's bytes, and its name."""
    n, b = len(content), bytearray(content)
    kind = rng.choice(
        ["bit", "bit", "bit in head", "character", "character", "byte", "cut", "zeros", "noise",
         "blanks", "swap", "tail", "lost block"]
    )  # fmt: skip
    at = int(rng.integers(n if kind != "bit in head" else min(n, 6000)))
    block = slice(at // 512 * 512, at // 512 * 512 + int(rng.choice([1, 8, 64, 512])))
    if kind in ("bit", "bit in head"):
        b[at] ^= 1 << int(rng.integers(8))
    elif kind == "character":  # a printable one becomes another
        printable = np.flatnonzero((np.frombuffer(content, "u1") - 32) < 95)
        at = int(rng.choice(printable)) if printable.size else at
        digits = b"0123456789" if chr(b[at]).isdigit() else bytes(range(32, 127))
        b[at] = digits[int(rng.integers(len(digits)))]
    elif kind == "byte":
        b[at] = int(rng.integers(256))
    elif kind == "cut":
        b = b[: int(rng.choice([at, n - 1, n - 4]))]
    elif kind in ("zeros", "blanks", "noise"):
        size = len(b[block])
        fill = {"zeros": bytes(size), "blanks": b" " * size, "noise": rng.bytes(size)}
        b[block] = fill[str(kind)]
    elif kind == "swap":
        other = int(rng.integers(n)) // 512 * 512
        one, two = bytes(b[block]), bytes(b[other : other + len(b[block])])
        if len(one) == len(two):
            b[block], b[other : other + len(one)] = two, one
    elif kind == "lost block":
        del b[block]
    else:
        b += rng.bytes(int(rng.choice([1, 512])))
    return f"{kind} at {at} of {n}", bytes(b)


def npz() -> bytes:
    with io.BytesIO() as f:
        np.savez(f, a=np.zeros(3))
        return f.getvalue()


HTML = b"<html><head><title>404</title></head><body>Not found</body></html>"
FOREIGN = {
    "nothing": b"", "html": HTML, "gzip of html": gzip.compress(HTML), "blanks": b" " * 9000,
    "null": b"null", "list": b"[]", "object": b"{}", "number": b"1", "nested": b"[" * 100_000,
    "npz": npz(), "latin1": "k\xe4se,\xff\n".encode("latin1") * 99, "zeros": bytes(9000),
    "pickle": pickle.dumps({"a": 1}), "half a gzip": gzip.compress(bytes(9000))[:20],
    "one line": b"x" * 2_000_000, "signature of HDF5": b"\x89HDF\r\n\x1a\n" + bytes(3000),
    "npy of objects": b"\x93NUMPY\x01\x00" + struct.pack("<H", 54)
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "npy too large": b"\x93NUMPY\x01\x00" + struct.pack("<H", 70)
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000)}   ",
    "FITS of blanks": b"SIMPLE  =                    T".ljust(80) + b" " * 1_400_000,
    "gzip of a FITS of blanks": gzip.compress(b"SIMPLE  =".ljust(80) + b" " * 500_000_000, 1),
}  # fmt: skip
"""Files of other kinds, and such that cost time or memory."""


# What is forged: well-formed files with wrong content


def json_forgeries(path: Path, seal: Callable[[dict], dict]) -> Iterator[tuple[str, Callable]]:
    """Each key of a JSON object left out or of another type."""

    def change(path: Path, key: str, value: Any) -> None:
        content = json.loads(path.read_text())
        content = {k: v for k, v in content.items() if k not in ("checksum", key)}
        path.write_text(json.dumps(seal(content if value is KeyError else {**content, key: value})))

    for key in sorted({*json.loads(path.read_text())} - {"checksum"}):
        for value in (KeyError, None, 5, "x", [], {}, [[1], {"a": None}], 1e308, "\0"):
            yield f"{key}: {value!r}", partial(change, key=key, value=value)


def h5_forgeries(path: Path) -> Iterator[tuple[str, Callable]]:
    """Each dataset and attribute left out, linked elsewhere, of another type, shape or size."""

    def change(path: Path, act: Callable[[h5py.File], None]) -> None:
        with h5py.File(path, "a") as f:
            act(f)
            h5_files.seal(f)

    def put(f: h5py.File, name: str, value: Any, **options: Any) -> None:
        del f[name]
        if options:
            f.create_dataset(name, **options).attrs["crc32"] = 0  # too large to be summed here
        elif value is not None:
            f[name] = value

    def put_attribute(f: h5py.File, name: str, value: Any) -> None:
        del f.attrs[name]
        if value is not None:
            f.attrs[name] = value

    with h5py.File(path) as f:
        datasets, attributes = list(f), list(f.attrs)
    huge = {"shape": (1000, 1000, 2040), "dtype": "f4", "chunks": (4, 4, 2040)}
    values = {
        "lost": None, "text": "x", "scalar": 1.0, "empty": h5py.Empty("f4"), "bytes": b"\xff\xfe",
        "one axis": np.zeros(3), "other shape": np.zeros((2, 3, 4)), "nan": np.full((3, 3), np.nan),
        "external": h5py.ExternalLink("/dev/zero", "/x"), "soft": h5py.SoftLink("/nowhere"),
    }  # fmt: skip
    for name in datasets:
        for word, value in values.items():
            yield f"{name} {word}", partial(change, act=partial(put, name=name, value=value))
        act = partial(put, name=name, value=None, **huge)
        yield f"{name} huge", partial(change, act=act)
        raw = {"shape": (1 << 28,), "dtype": "f8", "external": [("/dev/zero", 0, 1 << 31)]}
        act = partial(put, name=name, value=None, **raw)
        yield f"{name} outside", partial(change, act=act)
    for name in attributes:
        if name == "crc32":
            continue
        for word, value in (("lost", None), ("number", 5), ("text", "x"), ("array", np.zeros(3))):
            act = partial(put_attribute, name=name, value=value)
            yield f"attribute {name} {word}", partial(change, act=act)


def fits_forgeries(path: Path) -> Iterator[tuple[str, Callable]]:
    """Cards with other values, in files without checksums."""

    def set_card(path: Path, at: int, text: str) -> None:
        content = bytearray(path.read_bytes())
        content[at : at + 80] = text.encode("latin1")[:80].ljust(80)
        path.write_bytes(content)

    content = path.read_bytes()
    keys = ("BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "NAXIS3", "PCOUNT", "GCOUNT", "XTENSION",
            "EXTNAME", "END", "SCINPVEL", "PLATEIFU", "DRP3QUAL", "EBVGAL", "MANGAID", "TFIELDS",
            "TFORM1", "TTYPE1", "C01", "C05", "MASKNAME")  # fmt: skip
    values = ("'x'", "-1", "0", "7", "1000000000", "1" + "0" * 18, "1e400", "NaN", "T", "", "\xff")
    for at in range(0, len(content), 80):
        key = content[at : at + 8].decode("latin1").strip()
        if key in keys:
            for value in values:
                text = f"{key:8}= {value}"
                yield f"{text} at {at}", partial(set_card, at=at, text=text)


# Targets


def without(attrs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in attrs.items() if k not in names}


def cube_content(path: Path) -> Any:
    """What a processed cube holds, without when and from which bytes it was made."""
    cube = data_io.read_cube(path)
    passing = ("recipe", "source_stamp", "created_utc", "crc32")
    arrays = (cube.flux, cube.ivar, cube.good_fraction, cube.wave)
    return arrays, without(cube.attrs, *passing), cube.recipe.options


def processed_cube(folder: Path, source: str, **others: str) -> Any:
    """Process a cube; `others`: the names of MAPS and of a catalogue."""
    out = folder / "out" / f"{GALAXY}.h5"
    options = fits_utils.CubeOptions(n_band=200, remove_gas_velocity="maps" in others)
    paths = {name: folder / file for name, file in others.items()}
    fits_utils.process_cube(folder / source, out, options, **paths, overwrite=True)
    return cube_content(out)


def processed_labels(folder: Path, source: str) -> Any:
    found = []
    for task in utils.LABEL_TASKS:
        out = folder / "out" / task / f"{GALAXY}.npy"
        fits_utils.process_map(folder / source, out, task, fits_utils.LabelOptions(), False, True)
        found.append((data_io.read_labels(out), data_io.read_label_error(out)))
        passing = ("recipe", "created_utc", "checksum")
        found.append(without(data_io.read_label_meta(out), *passing))  # type: ignore[arg-type]
    return found


def label_content(folder: Path) -> Any:
    path = folder / f"{GALAXY}.npy"
    about = data_io.read_label_meta(path)
    return (
        data_io.read_labels(path), data_io.read_label_error(path), data_io.read_label_bins(path),
        about, about.get("recipe"),
    )  # fmt: skip


def config_content(folder: Path) -> Any:
    import tyro

    import calc_data_stats

    config = calc_data_stats.Config
    words = utils.config_args(folder / "config.json", config)
    try:
        return tyro.cli(config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        raise DataError(f"exit {stop.code}") from None


def failures_content(folder: Path) -> str:
    log = [("8485-1902", "cubes", "x")]
    loops._update_failures(folder / "failed.csv", {"8485-1902"}, log)
    return (folder / "failed.csv").read_text()


def write_files(root: Path) -> list[Target]:
    """Write one small file of each kind; return them and how they are read."""
    write_fits(root / "fits", GALAXY)
    for kind in ("LOGCUBE", "MAPS"):
        (root / f"fits/manga-{GALAXY}-{kind}-X.fits").rename(root / f"fits/{kind}.fits")
    rng = np.random.default_rng(0)
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("plateifu", "10A", array=[GALAXY, "8485-1902"]),
            fits.Column("mangaid", "10A", array=["1-1", "1-2"]),
            fits.Column("nsa_z", "D", array=[0.03, 0.04]),
            fits.Column("z", "D", array=[0.03, 0.04]),
        ]
    )
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(root / "fits/drpall.fits")
    with fits.open(root / "fits/LOGCUBE.fits") as hdus:  # without what the DAP adds
        del hdus["REDCORR"], hdus["MODEL"], hdus[0].header["DAPTYPE"], hdus[0].header["SCINPVEL"]
        del hdus[0].header["MASKNAME"]
        hdus.writeto(root / "fits/DRP.fits")
    targets = []
    readers = {
        "DRP": partial(processed_cube, source="DRP.fits", catalogue="drpall.fits"),
        "LOGCUBE": partial(processed_cube, source="LOGCUBE.fits"),
        "MAPS": lambda folder: (
            processed_labels(folder, "MAPS.fits"),
            processed_cube(folder, "LOGCUBE.fits", maps="MAPS.fits"),
        ),
        "drpall": lambda folder: archive_files.catalogue_rows(folder / "drpall.fits"),
    }
    for name, read in readers.items():  # forged ones have no checksums, as not every file has
        path = root / f"fits/{name}.fits"
        targets.append(Target(f"fits/{name}.fits", read, list(fits_forgeries(path)), False))
        (root / "sums").mkdir(exist_ok=True)
        with fits.open(path) as hdus:
            hdus.writeto(root / f"sums/{name}.fits", checksum=True)
        targets.append(Target(f"sums/{name}.fits", read, is_sum=True))
    (root / "gzip").mkdir()
    for name in ("LOGCUBE", "MAPS"):
        content = gzip.compress((root / f"sums/{name}.fits").read_bytes(), 1)
        (root / f"gzip/{name}.fits.gz").write_bytes(content)
    read = partial(processed_cube, source="LOGCUBE.fits.gz")
    targets.append(Target("gzip/LOGCUBE.fits.gz", read))
    read = partial(processed_labels, source="MAPS.fits.gz")
    targets.append(Target("gzip/MAPS.fits.gz", read))

    data = mock_cubes.make_data_dir(root / "data", (GALAXY, *mock_cubes.PLATEIFUS[:6]), (6, 7))
    cube = f"processed/cubes/8485/{GALAXY}.h5"
    path = data / cube
    targets.append(
        Target(
            f"data/{cube}",
            lambda folder: (data_io.read_cube_head(folder / f"{GALAXY}.h5"),
                            data_io.read_cube(folder / f"{GALAXY}.h5")),
            list(h5_forgeries(path)),
        )
    )  # fmt: skip
    path = data / "splits/hard/stats.h5"
    targets.append(
        Target(
            "data/splits/hard/stats.h5",
            lambda folder: data_io.read_stats(folder / "stats.h5"),
            list(h5_forgeries(path)),
        )
    )
    for task in utils.LABEL_TASKS:
        for end in (".npy", "_err.npy", ".json"):
            file = f"data/processed/labels/{task}/{GALAXY}{end}"
            forged = list(json_forgeries(root / file, sealed)) if end == ".json" else []
            targets.append(Target(file, label_content, forged))
    for kind in ("hard", "easy"):
        for part in ("train", "val"):
            targets.append(
                Target(f"data/splits/{kind}/{part}.csv", data_io.read_split, split_forgeries())
            )
    patches = root / f"patches/{GALAXY}.npy"
    index = pd.DataFrame({"row": range(4), "y": range(4), "x": 1, "label": [8.4, 8.5, 8.6, 8.3]})
    recipe = Recipe("patches", data_io.PATCH_VERSION, {"patch_norm": "global"})
    data_io.write_patches(patches, rng.random((4, 3, 3, 5)), index, recipe, {"plateifu": GALAXY})
    for end in (".npy", "_index.csv", ".json"):
        file = f"patches/{GALAXY}{end}"
        forged = list(json_forgeries(root / file, sealed)) if end == ".json" else []
        read = lambda folder: data_io.read_patches(folder / f"{GALAXY}.npy")  # noqa: E731
        targets.append(Target(file, read, forged))
    (root / "config").mkdir()
    saved = {"split_dir": "hard", "n_components": 30, "min_snr": 2.0, "overwrite": True}
    (root / "config/config.json").write_text(json.dumps(saved))
    forged = list(json_forgeries(root / "config/config.json", lambda content: content))
    targets.append(Target("config/config.json", config_content, forged, False))
    (root / "lists").mkdir()
    (root / "lists/galaxies.txt").write_text(f"{GALAXY}\n8485-1902 # a comment\n")
    read = lambda folder: loops.read_galaxy_list(folder / "galaxies.txt")  # noqa: E731
    targets.append(Target("lists/galaxies.txt", read, [], False))
    (root / "failed").mkdir()
    (root / "failed/failed.csv").write_text(f"plateifu,stage,reason\n{GALAXY},cubes,a reason\n")
    targets.append(Target("failed/failed.csv", failures_content, [], False))
    galaxy = simulate_galaxy(draw_params(1, 0, (19,), 0))
    mock.truth.write_truth(root / "truth.h5", galaxy)
    forged = list(h5_forgeries(root / "truth.h5"))
    read = lambda folder: mock.truth.read_truth(folder / "truth.h5")  # noqa: E731
    targets.append(Target("truth.h5", read, forged))
    return targets + run_targets(root, data)


def run_targets(root: Path, data: Path) -> list[Target]:
    """The files of a short training run of each network, and packed cubes."""
    import eval_fns
    import inference
    import map_galaxies
    import pack_cubes
    import run_folder
    import vis_fns

    def model(folder: Path) -> Any:
        loaded = inference.load_model(folder, "cpu")
        return vars(loaded.card), loaded.network.state_dict(), loaded.stats, loaded.parts

    def packed(folder: Path, name: str) -> Any:
        found = pack_cubes.read_packed(folder / name)
        return np.asarray(found.spectra), found.rows, found.cubes, found.recipe

    def baseline(folder: Path) -> Any:
        return run_folder.read_tensors(folder / run_folder.BASELINE_FILE)

    def figures(folder: Path) -> Any:
        return sorted(vis_fns.run_figures(run, card))

    def mapped(folder: Path) -> Any:
        table = map_galaxies.tabulate_maps(folder)
        if table.empty:
            raise DataError("left out, with a warning")
        return table

    targets = []
    for network in ("ssftt", "matched_filters"):
        run = train(data, root / network, epochs=1, network=network, cutout=5)
        forged = list(json_forgeries(run / run_folder.MODEL_FILE, sealed))
        targets += [
            Target(f"{network}/model.json", model, forged),
            Target(f"{network}/best.safetensors", model),
            Target(f"{network}/baseline.safetensors", baseline),
            Target(f"{network}/last.pt", run_folder.read_checkpoint),
        ]
    for path in (data / "processed/packed/hard").glob("*.h5"):
        read = partial(packed, name=path.name)
        targets.append(Target(str(path.relative_to(root)), read, list(h5_forgeries(path))))
    card = inference.load_model(run, "cpu").card
    eval_fns.main(eval_fns.EvalConfig(run, data_dir=data))
    map_galaxies.main(map_galaxies.Config(run_dir=run, data_dir=data, plateifu=(GALAXY,)))
    targets.append(Target(f"{network}/maps/{GALAXY}.fits", mapped, is_sum=True))
    for name in ("test/metrics.json", "test/confusion.csv", "metrics.csv"):
        targets.append(Target(f"{network}/{name}", figures, [], False))
    return targets


def split_forgeries() -> list[tuple[str, Callable]]:
    """Tables of a split with other rows and columns, under a right checksum."""

    def change(path: Path, old: str, new: str) -> None:
        text = path.read_text().partition("\n")[2]
        path.write_text(sealed_text(text.replace(old, new)))

    pairs = [("plateifu", "name"), ("mangaid", "name"), ("8000-10", "../../x"), ("8000-101", ""),
             ("8000-101", "٨٤٨٥-١٩٠١"), ("8485", "8485-1"), (",", ";"), ("\n", ""), ("recipe", "x"),
             ('"kind"', '"sort"'), ('"hard"', '"soft"'), ('"hard"', "5"), ('"options"', '"x"'),
             ("\n", "\n\n"), ("1-", '"'), ("0", "nan"), ("x", "plateifu"), ("y", "mangaid"),
             ("1", "1e400"), ("1", "-1")]  # fmt: skip
    return [(f"{old} -> {new}", partial(change, old=old, new=new)) for old, new in pairs]


# Judging


def outcome_of(read: Callable[[Path], Any], folder: Path, expected: str | None) -> tuple[str, str]:
    """Read in a fork; return outcome and message, or with `expected` None the digest of content."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(folder / ".stderr", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT_S, TIME_LIMIT_S + 5))
            signal.alarm(6 * TIME_LIMIT_S)  # by the clock: the processors may be shared
            try:
                answer = ("read", digest_of(summed(read(folder))))
            except DataError as error:
                cause = error.__cause__ or error.__context__
                too_large = isinstance(cause, MemoryError)
                is_line = "\n" not in str(error) and len(str(error)) < 2000
                word = "over_memory" if too_large else "refused" if is_line else "tracebacks"
                answer = (word, str(error))
            except OSError as error:  # a command's `run_command` says it in one line
                answer = ("refused", str(error))
            except MemoryError as error:
                answer = ("over_memory", repr(error))
            except BaseException as error:
                import traceback

                last = traceback.extract_tb(error.__traceback__)[-3:]
                where = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in last)
                answer = ("tracebacks", f"{error!r:.200} {where}")
            os.write(send, json.dumps((answer[0], answer[1][:1000])).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as f:
        text = f.read()
    _, status, usage = os.wait4(pid, 0)
    if usage.ru_maxrss * 1024 > MEMORY_LIMIT:
        return "over_memory", f"{usage.ru_maxrss / 1e6:.1f} GB"
    if not text:
        is_hang = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (
            signal.SIGALRM,
            signal.SIGXCPU,
        )
        return ("hangs" if is_hang else "tracebacks"), f"ended by signal, status {status}"
    word, message = json.loads(text)
    if word != "read" or expected is None:
        return word, message
    return ("same" if message == expected else "silent"), ""


def mutations(
    target: Target, content: bytes, n: int, n_forged: int, rng: np.random.Generator
) -> Iterator:
    """Yield name, whether forged, and a function that changes the file."""
    foreign = [(name, partial(Path.write_bytes, data=bad)) for name, bad in FOREIGN.items()]
    forged = foreign + target.forged
    for i in rng.permutation(len(forged))[:n_forged]:
        yield forged[i][0], True, forged[i][1]
    for _ in range(n):
        name, bad = damaged(content, rng)
        yield name, False, partial(Path.write_bytes, data=bad)


def campaign(n: int, seed: int, n_forged: int, only: str = "") -> tuple[Counter, list]:
    """Damage the targets n times in all, and forge each; return counts and lines about failures."""
    counts, failures = Counter(mutations=0), []
    rng = np.random.default_rng(seed)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        targets = [t for t in write_files(root) if only in t.file]
        n_random = -(-n // max(len(targets), 1))
        for target in targets:
            path = root / target.file
            content = path.read_bytes()
            word, expected = outcome_of(target.read, path.parent, None)
            if word != "read":
                raise SystemExit(f"{target.file}: sound, but {word}: {expected}")
            for name, is_forged, change in mutations(target, content, n_random, n_forged, rng):
                path.write_bytes(content)
                change(path)
                if path.read_bytes() == content:
                    continue
                word, message = outcome_of(target.read, path.parent, expected)
                is_unseen = is_forged or not target.has_checksum
                is_unseen = is_unseen or (target.is_sum and name.startswith("swap"))
                word = "other request" if word == "silent" and is_unseen else word
                counts.update([word, "mutations"])
                if word in FAULTS:
                    failures.append(f"{word}: {target.file}: {name}: {message}")
                path.unlink()
                path.write_bytes(content)
            shutil.rmtree(path.parent / "out", ignore_errors=True)
            print(f"damaged: {target.file}; faults so far: {len(failures)}", flush=True)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=2400, help="random ones, of all targets")
    parser.add_argument("--kills", type=int, default=14, help="of each stage")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--forged", type=int, default=150, help="forged and foreign files, at most, per target"
    )
    parser.add_argument("--only", default="", help="part of the name of targets and stages")
    parser.add_argument("--out", type=Path, default=Path("results/faults/summary.json"))
    args = parser.parse_args()
    start, few = time.monotonic(), -(-args.kills // 4)
    times = {"kill": args.kills, "full disk": few, "read-only": 1, "two writers": few}
    counts, failures = interrupt_stages({**times, "wrong clock": few}, args.seed, args.only)
    found, lines = campaign(args.mutations, args.seed, args.forged, args.only)
    counts, failures = counts + found, failures + lines
    for line in failures:
        print(line)
    summary = {name: counts[name] for name in (*COUNTED, *OUTCOMES)}
    summary["seconds"] = round(time.monotonic() - start)
    utils.write_json(args.out, summary)
    print(json.dumps(summary))
    return int(any(counts[word] for word in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
