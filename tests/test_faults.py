"""A short campaign of damage and interruptions; the long one is `make test-faults`."""

import json
import time
from collections import Counter

import faults
import interruptions
import pytest


@pytest.mark.slow
def test_damaged_and_forged_files_are_refused_or_harmless():
    counts, failures = faults.campaign(n=130, seed=0, n_forged=3)
    assert counts["mutations"] > 250
    assert counts["refused"] > 150
    assert failures == []


@pytest.mark.slow
def test_interrupted_stages_give_the_same_files_when_they_are_run_again():
    """The quick ones; a kill and one other interruption of each."""
    counts, failures = Counter(), []
    for i, name in enumerate(("download", "cube", "split", "patches", "evaluation", "maps")):
        other = list(interruptions.WAYS)[1 + i % 4]
        found, lines = interruptions.interrupt_stages({"kill": 1, other: 1}, i, only=name)
        counts, failures = counts + found, failures + lines
    assert (counts["kills"], counts["interruptions"]) == (9, 9)
    assert failures == []


def test_a_campaign_that_finds_something_fails(monkeypatch, tmp_path, capsys):
    """Readers that fail in each of the ways that are counted."""
    size = faults.MEMORY_LIMIT

    def read(folder):
        first = (folder / "x").read_bytes()[:1]
        if first == b"t":
            raise KeyError("x")
        if first == b"m":
            bytearray(size)
        if first == b"h":
            faults.signal.raise_signal(faults.signal.SIGALRM)
        return first

    def write_files(root):
        (root / "x").write_bytes(b"sound")
        kinds = ("traceback", "memory", "hang")
        changes = [(k, lambda path, k=k: path.write_bytes(k.encode())) for k in kinds]
        return [faults.Target("x", read, changes)]

    def append(data):
        with (data / "log").open("a") as f:
            f.write("x")
        time.sleep(0.3)

    out = tmp_path / "summary.json"
    monkeypatch.setattr(interruptions, "stages", lambda _: {"append": append})
    monkeypatch.setattr(interruptions, "make_data", lambda data: data.mkdir())
    monkeypatch.setattr(faults, "write_files", write_files)
    monkeypatch.setattr(faults, "FOREIGN", {"other": b"other"})
    monkeypatch.setattr(faults, "damaged", lambda *_: ("bit", b"round"))
    monkeypatch.setattr(
        "sys.argv", ["faults.py", "--mutations", "1", "--kills", "3", "--out", str(out)]
    )
    assert faults.main() == 1
    found = json.loads(out.read_text())
    wrong = ("tracebacks", "silent", "hangs", "over_memory")
    assert [found[k] for k in ("refused", "same", "other request", "mutations")] == [0, 0, 1, 5]
    assert [found[k] for k in wrong] == [1, 2, 1, 1]  # two writers, both done: silent, too
    assert (found["kills"], found["interruptions"]) == (3, 4)
    assert found["kills_different"] > 0
    assert found["interruptions_different"] > 0
    assert "tracebacks: x: traceback: KeyError" in capsys.readouterr().out
