"""A plan as a loop of plain torch with DistributedDataParallel: paste it, or import `train` from it."""

from __future__ import annotations

from onehour.translate.job import Job
from onehour.translate.limits import limits_of_torch
from onehour.translate.pieces import python

__all__ = ["for_torch"]

IMPORTS = """\
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
"""

LOOP = '''
def train(model: nn.Module, dataset, device="cpu", **loader_options) -> None:
    """Train a model that is on `device`; with several processes, after torch.distributed.init_process_group."""
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if processes != PROCESSES:
        raise ValueError(f"made for {PROCESSES} processes, started in {processes}")
    prepare(model)
    optimizer, scheduler = make_optimizer(model)
    # Its own broadcast_buffers would throw away every BatchNorm's statistics but process 0's.
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if PROCESSES > 1 else model
    loader = DataLoader(dataset, batch_sampler=Stream(rank), **loader_options)
    for number, (images, labels) in enumerate(loader, start=1):
        last = number % PASSES == 0
        with nullcontext() if last or PROCESSES == 1 else parallel.no_sync():
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=BF16):
                loss = F.cross_entropy(parallel(images.to(device)), labels.to(device))
            (loss / PASSES).backward()  # and DDP divides by PROCESSES: the mean over all of kn (§3, Remark 3)
        if last:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    average_statistics(model)
'''


def for_torch(job: Job) -> str:
    """The loop and everything that it needs, then what DistributedDataParallel leaves open.

    >>> from onehour.planner import plan
    >>> compile(for_torch(Job.of(plan("digits"))), "large.py", "exec").co_filename
    'large.py'
    """
    return python(
        job,
        "torch",
        start=f"{job.torchrun} YOUR_SCRIPT.py",
        imports=IMPORTS,
        rest=LOOP,
        limits=limits_of_torch(job),
        standard="from contextlib import nullcontext",
    )
