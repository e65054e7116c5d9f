"""A short campaign of damage (tests/faults.py; the long one is `make test-faults`)."""

import json

import faults
import pytest


@pytest.mark.slow
def test_damaged_and_forged_files_are_refused_or_harmless():
    counts, failures = faults.campaign(n_per_target=8, seed=0, n_forged=10)
    assert counts["mutations"] > 300
    assert counts["refused"] > 200
    assert failures == []


@pytest.mark.slow
def test_stages_that_are_killed_give_the_same_when_they_are_run_again():
    counts, failures = faults.kill_stages(1, seed=0)
    assert counts["kills"] == 6
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

    out = tmp_path / "summary.json"

    def append(data):
        with (data / "log").open("a") as f:
            f.write("x")
        faults.time.sleep(0.3)

    stages = {"append": (append, lambda data: (data / "log").read_text())}
    monkeypatch.setattr(faults, "stages", lambda: stages)
    monkeypatch.setattr(faults, "write_files", write_files)
    monkeypatch.setattr(faults, "FOREIGN", {"other": b"other"})
    monkeypatch.setattr(faults, "damaged", lambda *_: ("bit", b"round"))
    words = ["--mutations", "25", "--kills", "18", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["faults.py", *words])
    assert faults.main() == 1
    found = json.loads(out.read_text())
    assert [found[k] for k in faults.OUTCOMES] == [0, 0, 1, 1, 1, 1, 1]
    assert found["mutations"] == 5
    assert (found["kills"], found["kills_different"] > 0) == (3, True)
    assert "tracebacks: x: traceback: KeyError" in capsys.readouterr().out
