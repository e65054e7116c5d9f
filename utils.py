"""Where every file lies, and the services that all scripts share: writing, commands, logging.

Paths (README, "Data Locations"), each from a data folder and a plateifu:

    raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz     raw_paths
    processed/cubes/<plate>/<plateifu>.h5                                    cube_path
    processed/labels/<label_task>/<plateifu>.npy                             label_path
    processed/patches/<label_task>/<patch_norm>/<plateifu>/<plateifu>.npy    patch_path
    splits/<split_dir>/{train,val,test}.csv                                  split_path

What is inside those files: `data_io`.

    >>> cube = cube_path(data_dir(None), "8485-1901")
"""

from __future__ import annotations

import importlib.util
import sys

if sys.version_info < (3, 11) or not importlib.util.find_spec("tyro"):  # before anything fails
    sys.exit(
        f"error: {sys.executable} (Python {sys.version.split()[0]}) "
        f"{'is too old' if sys.version_info < (3, 11) else 'has no package tyro'}. Expected Python "
        "3.11 or newer with the packages of requirements.txt: activate the environment "
        "(. .venv/bin/activate), or create it with make setup."
    )

import argparse
import contextlib
import difflib
import errno
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import platform
import re
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

log = logging.getLogger(__name__)

VERSION = "0.1.0"

LabelTask = Literal["BPT", "logOH"]
PatchNorm = Literal["global", "spatial", "spectral", "PCA"]
Norm = Literal["residual", "global", "spatial", "spectral", "PCA"]
"""Normalisation of packed cubes; residual: matched_filter_net.prepare_spectra."""
LABEL_TASKS: tuple[str, ...] = get_args(LabelTask)
PATCH_NORMS: tuple[str, ...] = get_args(PatchNorm)
SPLIT_PARTS = ("train", "val", "test")

EXIT_DONE, EXIT_DATA, EXIT_USAGE, EXIT_AGAIN = 0, 1, 2, 75
"""Exit codes: done; a problem with the data; wrong usage; stopped early, run again to continue."""

PLATEIFU = re.compile(r"(?<![0-9])([0-9]{4,5})-([0-9]{3,5})(?![0-9])")  # \d: any script's digits

IFUS = tuple(
    f"{fibres}{number:02d}"
    for fibres, bundles in ((19, 2), (37, 4), (61, 4), (91, 2), (127, 5))
    for number in range(1, bundles + 1)
)
"""IFUs of a plate: number of fibres, number of the bundle (all 11,273 rows of DR17's drpall)."""

PART = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d{1,9})\.part(\.[^.]+)?")
"""Name of a file that `atomic_path` is still writing, or that a killed process left."""
PART_LIFE_S = 24 * 3600
"""An unfinished file that has not changed for this long is abandoned, whatever host wrote it."""


MAX_ARRAY_BYTES = 1 << 29
"""Largest array that is read whole; the largest of a MaNGA cube has 100 MB."""


class DataError(ValueError):
    """A problem with a file or its content. The message is one line: what, where, what to do."""


@contextlib.contextmanager
def reading(path: Path | str, expected: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises about a file into a DataError of one line.

    `expected` is what the file should be, with its article; `remedy` is a whole sentence.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected {expected}. {remedy}") from None
    except Exception as error:
        raise DataError(
            f"{path}: not readable ({first_line(error)}), expected {expected}. {remedy}"
        ) from error


def first_line(error: BaseException) -> str:
    """First line of an error; of HDF5's, its reason without memory addresses."""
    found = re.search(r"error message = '([^']+)'", str(error))
    if isinstance(error, EOFError):
        return "cut short"
    line = found[1] if found else str(error).partition("\n")[0][:200]
    if isinstance(error, OSError | ValueError) and line:
        return getattr(error, "strerror", None) or line
    return f"{type(error).__name__}: {line}"


# Paths


def data_dir(flag: Path | None = None, of_run: str = "") -> Path:
    """Choose the data folder: the flag, else $MANGA_DATA_DIR, else a run's, else ./data/manga.

    `of_run`: the data folder that a run learned from; ignored if it no longer exists.
    """
    saved = of_run if of_run and Path(of_run).is_dir() else None
    folder = Path(flag or os.environ.get("MANGA_DATA_DIR") or saved or "data/manga")
    if folder.is_file():
        raise DataError(
            f"{folder}: a file, expected a data folder (with raw/ or processed/ in it). Check "
            "--data-dir and $MANGA_DATA_DIR."
        )
    return folder


def split_plateifu(plateifu: str) -> tuple[str, str]:
    """Plate and ifu of a plateifu such as 8485-1901."""
    match = PLATEIFU.fullmatch(plateifu.strip())
    if not match:
        raise DataError(
            f"{plateifu[:80]!r} is not a valid plateifu (expected <plate>-<ifu>, e.g. 8485-1901; "
            "put spaces between several)."
        )
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
    """Return the one FITS file of a kind (LOGCUBE or MAPS) that a galaxy has.

    None or several are a `DataError`; `daptype` chooses among several analyses.
    """
    found = raw_paths(root, plateifu, kind, daptype)
    dap = [p for p in found if f"-{kind}-" in p.name]
    if len(dap) > 1:
        is_twice = len({p.name.removesuffix(".gz") for p in dap}) == 1
        remedy = "remove one of the two copies" if is_twice else "choose one with --daptype"
        raise DataError(
            f"{plateifu}: {len(dap)} {kind} files in {raw_dir(root, plateifu)} "
            f"({', '.join(p.name for p in dap)}): {remedy}."
        )
    if not found:
        wanted = f"manga-{plateifu}-{kind}-{daptype or '*'}.fits.gz"
        remedy = f"Download it with python download_utils.py --plateifu {plateifu}."
        if split_plateifu(plateifu)[1] not in IFUS:
            remedy = f"MaNGA has no such IFU; expected one of {', '.join(IFUS)}."
        remedy += " Or give a file of your own to process_single_cube.py: "
        remedy += {
            "LOGCUBE": "--fits FILE.",
            "MAPS": "--maps FILE; without, --no-remove-gas-velocity --label-tasks makes the cube.",
        }[kind]
        raise DataError(
            f"{plateifu}: no {wanted} in {raw_dir(root, plateifu)}, expected it in this data "
            "folder (--data-dir, else $MANGA_DATA_DIR, else that of the run, else ./data/manga). "
            f"{remedy}"
        )
    return found[0]


def cube_path(root: Path, plateifu: str) -> Path:
    """Path of the processed H5 cube of a galaxy."""
    plate, _ = split_plateifu(plateifu)
    return Path(root) / "processed" / "cubes" / plate / f"{plateifu}.h5"


def label_path(root: Path, label_task: str, plateifu: str) -> Path:
    """Path of the label map (.npy) of a galaxy."""
    return Path(root) / "processed" / "labels" / label_task / f"{plateifu}.npy"


def processed_cubes(root: Path) -> list[Path]:
    """All H5 cubes of a data folder, sorted."""
    return files_in(Path(root) / "processed" / "cubes", "*/*.h5")


def label_maps(root: Path, label_task: str) -> list[Path]:
    """All label maps of a task, sorted, without the maps of their uncertainties."""
    folder = Path(root) / "processed" / "labels" / label_task
    return [p for p in files_in(folder, "*.npy") if not p.stem.endswith("_err")]


def patch_path(root: Path, label_task: str, patch_norm: str, plateifu: str) -> Path:
    """Path of the patch file (.npy) of a galaxy."""
    folder = Path(root) / "processed" / "patches" / label_task / patch_norm / plateifu
    return folder / f"{plateifu}.npy"


def default_split(label_task: str) -> str:
    """Name of a task's split by whole galaxies, the default of all scripts."""
    return f"hard_{label_task}"


def split_path(root: Path, split_dir: str, part: str | None = None) -> Path:
    """Folder of a split, a plain name without slashes, or the CSV of one of its parts."""
    if split_dir in ("", "..") or Path(split_dir).name != split_dir:
        raise DataError(
            f"--split-dir {split_dir!r}: expected the name of a folder in <data-dir>/splits/, "
            "e.g. hard_logOH, not a path."
        )
    folder = Path(root) / "splits" / split_dir
    return folder / f"{part}.csv" if part else folder


def stats_path(root: Path, split_dir: str) -> Path:
    """Path of the statistics and principal components of a split's training part."""
    return split_path(root, split_dir) / "stats.h5"


def catalogue_path(root: Path) -> Path | None:
    """First dapall or drpall catalogue in the raw folder, or None."""
    raw = Path(root) / "raw"
    return next(iter([*sorted(raw.glob("dapall*.fits")), *sorted(raw.glob("drpall*.fits"))]), None)


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Files that match a pattern, sorted, without hidden ones, which are unfinished."""
    return sorted(p for p in Path(folder).glob(pattern) if not p.name.startswith("."))


def plateifu_of(path: Path | str) -> str:
    """Read the plateifu from a file name; a DataError if it contains none."""
    match = PLATEIFU.search(Path(path).name)
    if not match:
        raise DataError(
            f"{path}: expected a file name with <plate>-<ifu>, e.g. 8485-1901. Rename the file, or "
            "give --plateifu."
        )
    return match[0]


# Writing


open_parts: set[Path] = set()
"""Unfinished files of this process."""


@contextlib.contextmanager
def atomic_path(out: Path | str) -> Iterator[Path]:
    """Yield a hidden neighbour to write to, renamed to `out` on success and removed otherwise.

    The content is flushed to the disk before the renaming, so that after a power cut either the old
    or the new file is there.
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
    except OSError as error:  # of a full disk, Python says not where
        error.filename = error.filename or str(out)
        raise
    finally:
        part.unlink(missing_ok=True)
        open_parts.discard(part)


@contextlib.contextmanager
def locked(folder: Path, why: str) -> Iterator[None]:
    """Lock a folder, created if necessary; a DataError that says `why` if another process did.

    On file systems without locks nothing is checked.
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
    """Flush a file to the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _host() -> str:
    """Name of this host without dots, for file names."""
    return platform.node().replace(".", "-")


@functools.cache  # once per process: listing tens of thousands of label files takes a while
def _sweep_parts(folder: Path) -> None:
    """Remove unfinished files of processes that ended on this host, and any older than a day."""
    for part in folder.glob(".*.part*"):
        match = PART.fullmatch(part.name)
        if not match:
            continue
        with contextlib.suppress(OSError):  # another process removed or renamed it meanwhile
            is_lost = match["host"] == _host() and not _is_alive(int(match["pid"]))
            if is_lost or time.time() - part.stat().st_mtime > PART_LIFE_S:
                part.unlink()


def _is_alive(pid: int) -> bool:
    """Say whether this host runs a process with this id, of any user; a zombie has ended."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError as error:  # other systems have no /proc
        return error.errno != errno.ESRCH


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON, whole or not at all; paths are written as strings."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2, default=str) + "\n")


# Provenance


def utc_now() -> str:
    """UTC time, ISO 8601, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def made_now() -> dict[str, str]:
    """When, and with which version of this code, something was made."""
    return {"code_version": VERSION, "created_utc": utc_now()}


def config_dict(config: Any) -> dict[str, Any]:
    """Fields of a config dataclass as flat JSON values; `--config` reads them back."""
    values = json.loads(json.dumps(asdict(config), default=str))
    groups = [v for v in values.values() if isinstance(v, dict)]  # options grouped for --help
    flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
    return {k: v for group in (*groups, flat) for k, v in group.items()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with reading(path, "a file to read", "Check the path."), Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_stamp(path: Path) -> str:
    """Size and time of a file: while they stay, it is not read again to see what is in it."""
    with reading(path, "a file to read", "Check the path."):
        stat = Path(path).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"


# Commands


def option_names(config_class: Any) -> list[str]:
    """Names of the options of a config dataclass, those of its groups included."""
    types = get_type_hints(config_class)
    groups = [option_names(t) if is_dataclass(t) else [name] for name, t in types.items()]
    return [name for group in groups for name in group]


def config_args(path: Path | str, config_class: Any, given: Sequence[str] = ()) -> list[str]:
    """Command-line words that reproduce a saved config (a JSON file, or a run folder with one).

    `given` are the words that will follow. `config_class.followers`, if there is one, names the
    options whose defaults depend on another one: they are left out if that is given with another
    value than the saved one, so that they get its defaults and not the saved ones.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    with reading(path, "a JSON file as in configs/, or the folder of a run", "Check --config."):
        saved = json.loads(path.read_text())
    if not isinstance(saved, dict):
        raise DataError(f"{path}: expected a JSON object of options, found {type(saved).__name__}.")
    words, known = list[str](), option_names(config_class)
    followers: dict[str, tuple[str, ...]] = getattr(config_class, "followers", dict)()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in followers:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", default=saved.get(name))
    chosen = vars(parser.parse_known_args(given)[0])
    changed = [name for name in followers if name in saved and chosen[name] != saved[name]]
    left_out = {follower for name in changed for follower in followers[name]}
    for key, value in saved.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            meant = (
                f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}."
            )
            raise DataError(f"{path}: unknown key {key!r}; {meant} Correct the file.")
        flag = key.replace("_", "-")
        if key in left_out:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def split_config_file(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` out of the words of a command line: the file, and the user's flags.

    The flags of the file (`config_args`) come before these, which take precedence.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.json", nargs="?", const="")
    found, words = parser.parse_known_args(args)
    return found.config, words


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options of every command that works in a data folder."""

    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else ./data/manga."""
    overwrite: bool = False
    """Replace existing outputs, also those made with other options."""
    debug: bool = False
    """Show tracebacks."""


Config = TypeVar("Config")


def run_command(main: Callable[[Config], int | None], config_class: type[Config], doc: str) -> None:
    """Parse the command line into a config, run `main`, and exit with the right code.

    A DataError ends the program with its message and code 1 (with a traceback under --debug), a
    wrong flag with code 2, Ctrl-C with 130, and SIGTERM with 143 unless `main` handles it. Of
    several processes (torchrun), the first one says what is wrong: `distributed.together` logs
    what another one alone has met.
    """
    file, own = split_config_file(sys.argv[1:])
    debug, from_file = "--debug" in own, list[str]()
    setup_logging()
    logging.getLogger("loops").setLevel(logging.DEBUG if debug else logging.NOTSET)
    description = re.sub(r"\n(?=Writes |Layouts?: )", "\n\n", doc)  # else the help joins lines
    before = signal.signal(signal.SIGTERM, _interrupt)
    config = None
    try:
        try:
            from_file = [] if file is None else config_args(file, config_class, own)
            config = parse([*from_file, *own], config_class, description)
            if getattr(config, "seed", 0) < 0:
                raise DataError(f"--seed {config.seed}: expected 0 or more.")  # type: ignore[attr-defined]
            code = main(config)
        finally:
            sys.stdout.flush()  # here, where it is noticed that the reader has left
    except (DataError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            sys.exit(128 + signal.SIGPIPE)
        if debug:
            traceback.print_exc()
        message = in_one_line(error)
        option = re.match(r"--[\w-]+", message)
        if option and option[0] in from_file and option[0] not in own:
            message = f"{file}: {message}"
        if is_first_process() or not isinstance(error, DataError):
            print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_USAGE if config is None else EXIT_DATA)
    except KeyboardInterrupt as stop:
        print(
            "stopped; finished outputs are complete. Run the same command again to continue.",
            file=sys.stderr,
        )
        sys.exit(stop.args[0] if stop.args else 128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code or EXIT_DONE)


def is_first_process() -> bool:
    """Say whether this process is the first, or the only one, of those that torchrun started."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def parse(words: Sequence[str], config_class: type[Config], description: str) -> Config:
    """Read the words of a command line into a config; print help, if that is asked for, and exit.

    Raises
    ------
    DataError
        If they cannot be read: one line instead of tyro's box of several.
    """
    import tyro  # here, so that importing a script's functions does not need it

    said, before = io.StringIO(), os.environ.get("COLUMNS")
    if {"-h", "--help"}.isdisjoint(words):
        os.environ["COLUMNS"] = "9999"  # nothing is wrapped
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(
                config_class,
                args=words,
                description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),  # flat flags
            )
    except SystemExit as stop:
        if stop.code:
            raise DataError(_usage_error(said.getvalue())) from None
        no_default = r"\s*\(default:\s*(None)?\)"  # what happens then is in the text
        print(re.sub(f"{no_default}| +$", "", said.getvalue(), flags=re.MULTILINE).rstrip())
        raise
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ |= {"COLUMNS": before} if before else {}


PLAIN_WORDS = {
    r"Unrecognized options: (--.*)": r"\1: no such option.",
    r"Unrecognized options: (.*)": r"\1: no option takes this value.",
    r"Error parsing (--\S+): (.*)": r"\1: \2.",
    r"Error parsing \w+: ": "",
    r"no type matching .*? could be instantiated from \[(.*?)\]\. Got errors: .*": r"found \1.",
    r"invalid literal for int\(\) with base 10:": "not a whole number:",
    r"could not convert string to float:": "not a number:",
    r"invalid choice '(.*)' for argument '(.*)'\. Expected": r"\2 \1: expected",
    r"Missing value for argument '(.*)'\. Expected (\d+) values": r"\1: too few, expected \2",
    r"Missing from .*?: (--\S+) .*": r"\1 is missing.",
}
"""What tyro says of a command line, and how it is said here: first which option is wrong."""


def _usage_error(box: str) -> str:
    """Make one line of tyro's several: what is wrong, what was expected, where to read more."""
    _, said, *more = re.split(r"^ *-{9,} *$", box, flags=re.MULTILINE)
    line = " ".join(said.split())
    for theirs, ours in PLAIN_WORDS.items():
        line = re.sub(theirs, ours, line)
    options = re.findall(r"^ +(--.*?) *$", more[0], re.MULTILINE)
    expected = f" Expected {' or '.join(options)}." if options else ""
    return f"{line}{expected} See {Path(sys.argv[0]).name} --help."


def in_one_line(error: Exception) -> str:
    """Say what went wrong; of a system call also with which file, and what to do."""
    if isinstance(error, MemoryError):
        return f"not enough memory ({first_line(error)}). Ask for more, or use fewer processes."
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}. Check that the file exists, its permissions and the disk."


def _reader_has_left() -> bool:
    """Say whether the reader of our output (such as head) has gone; if so, discard the rest."""
    stdout = select.poll()
    try:
        stdout.register(sys.stdout.fileno(), 0)
    except OSError:  # not a file, as in a notebook
        return False
    has_left = any(event & select.POLLERR for _, event in stdout.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def _interrupt(number: int, _frame: object) -> None:
    """Stop like Ctrl-C, with this signal's exit code."""
    raise KeyboardInterrupt(128 + number)


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


def processes(jobs: int) -> int:
    """Return the number of processes that --jobs asks for; 0 stands for one per CPU."""
    if jobs < 0:
        raise DataError(f"--jobs {jobs}: expected 0 (one process per CPU) or more.")
    return jobs or cpu_count()


def counted(n: int, one: str, many: str = "") -> str:
    """Write a number and its noun, in the singular or the plural (default: with an s)."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def cpu_count() -> int:
    """Count the CPUs this process may use: $SLURM_CPUS_PER_TASK, else its affinity."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK")
    if slurm:
        return int(slurm)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_traceback_of_ctrl_c(kind: Any, error: Any, trace: Any, usual: Any = sys.excepthook) -> None:
    """Leave out the traceback of a Ctrl-C outside of `run_command`: while packages are imported."""
    if kind is not KeyboardInterrupt:
        usual(kind, error, trace)


sys.excepthook = _no_traceback_of_ctrl_c
