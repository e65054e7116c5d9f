"""Loops over galaxies continue after failures, in one process or several, and stop cleanly."""

import contextlib
import csv
import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path

from utils import DataError

import pytest

import cube_patch_processing
import loops

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["8485-1901", "8485-1902", "8485-1903"]


Config = make_dataclass("Config", [("debug", bool, False)], frozen=True)


def visit(plateifu, bad=()):
    if plateifu in bad:
        raise DataError(f"{plateifu}: broken")
    return "written"


@pytest.mark.parametrize("jobs", [1, 2])
def test_loop_continues_after_a_bad_galaxy_and_lists_it(tmp_path, jobs):
    failed = tmp_path / "failed.csv"
    outcome = loops.for_each_galaxy(partial(visit, bad=NAMES[1:2]), NAMES, "cubes", failed, jobs)
    assert outcome == dict(zip(NAMES, ("written", "failed", "written"), strict=True))
    rows = list(csv.DictReader(failed.open()))
    assert rows == [{"plateifu": "8485-1902", "stage": "cubes", "reason": "8485-1902: broken"}]
    assert loops.report(outcome, "cubes", tmp_path) == 1
    outcome = loops.for_each_galaxy(visit, NAMES, "cubes", failed, jobs)
    assert loops.report(outcome, "cubes", tmp_path) == 0
    assert not failed.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_debug_shows_the_traceback_of_a_galaxy(tmp_path, jobs, command):
    def loop(config):
        loops.for_each_galaxy(partial(divide, by=0), NAMES, "cubes", tmp_path / "f.csv", jobs)

    for words, has_traceback in (((), False), (("--debug",), True)):
        said = command(loop, Config, *words)[1]
        assert "ZeroDivisionError" in said
        assert ("Traceback" in said) == ("in divide" in said) == has_traceback


def divide(plateifu, by):
    return str(1 / by)


@pytest.mark.parametrize("content", [b"\xff\xfe,\0\n" * 9, b'"' + b"x" * 200_000, b"a\n\n,\n"])
def test_a_damaged_list_of_failures_is_replaced(tmp_path, content):
    (failed := tmp_path / "failed.csv").write_bytes(content)
    loops.for_each_galaxy(partial(visit, bad=NAMES[:1]), NAMES, "cubes", failed)
    rows = [row for row in csv.reader(failed.open()) if row[0] in NAMES]
    assert [row[:2] for row in rows] == [[NAMES[0], "cubes"]]


def test_a_list_of_failures_that_cannot_be_written_does_not_end_the_loop(
    tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "failed.csv")

    monkeypatch.setattr(loops, "_update_failures", full)
    outcome = loops.for_each_galaxy(
        partial(visit, bad=NAMES[:1]), NAMES, "cubes", tmp_path / "failed.csv"
    )
    assert outcome[NAMES[0]] == "failed"
    assert "failed.csv: No space left on device" in caplog.text


def visit_or_die(plateifu, bad):
    if plateifu in bad:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return "written"


@pytest.mark.parametrize("bad", [("8485-1903",), ("8485-1901", "8485-1902", "8485-1912")])
def test_killed_worker_fails_only_its_own_galaxy(tmp_path, bad):
    names, failed = [f"8485-{n}" for n in range(1901, 1913)], tmp_path / "failed.csv"
    outcome = loops.for_each_galaxy(partial(visit_or_die, bad=bad), names, "cubes", failed, 3)
    assert outcome == {n: "failed" if n in bad else "written" for n in names}
    rows = list(csv.DictReader(failed.open()))
    assert [row["plateifu"] for row in rows] == list(bad)
    assert all("killed" in row["reason"] for row in rows)


LOOP = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
import loops, utils

OUT, JOBS = Path(sys.argv.pop(1)), int(sys.argv.pop(1))

@dataclass(frozen=True)
class Config:
    "Nothing."

def write_for_long(plateifu):
    with utils.atomic_path(OUT / f"{plateifu}.h5") as part:
        part.write_text("half")
        time.sleep(60)
    return "written"

def main(config):
    names = [f"8485-{n}" for n in range(1901, 1921)]
    loops.for_each_galaxy(write_for_long, names, "cubes", OUT / "failed.csv", JOBS)

if __name__ == "__main__":
    utils.run_command(main, Config, "Write for long.")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "jobs", "code", "send"),
    [
        (signal.SIGINT, 1, 130, os.kill),
        (signal.SIGINT, 2, 130, os.kill),
        (signal.SIGINT, 2, 130, os.killpg),  # a terminal's Ctrl-C
        (signal.SIGTERM, 1, 143, os.kill),
        (signal.SIGTERM, 2, 143, os.kill),
        (signal.SIGTERM, 2, 143, os.killpg),  # SLURM's
        (signal.SIGKILL, 2, -9, os.kill),
    ],
)
def test_stopped_loop_leaves_no_process_and_no_file(tmp_path, number, jobs, code, send):
    (tmp_path / "loop.py").write_text(LOOP)
    (out := tmp_path / "out").mkdir()
    loop = subprocess.Popen(
        [sys.executable, "loop.py", str(out), str(jobs)], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while len(list(out.iterdir())) < jobs:
            assert loop.poll() is None
            time.sleep(0.05)
        send(loop.pid, number)
        stderr = loop.communicate(timeout=10)[1]  # when the last process has closed the pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(loop.pid, signal.SIGKILL)
    assert loop.returncode == code
    assert list(out.iterdir()) == []
    if code > 0:
        again = "Run the same command again to continue.\n"
        assert stderr == f"stopped; finished outputs are complete. {again}"


def test_list_of_failures_keeps_the_galaxies_that_were_not_tried(tmp_path):
    failed = tmp_path / "failed.csv"

    def listed(names, bad):
        loops.for_each_galaxy(partial(visit, bad=bad), names, "cubes", failed)
        return [r["plateifu"] for r in csv.DictReader(failed.open())] if failed.exists() else []

    assert listed(NAMES, NAMES[:2]) == NAMES[:2]
    assert listed(NAMES[2:], ()) == NAMES[:2]
    assert listed(NAMES[:1], ()) == NAMES[1:2]
    assert listed(NAMES[2:], NAMES[2:]) == NAMES[1:]
    assert listed(NAMES[1:], ()) == []


def test_each_shard_has_its_own_list_of_failures(tmp_path):
    found = []
    for shard in ("0/2", "1/2", None):
        chosen = {"data_dir": tmp_path, "plateifu": NAMES[:2], "shard": shard, "jobs": 1}
        config = cube_patch_processing.Config(**chosen)
        assert cube_patch_processing.main(config) == 1
        found.append({p.name: p.read_text().count("\n") for p in tmp_path.rglob("failed*.csv")})
    assert found[1] == {"failed-0of2.csv": 2, "failed-1of2.csv": 2}
    assert found[2] == {"failed.csv": 3}  # the run without shards tried the galaxies of both


def test_shards_partition_the_list():
    parts = [loops.shard_of(range(11), f"{k}/3") for k in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(11))


@pytest.mark.parametrize(
    ("shard", "listed", "message"),
    [
        ("3/3", None, "--shard 3/3"),
        ("a/b", None, "--shard a/b"),
        ("1", None, "--shard 1"),
        (None, "# none yet\n", "names no galaxy"),
        (None, "", "names no galaxy"),
        (None, "mangaid,plateifu\n1-1\n", "names no galaxy"),
    ],
)
def test_wrong_choice_of_galaxies_does_not_mean_all_of_them(tmp_path, shard, listed, message):
    path = listed if listed is None else tmp_path / "galaxies.txt"
    if path:
        path.write_text(listed)
    with pytest.raises(DataError, match=message):
        loops.chosen_galaxies(loops.GalaxyChoice(galaxy_list=path, shard=shard), NAMES)


@pytest.mark.parametrize("ahead", [0, 1, 3, 99])
def test_results_and_errors_are_in_order_and_few_are_computed_in_advance(ahead):
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.01 if i % 3 else 0.03)
        return 1 / (11 - i)

    with ThreadPoolExecutor(4) as pool:
        results = loops.in_order(pool, work, range(12), ahead)
        for i in range(11):
            assert next(results) == 1 / (11 - i)
            assert len(begun) <= i + 1 + max(ahead, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert len(begun) == 12


def test_results_of_a_process_that_was_killed_are_reported_in_one_line():
    work = partial(visit_or_die, bad=NAMES[1:2])
    with loops.worker_pool(2) as pool:
        results = loops.in_order(pool, work, NAMES, 1)
        assert next(results) == "written"
        with pytest.raises(DataError, match="process was killed, probably for lack of memory"):
            next(results)
