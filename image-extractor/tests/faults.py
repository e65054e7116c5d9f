"""Damage data sets in many ways, and see what the commands make of them.

Each mutation is given to `validate` and to one of the other commands. Every command must end with
exit code 0 or 1 and, if 1, a line that says why; `validate` may call a file valid only if all that
can be read from it is the same as before. Counted are: silent (valid, but different), tracebacks,
crashes (ended by a signal), hangs.

Writes  a line per fault and the counts to the screen; exit code 1 if there was a fault.

    python tests/faults.py --mutations 500 --seed 1      # or make faults
"""

import argparse
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tables
from conftest import extract

from image_extractor import cli

CPU_LIMIT_S, TIME_LIMIT_S = 60, 1800  # the second for what waits for ever
FAULTS = ("silent", "tracebacks", "crashes", "hangs")
OTHERS = ("inspect", "plot", "gallery", "merge", "export")
DATA_SETS = {
    "mapped": {"max_events": 3},
    "uncompressed": {"max_events": 2, "compression": "none"},
    "all": {"max_events": 2, "storage_mode": "all", "type_mode": "SST", "mapping": "none"},
    "blosc": {"max_events": 3, "compression": "blosc-zstd", "mode": "energy_recon"},
    "split": {"max_events": 6, "shuffle": True, "split": {"Training": 0.5, "Test": 0.5}},
}


def damaged(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Damage the bytes of a file at random; return the name of the damage, too."""
    changed, n = bytearray(content), len(content)
    kind = str(rng.choice(["bit", "byte", "number", "cut", "zeros", "noise", "moved", "lost"]))
    # Half of them in the first tenth, where HDF5 keeps most of its own structures.
    at = int(rng.integers(n if rng.random() < 0.5 else n // 10))
    size = int(rng.choice([2, 8, 64, 512]))
    if kind == "bit":
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        changed[at] = int(rng.integers(256))
    elif kind == "number":
        extremes = (-1, 0, 1, 2**31 - 1, 2**63 - 1)
        changed[at : at + 8] = int(rng.choice(extremes)).to_bytes(8, "little", signed=True)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zeros":
        changed[at : at + size] = bytes(len(changed[at : at + size]))
    elif kind == "noise":
        changed[at : at + size] = rng.bytes(len(changed[at : at + size]))
    elif kind == "moved":
        start = int(rng.integers(n - size))
        changed[at : at + size] = content[start : start + len(changed[at : at + size])]
    else:
        del changed[at : at + size]
    return f"{kind} at {at} of {n}", bytes(changed)


def content(path: Path) -> dict[str, str]:
    """Digest of everything that can be read from each node of a file."""
    found = {}
    with tables.open_file(str(path)) as h5:
        for node in h5.walk_nodes("/"):
            digest = hashlib.sha256()
            for name in sorted(node._v_attrs._f_list("all")):
                digest.update(f"{name} {node._v_attrs[name]!r}".encode())
            if isinstance(node, tables.Leaf):
                digest.update(f"{node.dtype.descr} {node.shape}".encode())
                digest.update(np.ascontiguousarray(node.read()).tobytes())
            found[node._v_pathname] = digest.hexdigest()
    return found


def words(command: str, path: Path) -> list[str]:
    """Make the command line of a command for a file, with outputs beside the file."""
    out = str(path.with_name(f"{command}_of_{path.name}"))
    options = {"plot": ["--output", f"{out}.png"], "gallery": ["--output", f"{out}.png"]}
    options |= {name: ["--output", out, "--overwrite"] for name in ("merge", "export")}
    return [command, str(path), *options.get(command, [])]


def forked(function: object, *arguments: object, log: Path) -> int:
    """Exit code of a function in a child process, negative for a signal; its output goes to log.

    A child that takes longer than CPU_LIMIT_S or TIME_LIMIT_S is ended by SIGXCPU or SIGALRM.
    """
    pid = os.fork()
    if not pid:
        code = 99
        try:
            signal.alarm(TIME_LIMIT_S)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
            out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)
            code = function(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(path: Path, command: str, sound: dict[str, str]) -> str:
    """One of FAULTS, or what a command did with a damaged file: "refused", "same" or "done"."""
    log = path.with_suffix(".log")
    code = forked(cli.main, words(command, path), log=log)
    text = log.read_text(errors="replace")
    if code in (-signal.SIGALRM, -signal.SIGXCPU):
        return "hangs"
    if code < 0:
        return "crashes"
    if "Traceback" in text or code > 1 or (code == 1 and not text.strip()):
        return "tracebacks"
    if code == 1:
        return "refused"
    if command != "validate":
        return "done"
    is_same = forked(lambda: content(path) != sound, log=log) == 0
    return "same" if is_same else "silent"


def look_by_fork() -> None:
    """Fork the processes in which commands look at a file, because spawned ones start slowly."""
    by_fork, answer = multiprocessing.get_context("fork"), cli._answer

    def answer_by_fork(*arguments: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a spawned process
        answer(*arguments)

    cli.multiprocessing = SimpleNamespace(get_context=lambda _: by_fork)
    cli._answer = answer_by_fork
    # Once for all forks:
    from matplotlib.backends import backend_agg  # noqa: F401

    from image_extractor import exporting, gallery, look, merging  # noqa: F401


def run(folder: Path, mutations: int, seed: int) -> Counter:
    """Try mutations of all data sets; return how often each command came to each outcome."""
    look_by_fork()

    rng, counts, sources = np.random.default_rng(seed), Counter(), []
    for name, options in DATA_SETS.items():
        path = folder / f"{name}.h5"
        extract("sst", path, **options)
        sources.append((name, path.read_bytes(), content(path)))
    for number in range(mutations):
        name, whole, sound = sources[number % len(sources)]
        what, changed = damaged(whole, rng)
        path = folder / "changed.h5"
        path.write_bytes(changed)
        for command in ("validate", str(rng.choice(OTHERS))):
            found = outcome(path, command, sound)
            counts[command, found] += 1
            if found in FAULTS:
                last = path.with_suffix(".log").read_text(errors="replace").strip()[-300:]
                print(f"{number} {name}, {what}: {command}: {found}: {last}", flush=True)
    return counts


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(Path(folder), args.mutations, args.seed)
    for (command, found), n in sorted(counts.items()):
        print(f"{command:10}{found:12}{n:6}")
    print(f"{args.mutations} mutations in {time.perf_counter() - started:.0f} s")
    return int(any(found in FAULTS for _, found in counts))


if __name__ == "__main__":
    sys.exit(main())
