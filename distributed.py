"""Several processes that train one network together; a single one passes through unchanged.

All draw the same batches, each takes its share (`share`), and their gradients are added up
(`sum_gradients`), so that all hold the same weights, as if one process had seen the whole batch.
The first process computes what is needed once, and it alone writes.

torchrun starts the processes, or slurm/train.sbatch: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT are in the environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

from utils import DataError

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(hours=2)
"""For the first process, which may have to pack cubes. The end of a process is noticed at once."""

Result = TypeVar("Result")


def share() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Say whether this is the process that writes: the first, or the only one."""
    return share()[0] == 0


class OthersEnded(DataError):
    """A process cannot go on, because another one has ended."""


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Work with the other processes that were started with this one, if there are any.

    Raises
    ------
    DataError
        If this process fails, or another one has ended.
    """
    n = int(os.environ.get("WORLD_SIZE", 1))
    if n == 1 or "RANK" not in os.environ:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with _noticing_the_others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=LONGEST_WAIT)
    if not is_first():
        logging.disable(logging.WARNING)
    try:
        log.info("%d processes, %s", n, dist.get_backend())
        yield
        dist.destroy_process_group()  # after an error, it could wait for the others
    except DataError as error:
        message = f"process {share()[0] + 1} of {n}: {error}"
        if not is_first() and not isinstance(error, OthersEnded):
            log.error(message)  # utils.run_command prints what the first process says
        raise DataError(message) from error
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _noticing_the_others() -> Iterator[None]:
    """Turn what torch raises once another process has ended into a DataError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("cc:")[2][:120]  # without gloo's file
        raise OthersEnded(
            f"another process of this training has ended or cannot be reached ({reason}), expected "
            "all to go on. See what it said, then continue with --resume auto."
        ) from error


def _sum(values: Tensor) -> None:
    """Add up a tensor over the processes, in place."""
    with _noticing_the_others():
        dist.all_reduce(values)


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        _sum(torch.zeros(1))  # on the CPU: no GPU has to wait


@contextlib.contextmanager
def first_one_ahead() -> Iterator[None]:
    """Let the first process do something before the others, which then find what it has made."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def from_first(work: Callable[[], Result]) -> Result:
    """Call a function in the first process; return its result, plain or on the CPU, in all."""
    if not dist.is_initialized():
        return work()
    result = [work() if is_first() else None]
    with _noticing_the_others():
        dist.broadcast_object_list(result, 0, device=torch.device("cpu"))
    return cast(Result, result[0])


def gathered(part: Any) -> list[Any]:
    """Return what each process has (CPU tensors, plain values), in the order of the processes."""
    parts = [part]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        with _noticing_the_others():
            dist.all_gather_object(parts, part)
    return parts


def total(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    if dist.is_initialized():
        _sum(values := values.clone())
    return values


def moments(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean (C,) and covariance (C, C) of the rows (N, C) of all processes; None of a single row.

    Each of several processes has at least one.
    """
    if not dist.is_initialized():
        return (rows.mean(0), rows.T.cov()) if len(rows) > 1 else None
    n = total(rows.new_tensor(len(rows)))
    mean = total(rows.sum(0)) / n
    return mean, total((rows - mean).T @ (rows - mean)) / (n - 1)


def any_of(claim: bool) -> bool:
    """Say whether a claim is true in any process."""
    return bool(total(torch.tensor(float(claim)))) if dist.is_initialized() else claim


def sum_gradients(parameters: Iterable[Tensor], n_samples: int) -> None:
    """Replace the gradients of this process's share of a batch by those of the whole batch.

    Parameters
    ----------
    parameters : iterable of Tensor
        With the gradients of the mean loss over the share.
    n_samples : int
        Number of samples in the share.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients] + [gradients[0].new_ones(1)]) * n_samples
    _sum(flat)
    sizes = [g.numel() for g in gradients]
    for gradient, whole in zip(gradients, (flat[:-1] / flat[-1]).split(sizes), strict=True):
        gradient.copy_(whole.view_as(gradient))


def seed_step(*numbers: int) -> None:
    """Seed dropout for one step, differently in each process; a single one's draws just go on."""
    if dist.is_initialized():
        torch.manual_seed(hash((*numbers, dist.get_rank())) % 2**63)
