"""Interrupt every stage of the pipeline in every way, run it again, and compare all files.

A stage is killed (SIGKILL) at a random moment, meets a full disk, a read-only folder, another
process with the same work, or a wrong clock. Where it says that it is done, and always after the
next run, each file of its data folder must be byte for byte that of a run that was never
disturbed (weights and checkpoints: value for value); nothing may be missing or left over. Times
are held (`hold_time`) and log.txt is left out, as it says how often a training was resumed.

    >>> counts, failures = interrupt_stages({"kill": 14, "full disk": 4}, seed=1)
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from hashlib import sha256
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pandas as pd
import torch
from astropy.io.fits.hdu.base import _ValidHDU
from conftest import train, write_fits
from test_download_utils import Archive, fits_file

from recipe import digest_of

TIME_LIMIT_S = 300
"""Longest that a stage may take, by the clock."""
GALAXIES = "8485-1901", "8485-1902"
"""These have FITS files alone; the others, cubes and labels."""
TEST_GALAXY = mock_cubes.PLATEIFUS[-1]

Act = Callable[[], object]


def stages(archive: str) -> dict[str, Callable[[Path], object]]:
    """Each stage of the pipeline as a function of the data folder; `archive` is a server's URL."""
    import calc_data_stats
    import create_data_splits
    import create_easy_data_splits
    import cube_patch_processing
    import cube_processing
    import download_utils
    import eval_fns
    import evidence
    import map_galaxies
    import mock_manga
    import pack_cubes
    import process_single_cube
    import vis_fns

    def on(module, config_name: str = "Config", of_run: bool = False, **options):
        def act(data: Path) -> object:
            where = {"run_dir": data / "run"} if of_run else {}
            config = getattr(module, config_name)(data_dir=data, **where, **options)
            return module.main(config)

        return act

    def training(data: Path, **options) -> None:
        train(data, data / "new", epochs=4, resume="auto", **options)

    split = {"split_dir": "new", "min_labelled": 1}
    return {
        "download": on(
            download_utils, plateifu=GALAXIES[1:], kinds=("DRPCUBE",), base_url=(archive,)
        ),
        "simulate": on(mock_manga, "MockConfig", n_galaxies=1, bundles=(19,)),
        "one cube": on(process_single_cube, plateifu=GALAXIES[0], n_band=200),
        "all cubes": on(cube_processing, n_band=200, jobs=2, splits=False),
        "hard split": on(create_data_splits, **split),
        "easy split": on(create_easy_data_splits, **split),
        "statistics": on(calc_data_stats, split_dir="easy", n_components=4, overwrite=True),
        "packed cubes": on(pack_cubes, split_dir="hard", packed_type="float16", jobs=1),
        "patches": on(cube_patch_processing, plateifu=(TEST_GALAXY,), patch_size=3, jobs=1),
        "training": partial(training, network="matched_filters", cutout=7),
        "training SSFTT": training,
        "evaluation": on(eval_fns, "EvalConfig", of_run=True),
        "maps": on(map_galaxies, of_run=True, plateifu=(TEST_GALAXY, mock_cubes.PLATEIFUS[0])),
        "evidence": on(evidence, of_run=True, plateifu=(TEST_GALAXY,)),
        "figures": on(vis_fns, "VisConfig", of_run=True, plateifu=(TEST_GALAXY,)),
    }


def make_data(data: Path) -> None:
    """Fill a data folder with all that a stage may need."""
    mock_cubes.make_data_dir(data)
    for galaxy in GALAXIES:
        write_fits(utils.raw_dir(data, galaxy), galaxy)
    train(data, data / "run", epochs=2, network="matched_filters", cutout=7)


@contextlib.contextmanager
def local_archive() -> Iterator[str]:
    """Serve a DRP cube, in a process of its own: forks are safe where there are no threads."""
    import download_utils

    with ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        base = f"http://127.0.0.1:{server.server_port}/sas"
        path = download_utils.archive_path("DRPCUBE", GALAXIES[1], download_utils.DEFAULT_DAPTYPE)
        Archive.files = {f"/sas/{path}": fits_file(GALAXIES[1])}
        pid = os.fork()
        if not pid:
            server.serve_forever()
    try:
        yield base
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# Processes


def hold_time() -> None:
    """Have all files say that they were made at one moment, and that training took no time."""
    import training

    utils.utc_now = lambda: "2000-01-01T00:00:00Z"
    _ValidHDU._get_timestamp = lambda _: "2000-01-01T00:00:00"  # beside CHECKSUM
    training.time = SimpleNamespace(monotonic=lambda: 0.0)  # type: ignore[assignment]


def start(act: Act, before: Act = lambda: None) -> tuple[int, int]:
    """Start a process that calls `before`, then `act`; return its id, and where it will report."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        word = "tracebacks"
        try:
            signal.alarm(TIME_LIMIT_S)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            hold_time()
            # In a fork, the first such call makes a new pool; two threads at once would fail.
            torch.set_num_threads(1)
            before()
            word = "refused" if act() else "done"
        except (DataError, OSError, MemoryError) as error:
            is_line = "\n" not in utils.in_one_line(error)
            word = "refused" if is_line else f"tracebacks: several lines: {error}"
        except BaseException as error:
            word = f"tracebacks: {error!r:.300}"
        finally:
            os.write(send, word.encode())
            os._exit(0)
    os.close(send)
    return pid, receive


def end(pid: int, receive: int, kill_after: float | None = None) -> str:
    """Say how a process has ended, with its own processes: done, refused, killed or a fault."""
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(receive, "rb") as f:
        word = f.read().decode()
    status = os.waitpid(pid, 0)[1]
    if word:
        return word
    ended_by = os.WTERMSIG(status)
    names = {signal.SIGKILL: "killed", signal.SIGALRM: "hangs"}
    return names.get(ended_by, f"tracebacks: ended by signal {ended_by}")  # type: ignore[call-overload]


# Interruptions


class Stage:
    """A stage at work in a data folder, as an undisturbed run has shown it."""

    def __init__(self, act: Callable[[Path], object], sound: Path, data: Path) -> None:
        self.sound, self.data = sound, data
        self.act = partial(act, data)
        self.renew()
        before, begin = contents(data), time.monotonic()
        word = end(*start(self.act))
        self.duration = time.monotonic() - begin
        if word != "done":
            raise SystemExit(f"undisturbed, but {word}")
        self.expected = contents(data)
        written = [data / name for name in self.expected if name not in before]
        self.largest = max((p.stat().st_size for p in written if p.is_file()), default=1)

    def renew(self) -> None:
        """Put back the folder as it was before the stage."""
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.copytree(self.sound, self.data)


def kill(stage: Stage, rng: np.random.Generator) -> list[str]:
    """Kill it at a random moment."""
    return [end(*start(stage.act), rng.uniform(0, stage.duration))]


def full_disk(stage: Stage, rng: np.random.Generator) -> list[str]:
    """Let no file become larger than a random size."""
    size = int(stage.largest ** rng.uniform(0, 1))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return [end(*start(stage.act, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))))]


def read_only(stage: Stage, _: np.random.Generator) -> list[str]:
    """Take away the right to write."""
    folders = [stage.data, *(path for path in stage.data.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)

    word = end(*start(stage.act, drop_capabilities))
    for folder in folders:
        folder.chmod(0o755)
    return [word]


def drop_capabilities() -> None:
    """Take away root's right to write everywhere (Linux: capset with empty sets)."""
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None).capset(version_3, (ctypes.c_uint32 * 6)())


def two_writers(stage: Stage, rng: np.random.Generator) -> list[str]:
    """Start it twice, the second time a random moment later; one of them must get it done."""
    first = start(stage.act)
    time.sleep(rng.uniform(0, stage.duration / 2))
    words = [end(*start(stage.act)), end(*first)]
    return words if "done" in words else ["interruptions_different: both refused", *words]


def wrong_clock(stage: Stage, rng: np.random.Generator) -> list[str]:
    """Kill it on a computer whose clock is up to a year slow or fast."""
    shift = float(rng.choice([-1, 1]) * 10 ** rng.uniform(1, 7.5))
    true_time = time.time

    def before() -> None:
        time.time = lambda: true_time() + shift

    there = contents(stage.data)
    word = end(*start(stage.act, before), rng.uniform(0, 1.2 * stage.duration))
    for name in contents(stage.data).keys() - there.keys():
        os.utime(stage.data / name, (true_time() + shift,) * 2)
    return [word]


WAYS = {"kill": kill, "full disk": full_disk, "read-only": read_only,
        "two writers": two_writers, "wrong clock": wrong_clock}  # fmt: skip


def summed(content: Any) -> Any:
    """Content as plain values and digests that can be compared."""
    if isinstance(content, np.ndarray):
        return digest_of(np.asarray(content)) if content.dtype != object else str(content)
    if isinstance(content, pd.DataFrame):
        return content.to_csv()
    if type(content).__module__.startswith("torch"):
        return summed(content.detach().numpy())
    if is_dataclass(content) and not isinstance(content, type):
        return summed(vars(content))
    if isinstance(content, dict):
        return {str(k): summed(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [summed(v) for v in content]
    return repr(content)


def contents(folder: Path) -> dict[str, str]:
    """Digest of each file in a folder, empty for a folder; without log.txt.

    Of weights and checkpoints, that of the content: their writers order names at random
    (safetensors), and write alike what is equal or the same object in two ways (pickle).
    """
    import run_folder

    found = {}
    for path in folder.rglob("*"):
        digest = sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        with contextlib.suppress(DataError):  # damaged: it differs in any case
            if path.suffix == ".safetensors":
                digest = digest_of(summed(run_folder.read_tensors(path)))
            elif path.name == run_folder.CHECKPOINT_FILE:
                digest = digest_of(summed(run_folder.read_checkpoint(path.parent)))
        if path.name != run_folder.LOG_FILE:
            found[str(path.relative_to(folder))] = digest
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of what is missing, left over or different."""
    return sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))


def interrupt(stage: Stage, way: str, rng: np.random.Generator) -> list[str]:
    """Interrupt a stage once and run it again; return what was wrong, each with its kind first."""
    stage.renew()
    words = WAYS[way](stage, rng)
    failures = [word for word in words if word not in ("done", "refused", "killed")]
    if "done" in words and (changed := differences(contents(stage.data), stage.expected)):
        failures.append(f"silent: done, but {', '.join(changed)}")
    word = end(*start(stage.act))
    kind = "kills_different" if way == "kill" else "interruptions_different"
    if word != "done":
        failures.append(f"{kind}: run again, {word}")
    elif changed := differences(contents(stage.data), stage.expected):
        failures.append(f"{kind}: {', '.join(changed)}")
    return failures


def interrupt_stages(times: dict[str, int], seed: int, only: str = "") -> tuple[Counter, list[str]]:
    """Interrupt each stage `times[way]` times in each way; return counts and a line per failure."""
    counts: Counter = Counter(kills=0, kills_different=0)
    failures, rng = [], np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch, local_archive() as archive:
        sound, data = Path(scratch) / "sound", Path(scratch) / "data"
        make_data(sound)  # here, so that forks need not import what it needs
        for name, act in stages(archive).items():
            if only not in name:
                continue
            stage = Stage(act, sound, data)
            for way, n in times.items():
                for _ in range(n):
                    found = interrupt(stage, way, rng)
                    counts["kills" if way == "kill" else "interruptions"] += 1
                    counts.update(line.partition(":")[0] for line in found)
                    failures += [f"{line} ({name}, {way})" for line in found]
            print(f"interrupted: {name}; faults so far: {len(failures)}", flush=True)
    return counts, failures
