"""A plan as TrainingArguments and a Trainer of Hugging Face Transformers."""

from __future__ import annotations

from onehour.translate.job import Job
from onehour.translate.limits import Limit, limits_of_torch
from onehour.translate.pieces import python

__all__ = ["for_hf"]

IMPORTS = """\
from transformers import Trainer, TrainingArguments
"""

TRAINER = '''
class LargeMinibatchTrainer(Trainer):
    """A Trainer whose batches are `Stream`'s and whose loss is the mean over the minibatch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Else a model whose forward takes **kwargs is trusted to divide by the count of all items; if it returns the
        # mean of its batch in spite of that, gradients are PROCESSES · PASSES times too large.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self):
        return DataLoader(
            self.train_dataset,
            batch_sampler=Stream(self.args.process_index),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def evaluate(self, *args, **options):
        average_statistics(self.model)
        return super().evaluate(*args, **options)


def make_trainer(model: nn.Module, dataset, output_dir: str, trainer_options=None, **options) -> Trainer:
    """A Trainer for a model that returns the mean loss of its batch."""
    own = {
        "max_steps": ITERATIONS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": PASSES,
        "max_grad_norm": 0.0,  # its default clips gradients at 1.0
        "bf16": BF16,
        # Its default would throw away every BatchNorm's statistics but process 0's.
        "ddp_broadcast_buffers": False,
        "logging_nan_inf_filter": False,  # its default hides losses that are not finite
        "seed": SEED,
    }
    arguments = TrainingArguments(output_dir, **(own | options))
    if arguments.world_size * max(arguments.n_gpu, 1) != PROCESSES:
        raise ValueError(f"made for {PROCESSES} processes of one device each; start it so, with torchrun")
    prepare(model)
    return LargeMinibatchTrainer(
        model, arguments, train_dataset=dataset, optimizers=make_optimizer(model), **(trainer_options or {})
    )
'''


def for_hf(job: Job) -> str:
    """The Trainer and everything that it needs, then what Transformers leaves open.

    >>> from onehour.planner import plan
    >>> '"max_grad_norm": 0.0' in for_hf(Job.of(plan("digits")))
    True
    """
    limits = [
        Limit(
            "weight_decay of TrainingArguments goes by names, and leaves out biases too; learning_rate and warmup_steps"
            " know neither the milestones nor where the warmup starts.",
            "The optimizer and scheduler above are given as `optimizers`, and those arguments then do nothing.",
        ),
        Limit(
            "Its sampler repeats the epoch's first samples until the processes have equal batches, and the last"
            " accumulation window of an epoch is a smaller minibatch at the full rate.",
            "`Stream` has full windows only; onehour.StreamBatchSampler is such a batch_sampler too.",
        ),
        Limit(
            'Its epochs, in logs and with eval_strategy="epoch", are then the whole run.',
            f'eval_strategy="steps", eval_steps={max(1, round(job.samples / job.recipe.minibatch))}, and the same'
            " save_steps.",
        ),
    ]
    limits += limits_of_torch(job)
    return python(
        job, "Transformers", start=f"{job.torchrun} YOUR_SCRIPT.py", imports=IMPORTS, rest=TRAINER, limits=limits
    )
