"""Where every file lies, what the labels mean, and the few services that all scripts share.

Paths (README, "Data locations"), each from a data folder and a plateifu, and back again:

    raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz     raw_paths
    processed/cubes/<plate>/<plateifu>.h5                                    cube_path
    processed/labels/<label_task>/<plateifu>.npy                             label_path
    processed/patches/<label_task>/<patch_norm>/<plateifu>/<plateifu>.npy    patch_path
    splits/<split_dir>/{train,val,test}.csv                                  split_path

What is inside those files is `data_io`'s business. Importing this module does nothing.

    >>> cube = cube_path(data_dir(None), "8485-1901")
    >>> sibling(cube, "label", label_task="BPT")
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

log = logging.getLogger(__name__)

VERSION = "0.1.0"

LabelTask = Literal["BPT", "logOH"]
PatchNorm = Literal["global", "spatial", "spectral", "PCA"]
LABEL_TASKS: tuple[str, ...] = get_args(LabelTask)
PATCH_NORMS: tuple[str, ...] = get_args(PatchNorm)
SPLIT_PARTS = ("train", "val", "test")

EXIT_DONE, EXIT_DATA, EXIT_USAGE, EXIT_AGAIN = 0, 1, 2, 75
"""Exit codes: done; a data problem; wrong usage; stopped early, run me again."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""

PLATEIFU = re.compile(r"(?<!\d)(\d{4,5})-(\d{3,5})(?!\d)")

PART = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d{1,9})\.part(\.[^.]+)?")
"""Name of a file that `atomic_path` has not finished."""
PART_LIFE_S = 24 * 3600
"""A part untouched for so long has lost its writer, on whatever host that was."""


class DataError(ValueError):
    """A problem with a file or its content, told in one line: what, where, what to do."""


# Paths


def data_dir(flag: Path | None = None) -> Path:
    """Choose the data folder: the flag, else $MANGA_DATA_DIR, else ./data/manga."""
    return Path(flag or os.environ.get("MANGA_DATA_DIR") or "data/manga")


def split_plateifu(plateifu: str) -> tuple[str, str]:
    """Plate and ifu of a plateifu such as 8485-1901."""
    match = PLATEIFU.fullmatch(plateifu.strip())
    if not match:
        raise DataError(f"{plateifu!r} is no plateifu: expected <plate>-<ifu>, e.g. 8485-1901.")
    return match[1], match[2]


def raw_dir(root: Path, plateifu: str) -> Path:
    """Folder of a galaxy's FITS files."""
    plate, ifu = split_plateifu(plateifu)
    return Path(root) / "raw" / plate / ifu


def raw_paths(root: Path, plateifu: str, kind: str, daptype: str | None = None) -> list[Path]:
    """FITS files of one kind (LOGCUBE or MAPS) that a galaxy has, DAP before DRP, sorted."""
    found = raw_dir(root, plateifu).glob(f"manga-{plateifu}-{kind}*.fits*")
    names = [p for p in found if p.name.endswith((".fits", ".fits.gz"))]
    if daptype:
        names = [p for p in names if f"-{kind}-{daptype}.fits" in p.name]
    return sorted(names, key=lambda p: (p.name.split(".")[0].endswith(kind), p.name))


def find_raw(root: Path, plateifu: str, kind: str, daptype: str | None = None) -> Path:
    """Return the one FITS file of a kind that a galaxy has.

    Parameters
    ----------
    root : Path
        Data folder.
    plateifu : str
    kind : {"LOGCUBE", "MAPS"}
    daptype : str, optional
        Needed only where several analyses of the galaxy lie side by side.

    Raises
    ------
    DataError
        If there is no such file, or several (the message lists them).
    """
    found = raw_paths(root, plateifu, kind, daptype)
    dap = [p for p in found if f"-{kind}-" in p.name]
    if len(dap) > 1:
        is_twice = len({p.name.removesuffix(".gz") for p in dap}) == 1
        remedy = "remove one, they are the same" if is_twice else "choose one with --daptype"
        raise DataError(
            f"{plateifu}: {len(dap)} {kind} files in {raw_dir(root, plateifu)} "
            f"({', '.join(p.name for p in dap)}): {remedy}."
        )
    if not found:
        wanted = f"manga-{plateifu}-{kind}-{daptype or '*'}.fits.gz"
        raise DataError(
            f"{plateifu}: no {wanted} in {raw_dir(root, plateifu)}. The data folder comes from "
            f"--data-dir, MANGA_DATA_DIR or ./data/manga; fetch the file with "
            f"python download_utils.py --plateifu {plateifu}."
        )
    return found[0]


def cube_path(root: Path, plateifu: str) -> Path:
    """Name the processed H5 cube of a galaxy."""
    plate, _ = split_plateifu(plateifu)
    return Path(root) / "processed" / "cubes" / plate / f"{plateifu}.h5"


def label_path(root: Path, label_task: str, plateifu: str) -> Path:
    """Label map (.npy) of a galaxy."""
    return Path(root) / "processed" / "labels" / label_task / f"{plateifu}.npy"


def processed_cubes(root: Path) -> list[Path]:
    """All H5 cubes of a data folder, sorted."""
    return files_in(Path(root) / "processed" / "cubes", "*/*.h5")


def label_maps(root: Path, label_task: str) -> list[Path]:
    """All label maps of a task, sorted; not their uncertainties."""
    folder = Path(root) / "processed" / "labels" / label_task
    return [p for p in files_in(folder, "*.npy") if not p.stem.endswith("_err")]


def patch_path(root: Path, label_task: str, patch_norm: str, plateifu: str) -> Path:
    """Patch file (.npy) of a galaxy; its index table is patch_index_path."""
    folder = Path(root) / "processed" / "patches" / label_task / patch_norm / plateifu
    return folder / f"{plateifu}.npy"


def hard_split(label_task: str) -> str:
    """Name a task's split by whole galaxies; the default of all scripts."""
    return f"hard_{label_task}"


def split_path(root: Path, split_dir: str, part: str | None = None) -> Path:
    """Folder of a split, or the CSV of one of its parts.

    Raises
    ------
    DataError
        If the name is none of a folder in `splits`.
    """
    if split_dir in ("", "..") or Path(split_dir).name != split_dir:
        raise DataError(f"split {split_dir!r}: expected the plain name of a folder in splits/.")
    folder = Path(root) / "splits" / split_dir
    return folder / f"{part}.csv" if part else folder


def stats_path(root: Path, split_dir: str) -> Path:
    """Statistics and PCA of a split's training part."""
    return split_path(root, split_dir) / "stats.h5"


def catalogue_path(root: Path) -> Path | None:
    """First dapall or drpall catalogue in the raw folder, None if there is none."""
    raw = Path(root) / "raw"
    return next(iter([*sorted(raw.glob("dapall*.fits")), *sorted(raw.glob("drpall*.fits"))]), None)


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Files that match a pattern, sorted, without the hidden ones, which are unfinished."""
    return sorted(p for p in Path(folder).glob(pattern) if not p.name.startswith("."))


def plateifu_of(path: Path | str) -> str:
    """Plateifu that a file's name holds.

    Raises
    ------
    DataError
        If the name holds none.
    """
    match = PLATEIFU.search(Path(path).name)
    if not match:
        raise DataError(f"{path}: no <plate>-<ifu> in the file name.")
    return match[0]


def data_dir_of(path: Path | str) -> Path:
    """Find the data folder of a raw or processed file (the parent of raw/ or processed/)."""
    parents = list(Path(path).parents)
    for folder in parents:
        if folder.name in ("raw", "processed", "splits"):
            return folder.parent
    raise DataError(f"{path}: lies in no data folder (no raw/, processed/ or splits/ above it).")


Sibling = Literal["logcube", "maps", "cube", "label", "patches"]


def sibling(
    path: Path | str,
    kind: Sibling,
    label_task: str | None = None,
    patch_norm: str | None = None,
    daptype: str | None = None,
) -> Path:
    """Another file of the same galaxy in the same data folder.

    Parameters
    ----------
    path : Path
        A FITS file, cube, label file or patch file.
    kind : {"logcube", "maps", "cube", "label", "patches"}
        What to return. The FITS kinds must exist (their name holds the analysis); the others are
        names only.
    label_task, patch_norm : str, optional
        Needed for labels and patches unless `path` itself names them.

    Raises
    ------
    DataError
        If the file lies outside a data folder, or a FITS file is missing.
    """
    root, plateifu, parts = data_dir_of(path), plateifu_of(path), Path(path).parts
    label_task = label_task or next((t for t in LABEL_TASKS if t in parts), None)
    patch_norm = patch_norm or next((n for n in PATCH_NORMS if n in parts), None)
    if kind in ("logcube", "maps"):
        return find_raw(root, plateifu, kind.upper(), daptype)
    if kind == "cube":
        return cube_path(root, plateifu)
    if label_task is None:
        raise DataError(f"{path}: the label task is not in the path; give label_task.")
    if kind == "label":
        return label_path(root, label_task, plateifu)
    if patch_norm is None:
        raise DataError(f"{path}: the patch norm is not in the path; give patch_norm.")
    return patch_path(root, label_task, patch_norm, plateifu)


# Writing


open_parts: set[Path] = set()
"""What this process is writing."""


@contextlib.contextmanager
def atomic_path(out: Path | str) -> Iterator[Path]:
    """Give a hidden neighbour to write to, renamed to `out` if all went well, else removed.

    It is on the disk before it gets the name, so that a power cut leaves the old file or the new.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep_parts(out.parent)
    part = out.with_name(f".{out.name}.{_host()}.{os.getpid()}.part{out.suffix}")
    open_parts.add(part)
    try:
        yield part
        flush(part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
        open_parts.discard(part)


@contextlib.contextmanager
def locked(folder: Path, why: str) -> Iterator[None]:
    """Hold a folder, made if it is not there, alone among processes.

    File systems without locks are trusted.

    Raises
    ------
    DataError
        If another process holds it; `why` says what for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DataError(f"{folder}: {why}. Wait for it, or choose another folder.") from None
    except OSError:
        log.debug("%s: a file system without locks", folder)
    try:
        yield
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Have the system write a file to the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _host() -> str:
    """Name of this host without dots, for file names."""
    return platform.node().replace(".", "-")


@functools.cache  # once a process: listing tens of thousands of label files takes its time
def _sweep_parts(folder: Path) -> None:
    """Remove what killed processes left: of this host if they are gone, else after a day."""
    for part in folder.glob(".*.part*"):
        match = PART.fullmatch(part.name)
        if not match:
            continue
        with contextlib.suppress(OSError):  # its writer, or another sweeper, was quicker
            is_lost = match["host"] == _host() and not _is_alive(int(match["pid"]))
            if is_lost or time.time() - part.stat().st_mtime > PART_LIFE_S:
                part.unlink()


def _is_alive(pid: int) -> bool:
    """Tell whether this host has such a process, of whatever user."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON, whole or not at all; paths become strings."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2, default=str) + "\n")


def file_stamp(path: Path) -> str:
    """Size and time of a file: as long as they stay, so does its content (for `make`, too)."""
    stat = Path(path).stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_recipe(target: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a DataError unless an existing output was made as it would be made now.

    Parameters
    ----------
    target : Path
        The output.
    made, wanted : dict
        Options and source hashes then and now; only the keys of `wanted` are compared, as JSON
        values.
    """
    wanted = json.loads(json.dumps(wanted, default=str))
    changed = [k for k, v in wanted.items() if made.get(k) != v]
    if changed:
        raise DataError(
            f"{target}: exists, made with another {', '.join(changed)}. "
            "Replace it with --overwrite."
        )


# Provenance


def utc_now() -> str:
    """UTC time, ISO 8601, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this module lies in (None outside of one)."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
    except OSError:  # no git
        return {"commit": None, "dirty": None}


def environment() -> dict[str, Any]:
    """Gather what a run depended on: packages, platform, git state, SLURM job, command line."""
    packages = {}
    for name in "numpy scipy pandas h5py astropy scikit-learn torch isal tensorly".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    torch = sys.modules.get("torch")  # never imported for this alone
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "version": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git": git_state(),
        "gpu": gpu,
        "cpus": cpu_count(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "created_utc": utc_now(),
    }


def config_dict(config: Any) -> dict[str, Any]:
    """Fields of a config dataclass as plain JSON values; `--config` reads them back."""
    return json.loads(json.dumps(asdict(config), default=str))


# Commands


def config_args(path: Path | str) -> list[str]:
    """Command-line words that reproduce a saved config.json."""
    try:
        saved = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: no readable JSON config ({error}).") from None
    if not isinstance(saved, dict):
        raise DataError(f"{path}: expected a JSON object of flags, found {type(saved).__name__}.")
    words: list[str] = []
    for key, value in saved.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def with_config_file(args: Sequence[str]) -> list[str]:
    """Replace `--config FILE` by the flags it stands for, before the user's own: later wins."""
    words = list(args)
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise DataError("--config needs a file: --config run.json.")
            return config_args(words[i + 1]) + words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return config_args(word.partition("=")[2]) + words[:i] + words[i + 1 :]
    return words


Config = TypeVar("Config")


def run_command(main: Callable[[Config], int | None], config_class: type[Config], doc: str) -> None:
    """Parse the command line into a config, run `main`, and leave with the right exit code.

    A DataError ends the program with its one line and code 1 (with a traceback under --debug); a
    wrong flag with code 2; Ctrl-C with 130 and SIGTERM with 143, unless `main` listens to it.
    """
    import tyro  # here, so that importing a script's functions does not need it

    argv = sys.argv[1:]
    debug = "--debug" in argv
    setup_logging()
    logging.getLogger("loops").setLevel(logging.DEBUG if debug else logging.NOTSET)
    try:
        words = with_config_file(argv)
        description = re.sub(r"\n(?=Writes |Layouts?: )", "\n\n", doc)  # else the help joins lines
        config = tyro.cli(config_class, args=words, description=description)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = main(config)
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            sys.exit(128 + signal.SIGPIPE)
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_DATA)
    except KeyboardInterrupt as stop:
        print("stopped; finished outputs are whole, run the same command to go on", file=sys.stderr)
        sys.exit(stop.args[0] if stop.args else 128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code or EXIT_DONE)


def _reader_has_left() -> bool:
    """Say whether what reads our output, such as head, has seen enough; then write to nobody."""
    stdout = select.poll()
    try:
        stdout.register(sys.stdout.fileno(), 0)
    except OSError:  # no file, as in a notebook
        return False
    has_left = any(event & select.POLLERR for _, event in stdout.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def _interrupt(number: int, _frame: object) -> None:
    """Stop like Ctrl-C, with this signal's exit code."""
    raise KeyboardInterrupt(128 + number)


def keep_freed_memory() -> None:
    """Have this process reuse the memory it frees, however large the arrays.

    glibc gives blocks over 32 MB back to the system and asks for them anew, page by page: half of
    the time of a training step on a CPU. Kept, they are reused; the peak grows by the gaps between
    them. Does nothing under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def setup_logging(log_file: Path | None = None) -> None:
    """Log to the console, and to `log_file` if given. Only commands call this."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file))
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )


def cpu_count() -> int:
    """CPUs this process may use: SLURM's word, else its affinity."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK")
    if slurm:
        return int(slurm)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
