"""Loop over galaxies: choose them, work in several processes, list the ones that failed.

Reads   a galaxy list, where one is given.
Writes  failed.csv (plateifu, stage, reason). A galaxy that fails, or whose process is killed, is
        listed there and the loop continues.

    >>> galaxies = chosen_galaxies(choice, available)
    >>> outcome = for_each_galaxy(work, galaxies, "cubes", failed_path(folder, choice.shard), jobs)
    >>> return report(outcome, "cubes", folder)
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import utils
from utils import DataError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class GalaxyChoice(utils.CommandOptions):
    """Which galaxies to work on, and how."""

    plateifu: tuple[str, ...] = ()
    """Galaxies, e.g. 8485-1901; default all in the data folder."""
    galaxy_list: Path | None = None
    """File with one plateifu per line, or a CSV with a column plateifu."""
    shard: str | None = None
    """Part k of n of the galaxies, for job arrays: k/n with k from 0, e.g. 0/4."""
    jobs: int = 0
    """Number of processes; 0 starts one per CPU."""


# Choice of galaxies


def chosen_galaxies(choice: GalaxyChoice, available: list[str]) -> list[str]:
    """Galaxies named by flag or file, else the available ones; of these the shard's."""
    names = list(choice.plateifu)
    if choice.galaxy_list:
        names += read_galaxy_list(choice.galaxy_list)
    for name in names:
        utils.split_plateifu(name)
    names = list(dict.fromkeys(names)) or available
    if not names:
        root = utils.data_dir(choice.data_dir)
        raise DataError(
            f"{root}: no galaxy to work on. Expected files of galaxies in the data folder "
            "(--data-dir, else MANGA_DATA_DIR, else ./data/manga); fill it with download_utils.py "
            "or mock_manga.py."
        )
    return shard_of(names, choice.shard)


def read_galaxy_list(path: Path) -> list[str]:
    """Read plateifus, one per line, or from a CSV's column plateifu; # starts a comment."""
    expected = "one plateifu per line or a CSV column plateifu"
    with utils.reading(path, expected, "Check --galaxy-list."):
        rows = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        rows = [row for row in rows if row]
        header = [word.strip().lower() for word in rows[0].split(",")] if rows else []
        if "plateifu" in header:
            column = header.index("plateifu")
            rows = [row.split(",")[column].strip() for row in rows[1:] if row.count(",") >= column]
        if not rows:
            raise ValueError("names no galaxy")
        for row in rows:
            if not utils.PLATEIFU.fullmatch(row):
                raise ValueError(f"{row[:80]!r} is not a valid plateifu")
        return rows


def shard_of(items: Sequence[Any], shard: str | None) -> list[Any]:
    """Items k, k+n, ... for shard "k/n" (k from 0); all items without a shard."""
    if not shard:
        return list(items)
    match = re.fullmatch("([0-9]+)/([0-9]+)", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise DataError(f"--shard {shard}: expected k/n with 0 <= k < n, e.g. 0/4.")
    return list(items[int(match[1]) :: int(match[2])])


def failed_path(folder: Path, shard: str | None) -> Path:
    """Path of a stage's list of failed galaxies; each shard has its own."""
    return Path(folder) / (f"failed-{shard.replace('/', 'of')}.csv" if shard else "failed.csv")


# Work on the galaxies


def for_each_galaxy(
    work: Callable[[str], str],
    plateifus: Iterable[str],
    stage: str,
    failed_csv: Path,
    jobs: int = 1,
) -> dict[str, str]:
    """Run `work` on every galaxy; list those that fail and continue.

    Parameters
    ----------
    work : function of a plateifu, picklable
        Returns a word for the outcome, e.g. "written". An exception fails this galaxy only.
    stage : str
        Name of the work, for the progress bar, the log and failed.csv.
    failed_csv : Path
        Rows (plateifu, stage, reason) of these galaxies are replaced, those of others stay. A file
        without rows is removed.
    jobs : int
        Number of processes; 1 works in the current process, 0 starts one per CPU.

    Returns the outcome of each, "failed" for those that failed.
    """
    from tqdm import tqdm  # here: --help does not need it

    todo, jobs = list(plateifus), utils.processes(jobs)
    outcome: dict[str, str] = {}
    failures: list[tuple[str, ...]] = []
    start = time.monotonic()
    with tqdm(total=len(todo), desc=stage, unit="observation", disable=None) as bar:

        def finish(plateifu: str, word: str, reason: str = "", trace: str = "") -> None:
            outcome[plateifu] = word
            if word == "failed":
                failures.append((plateifu, stage, reason))
                log.error("%s: %s failed: %s", plateifu, stage, reason)
                log.debug("%s", trace)
            bar.update()
            if (done := len(outcome)) % 100 == 0:
                rate = done / (time.monotonic() - start)
                left = (len(todo) - done) / rate / 60
                speed = f"{rate:.1f} observations/s, {left:.0f} min left"
                log.info(f"{stage}: {done} of {len(todo)} observations, {speed}")

        if jobs == 1 or len(todo) < 2:
            for plateifu in todo:
                finish(plateifu, *_attempt(work, plateifu))
        else:
            _in_processes(work, todo, jobs, finish)
    try:
        _update_failures(failed_csv, set(todo), failures)
    except OSError as error:  # a full disk: the work is done, and the log names what failed
        log.error(utils.in_one_line(error))
    if failures:
        count = utils.counted(len(todo), "observation")
        log.error(f"{stage}: {len(failures)} of {count} failed, listed in {failed_csv}")
    return outcome


def _attempt(work: Callable[[str], str], plateifu: str) -> tuple[str, ...]:
    """Outcome for one galaxy; if it failed, also the reason and the traceback."""
    try:
        return (work(plateifu),)
    except Exception as error:  # a bug on one galaxy must not stop ten thousand others
        reason = utils.in_one_line(error)
        if not isinstance(error, DataError | OSError | MemoryError):
            reason = f"{type(error).__name__}: {error} (a bug: run this galaxy with --debug)"
        return "failed", reason, traceback.format_exc()


def _in_processes(
    work: Callable[[str], str], todo: list[str], jobs: int, finish: Callable[..., None]
) -> None:
    """Work in several processes; call `finish` with each galaxy's outcome.

    A worker that is killed, usually for lack of memory, breaks its whole pool. The galaxies then in
    progress are repeated one at a time, so that only the one whose worker is killed again fails.
    """
    waiting, suspects = deque(todo), deque[str]()
    while waiting or suspects:
        queue, n = (suspects, 1) if suspects else (waiting, min(jobs, len(waiting)))
        running: dict[Future, str] = {}
        with worker_pool(n) as pool:
            try:
                while queue or running:
                    while queue and len(running) < n:
                        running[pool.submit(_attempt, work, queue[0])] = queue[0]
                        queue.popleft()
                    done = wait(running, return_when=FIRST_COMPLETED).done
                    for future in sorted(done, key=lambda f: f.exception() is not None):
                        result = future.result()
                        finish(running.pop(future), *result)
            except BrokenProcessPool:
                if n > 1:
                    suspects.extend(running.values())
                    continue
                for plateifu in running.values():
                    reason = "its process was killed, probably for lack of memory; use fewer --jobs"
                    finish(plateifu, "failed", reason)


@contextlib.contextmanager
def worker_pool(n: int, start_method: str | None = None) -> Iterator[ProcessPoolExecutor]:
    """Pool of n processes, which are terminated at once if the `with` block raises."""
    others = multiprocessing.active_children()
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(n, context, initializer=_start_worker) as pool:
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def _start_worker() -> None:
    """Prepare a worker: Ctrl-C is left to the parent, SIGTERM and the parent's end stop it."""
    utils.open_parts.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_worker)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_worker(number: int, _frame: object) -> None:
    """Remove unfinished files and exit; an exception would reach the pool as a result."""
    for part in utils.open_parts:
        part.unlink(missing_ok=True)
    os._exit(128 + number)


def _end_with_parent() -> None:
    """Wait until the parent process has ended for whatever reason, then end this worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _update_failures(failed_csv: Path, tried: set[str], failures: list[tuple[str, ...]]) -> None:
    """Replace the rows of the galaxies tried, in all shards' lists too; remove empty lists."""
    failed_csv = Path(failed_csv)
    for path in {failed_csv, *utils.files_in(failed_csv.parent, "failed*.csv")}:
        rows: list[tuple[str, ...]] = []
        if path.is_file():
            text = path.read_text(errors="replace").replace("\0", "")
            with contextlib.suppress(csv.Error):  # damaged: it is replaced
                table = list(csv.reader(text.splitlines()))[1:]
                rows = [(*row, "", "")[:3] for row in table if row]
        kept = [row for row in rows if row[0] not in tried]
        kept += failures if path == failed_csv else []
        if kept and sorted(kept) != sorted(rows):
            with utils.atomic_path(path) as part, part.open("w", newline="") as f:
                csv.writer(f).writerows([("plateifu", "stage", "reason"), *sorted(kept)])
        elif not kept:
            path.unlink(missing_ok=True)


def in_order(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yield the results of `work` in the order of the items.

    `ahead` results are computed in advance, in the pool's threads or processes, and held in memory.
    A process that is killed is a `DataError`.
    """
    waiting = iter(items)
    running = deque(pool.submit(work, item) for item in itertools.islice(waiting, max(ahead, 1)))
    while running:
        try:
            result = running.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process was killed, probably for lack of memory, expected its results. Use "
                "fewer --jobs, or ask for more memory."
            ) from None
        running.extend(pool.submit(work, item) for item in itertools.islice(waiting, 1))
        yield result


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Like `in_order`, but with threads of its own, two items in advance for each."""
    with ThreadPoolExecutor(threads) as pool:
        yield from in_order(pool, work, items, 2 * threads)


def report(outcome: dict[str, str], stage: str, where: Path) -> int:
    """Log the number of observations by outcome and where the results are; return the exit code."""
    words = Counter(outcome.values())
    counts = ", ".join(f"{words[word]} {word}" for word in sorted(words))
    total = utils.counted(len(outcome), "observation")
    log.info(f"{stage}: {total} ({counts or 'none'}). Results: {where}")
    return utils.EXIT_DATA if words["failed"] else utils.EXIT_DONE
