"""A plan as a mixin for a LightningModule and the Trainer that belongs to it."""

from __future__ import annotations

from onehour.translate.job import Job
from onehour.translate.limits import Limit, limits_of_torch
from onehour.translate.pieces import python

__all__ = ["for_lightning"]

IMPORTS = """\
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
"""

MODULE = '''
class LargeMinibatch:
    """Stands before LightningModule: `class Mine(LargeMinibatch, LightningModule)`, with a train_dataset.

    Its __init__ ends with `prepare(self)`; its training_step returns the mean loss of the batch. To Lightning the whole
    run is one epoch, so callbacks count steps (every_n_train_steps), not epochs.
    """

    train_dataset = None
    loader_options = {}

    def configure_optimizers(self):
        optimizer, scheduler = make_optimizer(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def train_dataloader(self):
        sampler = Stream(self.global_rank, start=self.trainer.global_step)
        return DataLoader(self.train_dataset, batch_sampler=sampler, **self.loader_options)

    def on_validation_start(self):
        average_statistics(self)

    def on_train_end(self):
        average_statistics(self)


def make_trainer(**options) -> Trainer:
    """The Trainer; it divides the loss by PASSES, and DDP by PROCESSES: the mean over all of kn (§3, Remark 3)."""
    own = {
        "max_steps": ITERATIONS,
        "accumulate_grad_batches": PASSES,
        "num_nodes": NODES,
        "devices": PROCESSES // NODES,
        # Its own broadcast_buffers would throw away every BatchNorm's statistics but process 0's.
        "strategy": DDPStrategy(broadcast_buffers=False) if PROCESSES > 1 else "auto",
        "use_distributed_sampler": False,  # it would pad, and drop what `Stream` does
        "val_check_interval": round(SAMPLES / MINIBATCH) * PASSES,  # once an epoch of samples, to the nearest update
        "precision": "bf16-mixed" if BF16 else "32-true",
    }
    return Trainer(**(own | options))
'''


def for_lightning(job: Job) -> str:
    """The mixin, the Trainer and everything that they need, then what Lightning leaves open.

    >>> from onehour.planner import plan
    >>> '"interval": "step"' in for_lightning(Job.of(plan("digits")))
    True
    """
    nodes, _ = job.machines
    limits = [
        Limit(
            'A scheduler is stepped once an epoch unless its interval is "step", and `frequency` then counts batches,'
            " not updates.",
            'interval "step" and frequency 1, as above; it is then stepped once an update, also with accumulation.',
        ),
        Limit(
            "The last accumulation window of an epoch is divided by the full count although it is shorter"
            " (pytorch-lightning#19987), and its DistributedSampler repeats samples.",
            "`Stream` has full windows only; onehour.StreamBatchSampler is such a batch_sampler too.",
        ),
        Limit(
            "With use_distributed_sampler=False every process validates on all images: exact, but p times the work.",
            "Divide them as in the remedy for a DistributedSampler below, and sum counts.",
        ),
    ]
    limits += limits_of_torch(job)
    return python(
        job,
        "Lightning",
        start="python YOUR_SCRIPT.py, or with srun",
        imports=IMPORTS,
        rest=MODULE,
        limits=limits,
        constants=f"NODES = {nodes}\n",
    )
