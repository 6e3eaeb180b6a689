"""A Python file for each tool on torch's loop, which imports onehour's rules; behind it, what the tool leaves open."""

from __future__ import annotations

from string import Template

from onehour.translate.job import Job, comment, numbered, rules_in, schedule_code

__all__ = ["TEMPLATES", "python"]

SHARED = '''\
PROCESSES, PASSES, BATCH = $processes, $passes, $batch
MINIBATCH = Minibatch(per_worker=BATCH, workers=PROCESSES * PASSES)  # $minibatch images an update
SAMPLES, SEED = $samples, $seed
ITERATIONS = MINIBATCH.iterations(SAMPLES, $epochs)  # $iterations, for $epochs epochs
SCHEDULE = $schedule
BF16 = $bf16


def prepare(model: nn.Module) -> None:
    """Once, in place, for a model that is to be trained from the start; load a checkpoint after it."""
$prepare


def make_optimizer(model: nn.Module):
    """The optimizer, and the scheduler to step once after each update (not once a pass, nor once an epoch)."""
    groups = parameter_groups(model, weight_decay=$weight_decay)  # normalisation does not decay (§5.1)
    optimizer = torch.optim.$optimizer
    return optimizer, ScheduleLR(optimizer, SCHEDULE, samples=SAMPLES, minibatch=MINIBATCH)


class Stream(Sampler):
    """A process's batches of the whole run, one a pass; a run resumes from any update. Nothing is padded or dropped.

    The samples of each update are those of `onehour train` (§3, Remark 4).
    """

    def __init__(self, rank: int, start: int = 0):
        self.workers, self.start = range(rank * PASSES, (rank + 1) * PASSES), start
        self.stream = SampleStream(samples=SAMPLES, minibatch=MINIBATCH, seed=SEED)

    def __iter__(self):
        for update in range(self.start, ITERATIONS):
            for worker in self.workers:
                yield self.stream.indices(update, worker).tolist()

    def __len__(self):  # of the whole run wherever it starts: resumed trainers count so
        return ITERATIONS * PASSES


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """The mean over processes of BatchNorm's running statistics; on all processes, before evaluating or saving."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and PROCESSES > 1:
            for statistics in (module.running_mean, module.running_var):
                dist.all_reduce(statistics)
                statistics /= PROCESSES
'''

TORCH = '''
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

ACCELERATE = '''
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
    # Not the scheduler: a prepared one is stepped PROCESSES times an update (accelerate#2926). Nor the loader: its
    # batches are dealt, and a prepared one repeats samples until all processes have equally many.
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

LIGHTNING = '''
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
        "num_nodes": $nodes,
        "devices": PROCESSES // $nodes,
        # Its own broadcast_buffers would throw away every BatchNorm's statistics but process 0's.
        "strategy": DDPStrategy(broadcast_buffers=False) if PROCESSES > 1 else "auto",
        "use_distributed_sampler": False,  # it would pad, and drop what `Stream` does
        "val_check_interval": round(SAMPLES / MINIBATCH.size) * PASSES,  # once an epoch, to the nearest update
        "precision": "bf16-mixed" if BF16 else "32-true",
    }
    return Trainer(**(own | options))
'''

HF = '''
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

IMPORTS = """\
import torch
import torch.distributed as dist
from onehour import $rules
from onehour.rules.initialize import last_batchnorms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Sampler
"""
F = "import torch.nn.functional as F\n"
TEMPLATES = {
    "torch": (f"{F}from contextlib import nullcontext\nfrom torch.nn.parallel import DistributedDataParallel", TORCH),
    "lightning": (
        "from lightning.pytorch import Trainer\nfrom lightning.pytorch.strategies import DDPStrategy",
        LIGHTNING,
    ),
    "accelerate": (f"{F}from accelerate import Accelerator, DistributedDataParallelKwargs", ACCELERATE),
    "hf": ("from transformers import Trainer, TrainingArguments", HF),
}
"""A tool's imports, and its own functions."""

NAMES = {"lightning": "Lightning", "accelerate": "Accelerate", "hf": "Transformers"}
LIMITS = {
    "torch": "",
    "lightning": """
With use_distributed_sampler=False every process validates on all images: exact, but p times the work.
→ Divide them as in the remedy for a DistributedSampler below, and sum counts.
""",
    "accelerate": """
accelerator.save_state keeps no position in the data.
→ Save the count of updates t with it, and resume with Stream(rank, start=t).
""",
    "hf": """
Its epochs, in logs and with eval_strategy="epoch", are then the whole run.
→ eval_strategy="steps", eval_steps=$once, and the same save_steps.
""",
}
SEVERAL_PASSES = """
BatchNorm's running statistics move $passes times an update, and passes of $batch images are small.
→ onehour.convert_batchnorm(model, per_worker=$batch), then BATCH = $together and PASSES = 1: every $batch are still
normalised by themselves, so the loss is the same, and the statistics move once (§2.3).
"""
SEVERAL_PROCESSES = """
A DistributedSampler repeats validation images until they divide evenly, and a mean of the processes' means weighs them
wrongly.
→ Evaluate range(rank, len(validation), PROCESSES) on each process, sum the counts of errors over processes and divide
once by len(validation), as `onehour train` does.
"""
ALWAYS = """
The model keeps the initial weights that it comes with$but.
→ onehour.init_weights_(model$zero) before prepare(model): He fan-out, the classifier N(0, 0.01²) (§5.1).

Crops, flips and dropout change with the number of processes, and where a run is resumed.
→ Key each image's generator by onehour.seed_for(seed, 'augment', epoch, index), as `onehour train` does.

A gradient that is not finite, on any process, spoils all weights.
→ `onehour train` leaves that update out everywhere, and stops.
"""
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
OPTIMIZERS |= {"nadam": "NAdam", "radam": "RAdam"}
ZERO_GAMMA = """\
    for batchnorm in last_batchnorms(model).values():  # γ = 0: each residual block starts as the identity (§5.1)
        nn.init.zeros_(batchnorm.weight)
"""


def python(job: Job, tool: str) -> str:
    """The whole file for a tool: what it is, imports, constants, functions, and what the tool leaves open."""
    recipe, schedule, name = job.recipe, schedule_code(job), NAMES.get(tool, tool)
    machines = f" --num_machines {job.machines[0]}" if job.machines[0] > 1 else ""
    starts = {
        "lightning": "python YOUR_SCRIPT.py, or with srun",
        "accelerate": f"accelerate launch --num_processes {job.processes}{machines} YOUR_SCRIPT.py",
    }
    rules = {"Minibatch", "SampleStream", "ScheduleLR", "parameter_groups", *rules_in(schedule)}
    optimizer = f"{OPTIMIZERS[recipe.optimizer]}(groups, lr=SCHEDULE(0.0)"
    if recipe.optimizer == "sgd":
        optimizer += f", momentum={recipe.momentum!r}" + ", nesterov=True" * recipe.nesterov
    prepare = [
        *ZERO_GAMMA.splitlines() * recipe.zero_gamma,
        *["    model.to(memory_format=torch.channels_last)"] * recipe.channels_last,
        *["    model.compile()"] * recipe.compile,
    ]
    about = (
        f"{recipe.name} at minibatch {recipe.minibatch} for {name}: {job}. Made by `onehour plan --as`; its rate is"
        " onehour's at every update, and so are its samples. Model, images and their augmentation stay yours."
    )
    imports, functions = TEMPLATES[tool]
    lines = sorted(f"{IMPORTS}{imports}".splitlines(), key=lambda line: (line.split()[0] != "import", line))
    head = "\n".join([comment(about), f"# Start: {starts.get(tool, f'{job.torchrun} YOUR_SCRIPT.py')}", *lines])
    limits = LIMITS[tool] + SEVERAL_PASSES * (job.passes > 1) + SEVERAL_PROCESSES * (job.processes > 1) + ALWAYS
    values = recipe.as_dict() | {
        "rules": ", ".join(sorted(rules)),
        "processes": job.processes,
        "passes": job.passes,
        "batch": recipe.per_worker,
        "together": recipe.per_worker * job.passes,
        "samples": job.samples,
        "iterations": job.iterations,
        "once": max(1, round(job.samples / recipe.minibatch)),
        "schedule": schedule,
        "bf16": recipe.precision == "bf16",
        "prepare": "\n".join(prepare),
        "optimizer": f"{optimizer})",
        "nodes": job.machines[0],
        "zero": "" if recipe.zero_gamma else ", zero_gamma=False",
        "but": ", but for γ" if recipe.zero_gamma else "",
    }
    code, open_ = (Template(text).substitute(values) for text in (f"{head}\n\n{SHARED}\n{functions}", limits))
    return f"{code}\n\n{numbered(name, open_)}"
