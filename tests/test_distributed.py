"""Training in several processes: real ones, joined by gloo on the CPU."""

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import utils
from utils import DataError

import mock_cubes
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import numbers_of
from torch import nn

import distributed
import run_folder
import run_SSFTT_training as script
import training
from batches import SpaxelBatchSampler
from run_SSFTT_training import train_config

USUAL = {"split_dir": "hard", "cutout": 5, "batch_size": 96, "dropout": 0.0, "device": "cpu"}
USUAL |= {"baselines": False, "packed_type": "float32", "patience": 0, "schedule": "constant"}


def work_in(rank, n, port, function, args, answers):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        answers.put((rank, function(*args)))
    except (Exception, SystemExit) as error:
        answers.put((rank, error if isinstance(error, DataError) else traceback.format_exc()))
        sys.exit(1)


def in_processes(n, function, *args):
    """What a function returns (or the DataError it raises) in each of n processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    processes = [
        fork.Process(target=work_in, args=(rank, n, port, function, args, answers))
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    found, deadline = {}, time.monotonic() + 90
    while any(process.is_alive() for process in processes) or not answers.empty():
        assert time.monotonic() < deadline, "a process hangs"
        with contextlib.suppress(queue.Empty):
            found |= [answers.get(timeout=0.2)]
    return [found.get(rank) for rank in range(n)]


def together(function):
    with distributed.together(torch.device("cpu")):
        return function()


def test_a_single_process_passes_through_unchanged():
    model = nn.Linear(2, 1)
    model(torch.ones(3, 2)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()

    def all_of_them():
        distributed.sum_gradients(model.parameters(), 3)
        distributed.seed_step(1, 2)
        distributed.wait_for_all()
        with distributed.first_one_ahead():
            return distributed.from_first(lambda: 5), distributed.gathered(6), distributed.share()

    assert together(all_of_them) == (5, [6], (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert distributed.any_of(True)
    assert not distributed.any_of(False)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_every_sample_is_drawn_once_per_epoch_whatever_the_number_of_processes(n, batch_size):
    def epoch(share):
        sampler = SpaxelBatchSampler(np.zeros(50, int), batch_size, seed=3, augment=True)
        sampler.share = share
        return list(sampler)

    whole, parts = epoch((0, 1)), [epoch((k, n)) for k in range(n)]
    for i, batch in enumerate(whole):
        dealt = np.concatenate([part[i] for part in parts])
        np.testing.assert_array_equal(np.sort(dealt, axis=0), np.sort(batch, axis=0))
    if batch_size == 64:
        assert sorted(row for part in parts for row, _ in part[0]) == list(range(50))


def collectives():
    rank, _ = distributed.share()
    calls = []
    with distributed.first_one_ahead():
        at = time.monotonic()
        if rank == 0:
            time.sleep(0.3)
    return (
        at,
        distributed.from_first(lambda: calls.append(rank) or "chosen"),
        calls,
        distributed.gathered(rank),
        distributed.total(torch.tensor([1.0, rank])).tolist(),
        distributed.any_of(rank == 1),
        distributed.any_of(False),
        distributed.is_first(),
    )


def test_processes_agree():
    one, other = in_processes(2, together, collectives)
    assert one[1:] == ("chosen", [0], [0, 1], [2.0, 1.0], True, False, True)
    assert other[1:] == ("chosen", [], [0, 1], [2.0, 1.0], True, False, False)
    assert other[0] - one[0] > 0.25


def first_gradients(options, run_dir, share):
    """Gradients and sums of the first batch."""
    ready = script.set_up(train_config(**options), run_dir)
    batch = next(iter(ready.loaders["train"]))
    assert ready.sampler.share == share
    ready.model.train()
    loss, booked = training.batch_loss(ready, batch)
    loss.backward()
    distributed.sum_gradients(ready.model.parameters(), len(batch.rows))
    gradients = {name: p.grad.numpy() for name, p in ready.model.named_parameters()}
    gradients |= {name: b.numpy().copy() for name, b in ready.model.named_buffers()}
    scores = training.validate(ready)
    return len(batch.rows), gradients, distributed.total(booked).numpy(), scores


def in_its_share(options, run_dir):
    return together(lambda: first_gradients(options, run_dir, distributed.share()))


@pytest.mark.parametrize(("task", "n"), [("logOH", 2), ("BPT", 3)])
def test_gradients_and_scores_are_those_of_one_process(root, tmp_path, task, n):
    options = {**USUAL, "data_dir": root, "label_task": task}
    size, expected, sums, scores = first_gradients(options, tmp_path / "one", (0, 1))
    parts = in_processes(n, in_its_share, options, tmp_path / "several")
    assert not [part for part in parts if isinstance(part, str | Exception)], parts
    assert sum(part[0] for part in parts) == size
    assert len({part[0] for part in parts}) == 2, "the test needs uneven shares"
    for _, gradients, found, validated in parts:
        np.testing.assert_allclose(found, sums, rtol=1e-6)
        assert validated == scores  # galaxy by galaxy, the same bits
        for name, whole in expected.items():
            largest = np.abs(whole).max()
            assert np.abs(gradients[name] - whole).max() <= 1e-6 * max(largest, 1e-3), name


def train_here(options):
    return script.main(train_config(**options))


def assert_close(one, other):
    pd.testing.assert_frame_equal(numbers_of(one), numbers_of(other), rtol=1e-5, atol=1e-5)
    weights = [run_folder.read_checkpoint(run)["model"] for run in (one, other)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_runs_and_resumed_runs_are_those_of_one_process_within_rounding(root, tmp_path):
    options = {**USUAL, "data_dir": root, "epochs": 4}
    runs = {name: tmp_path / name for name in ("one", "two", "mixed")}
    assert train_here({**options, "run_dir": runs["one"]}) == 0
    assert in_processes(2, train_here, {**options, "run_dir": runs["two"]}) == [0, 0]
    mixed = {**options, "run_dir": runs["mixed"], "resume": "auto"}
    assert in_processes(2, train_here, {**mixed, "epochs": 1}) == [0, 0]
    assert train_here({**mixed, "epochs": 2}) == 0
    assert in_processes(3, train_here, mixed) == [0, 0, 0]
    for name in ("two", "mixed"):
        assert_close(runs["one"], runs[name])
        files = [sorted(p.name for p in runs[k].rglob("*")) for k in ("one", name)]
        assert files[0] == files[1]
    log = (runs["two"] / "log.txt").read_text()
    assert log.count("epoch 4/4") == 1


def stopped_at(options, rank, step):
    """Train; a signal reaches one process only."""
    if int(os.environ["RANK"]) == rank:
        real, seen = distributed.seed_step, []

        def seed_step(*numbers):
            seen.append(1)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGUSR1)
            real(*numbers)

        distributed.seed_step = seed_step
    return train_here(options)


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_they_resume_bit_for_bit(root, tmp_path):
    options = {**USUAL, "data_dir": root, "epochs": 2, "dropout": 0.2, "resume": "auto"}
    whole, parted = ({**options, "run_dir": tmp_path / name} for name in ("whole", "parted"))
    assert in_processes(2, train_here, whole) == [0, 0]
    assert in_processes(2, stopped_at, parted, 1, 3) == [utils.EXIT_AGAIN] * 2
    assert run_folder.read_checkpoint(parted["run_dir"])["progress"]["step"] == 3
    assert in_processes(2, train_here, parted) == [0, 0]
    weights = [run_folder.read_checkpoint(run["run_dir"])["model"] for run in (whole, parted)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    pd.testing.assert_frame_equal(*(numbers_of(run["run_dir"]) for run in (whole, parted)))


def fails(options, rank, act):
    if int(os.environ["RANK"]) == rank:
        real = training.batch_loss

        def batch_loss(*args):
            act()
            return real(*args)

        training.batch_loss = batch_loss
    return train_here(options)


def breaks():
    raise DataError("a broken disk.")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("act", [breaks, is_killed])
def test_process_that_fails_ends_the_others_with_a_message(root, tmp_path, rank, act):
    options = {**USUAL, "data_dir": root, "run_dir": tmp_path / "run"}
    found = in_processes(2, fails, options, rank, act)
    message = f"process {rank + 1} of 2: a broken disk."
    assert str(found[rank]) == (message if act is breaks else "None")
    assert f"process {2 - rank} of 2: another process of this training has" in str(found[1 - rank])
    assert "--resume auto" in str(found[1 - rank])


@pytest.mark.parametrize(
    ("error", "rank", "logged"),
    [
        (DataError("a broken disk."), 1, ["process 2 of 2: a broken disk."]),
        (DataError("a broken disk."), 0, []),  # its command says it
        (distributed.OthersEnded("another process has ended."), 1, []),
    ],
)
def test_what_a_process_other_than_the_first_has_met_is_logged(
    monkeypatch, caplog, error, rank, logged
):
    def fail():
        raise error

    for name, value in (("WORLD_SIZE", "2"), ("RANK", str(rank))):
        monkeypatch.setenv(name, value)
    for name in ("init_process_group", "get_backend"):
        monkeypatch.setattr(distributed.dist, name, lambda *args, **options: None)
    monkeypatch.setattr(distributed, "share", lambda: (rank, 2))
    with (
        caplog.at_level("ERROR"),
        pytest.raises(DataError, match=f"process {rank + 1} of 2: "),
    ):
        together(fail)
    assert caplog.messages == logged


def gets_no_number(options):
    real = training.batch_loss

    def batch_loss(ready, batch):
        loss, booked = real(ready, batch)
        return loss * (float("nan") if distributed.share()[0] == 1 else 1), booked

    training.batch_loss = batch_loss
    return train_here(options)


def test_loss_that_is_not_finite_in_one_process_ends_all_with_the_whole_batch(root, tmp_path):
    options = {**USUAL, "data_dir": root, "run_dir": tmp_path / "run"}
    found = in_processes(2, gets_no_number, options)
    assert ["the loss is nan in epoch 1" in str(error) for error in found] == [True, True]
    rows = utils.json.loads((tmp_path / "run/nan_batch.json").read_text())["rows"]
    assert (
        len(rows) == script.set_up(train_config(**options), tmp_path / "other").sampler.batch_size
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "ssftt"}, "--network ssftt in 2 processes: its batch statistics"),
        ({"batch_size": 1, "cutout": 5}, "expected at least one for each of 2 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(root, tmp_path, options, message):
    options = {**USUAL, "data_dir": root, "run_dir": tmp_path / "run", **options}
    one, other = in_processes(2, train_here, options)
    assert message in str(one)
    assert "another process of this training has" in str(other)
    assert not (tmp_path / "run").exists()


def torchrun(*words):
    """Start the training script in two processes."""
    launch = (sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split())
    words = [*launch, script.__file__, "--device", "cpu", *words]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_torchrun_says_once_what_is_wrong(root, tmp_path):
    for words, message in (
        (["--epochs", "0"], "error: --epochs 0: expected 1 or more."),
        (["--data-dir", root, "--split-dir", "none"], "splits/none/train.csv: no such file"),
    ):
        done = torchrun("--run-dir", tmp_path / "run", *words)
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, done.stderr
        assert message in said[0]


@pytest.mark.slow
def test_torchrun_trains_and_packs_once(tmp_path):
    root = mock_cubes.make_data_dir(tmp_path / "data")
    words = "--split-dir hard --epochs 1 --cutout 7 --no-baselines".split()
    done = torchrun("--data-dir", root, "--run-dir", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 1/1") == 1
    assert len(list((root / "processed/packed/hard").iterdir())) == 1
    assert Path(tmp_path / "run/best.safetensors").is_file()
