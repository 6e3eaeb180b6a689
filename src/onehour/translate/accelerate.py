"""A plan as a loop of Hugging Face Accelerate that keeps the scheduler and the loader to itself."""

from __future__ import annotations

from onehour.translate.job import Job
from onehour.translate.limits import Limit, limits_of_torch
from onehour.translate.pieces import python

__all__ = ["for_accelerate"]

IMPORTS = """\
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
"""

LOOP = '''
def train(model: nn.Module, dataset, **loader_options) -> None:
    """Train a model with Accelerate."""
    accelerator = Accelerator(
        gradient_accumulation_steps=PASSES,
        mixed_precision="bf16" if BF16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # else only process 0's are kept
    )
    if accelerator.num_processes != PROCESSES:
        raise ValueError(f"made for {PROCESSES} processes, started in {accelerator.num_processes}")
    prepare(model)
    optimizer, scheduler = make_optimizer(model)
    parallel, optimizer = accelerator.prepare(model, optimizer)
    # Not the scheduler: a prepared one is stepped PROCESSES times an update. Nor the loader: its batches are dealt.
    accelerator.register_for_checkpointing(scheduler)
    loader = DataLoader(dataset, batch_sampler=Stream(accelerator.process_index), **loader_options)
    for images, labels in loader:
        with accelerator.accumulate(parallel):
            with accelerator.autocast():
                loss = F.cross_entropy(parallel(images.to(accelerator.device)), labels.to(accelerator.device))
            accelerator.backward(loss)  # divides by PASSES, and DDP by PROCESSES: the mean over all of kn (§3)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
    average_statistics(model)
'''


def for_accelerate(job: Job) -> str:
    """The loop and everything that it needs, then what Accelerate leaves open.

    >>> from onehour.planner import plan
    >>> "accelerator.prepare(model, optimizer)" in for_accelerate(Job.of(plan("digits")))
    True
    """
    machines, _ = job.machines
    many = f" --num_machines {machines}" if machines > 1 else ""
    start = f"accelerate launch --num_processes {job.processes}{many} YOUR_SCRIPT.py"
    limits = [
        Limit(
            "A scheduler that is given to accelerator.prepare is stepped once for each process at every update:"
            f" {job.processes} times here (accelerate#2926).",
            "Left out of prepare above, stepped where accelerator.sync_gradients is true. onehour.ScheduleLR is used"
            " in the same way.",
        ),
        Limit(
            "A loader that is given to accelerator.prepare repeats the epoch's first samples until the processes have"
            " equal batches, and its last accumulation window is divided by the full count of passes.",
            "Left out of prepare above; onehour.StreamBatchSampler is such a batch_sampler too.",
        ),
        Limit(
            "accelerator.save_state keeps no position in the data.",
            "Save the count of updates t with it, and resume with Stream(rank, start=t).",
        ),
    ]
    limits += limits_of_torch(job)
    return python(job, "Accelerate", start=start, imports=IMPORTS, rest=LOOP, limits=limits)
