"""A plan in the words of the user's own tool: a file that imports onehour's rules, and what the tool leaves open."""

from __future__ import annotations

import re
import shlex
from string import Template
from typing import Any

from onehour.config import Recipe
from onehour.messages import nearest, shown
from onehour.planner import Plan

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
OPTIMIZERS |= {"nadam": "NAdam", "radam": "RAdam"}
# Where timm's have other defaults than torch's.
TIMM_OPTIMIZERS = {"rmsprop": "rmsprop --momentum 0 --opt-kwargs alpha=0.99", "adagrad": "adagrad --opt-eps 1e-10"}
TIMM_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

LEFT = ("task", "collate", "label_smoothing", "mixup", "cutmix", "random_erasing", "clip_norm", "ema", "freeze")
LEFT += ("layer_rates", "ramp")
"""What a recipe can ask for and the generated file does not do."""

ABOUT = """\
# $name at minibatch $minibatch: $processes × $passes × $per_worker (processes, passes, images), $iterations updates.
# Made by `onehour plan --as`; its rate is onehour's at every update. Model, images and augmentation stay yours."""
SHARED = '''\
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Sampler

from onehour import Minibatch, SampleStream, ScheduleLR, $schedules, init_weights_, parameter_groups

PROCESSES, PASSES, BATCH = $processes, $passes, $per_worker
MINIBATCH = Minibatch(per_worker=BATCH, workers=PROCESSES * PASSES)  # $minibatch images an update
SAMPLES, SEED, BF16 = $samples, $seed, $bf16
UPDATES = MINIBATCH.iterations(SAMPLES, $epochs)  # of $epochs epochs
SCHEDULE = $schedule


def prepare(model: nn.Module) -> None:
    """Call it once, for a model that is trained from scratch, before you load a checkpoint."""
    init_weights_(model$zero)  # §5.1; leave it out for a model with weights of its own
$speed

def make_optimizer(model: nn.Module):
    """The optimizer, and the scheduler to step once after each update (not once a pass, nor once an epoch)."""
    groups = parameter_groups(model, weight_decay=$weight_decay)  # normalisation does not decay (§5.1)
    optimizer = torch.optim.$optim
    return optimizer, ScheduleLR(optimizer, SCHEDULE, samples=SAMPLES, minibatch=MINIBATCH)


class Stream(Sampler):
    """A process's batches of the whole run, one a pass: the samples of `onehour train` (§3, Remark 4)."""

    def __init__(self, rank: int, start: int = 0):
        self.workers, self.updates = range(rank * PASSES, (rank + 1) * PASSES), range(start, UPDATES)
        self.stream = SampleStream(samples=SAMPLES, minibatch=MINIBATCH, seed=SEED)

    def __iter__(self):
        return (self.stream.indices(update, worker).tolist() for update in self.updates for worker in self.workers)

    def __len__(self):  # of the whole run wherever it starts: resumed trainers count so
        return UPDATES * PASSES


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """BatchNorm's running statistics, averaged over processes (DDP keeps process 0's), to evaluate or to save."""
    for name, statistics in model.named_buffers():
        if PROCESSES > 1 and name.endswith(("running_mean", "running_var")):
            dist.all_reduce(statistics)
            statistics /= PROCESSES
'''

OPEN = """
# What is left to you, and how to do it:
# 1. With several passes BatchNorm's running statistics move in each, and passes of $per_worker images are small
#    → onehour.convert_batchnorm(model, per_worker=$per_worker), BATCH = $together and PASSES = 1: each group of
#      $per_worker is still normalised by itself, so the loss is the same, and the statistics move once (§2.3).
# 2. A DistributedSampler repeats validation images, and a mean of the processes' means weighs them wrongly
#    → Evaluate range(rank, N, PROCESSES) on each process, and divide the sum of all errors by N, their number.
# 3. Crops, flips and dropout change with the number of processes, and when a run resumes
#    → Key each image's generator by onehour.seed_for(seed, 'augment', epoch, index), as `onehour train` does.
# 4. A gradient that is not finite, on any process, spoils all weights
#    → `onehour train` leaves that update out everywhere, and stops."""

TEMPLATES = {
    "torch": '''\
$about
# Start: $torchrun YOUR_SCRIPT.py
from contextlib import nullcontext

import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

$shared

def train(model: nn.Module, dataset, device="cpu", **loader_options) -> None:
    """Train a model that is on `device`; with several processes, after torch.distributed.init_process_group."""
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if processes != PROCESSES:
        raise ValueError(f"made for {PROCESSES} processes, started in {processes}")
    prepare(model)
    optimizer, scheduler = make_optimizer(model)
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
$open''',
    "timm": """\
#!/bin/sh
$about
# Fill in DATA, and MODEL if it is there. Put this after create_scheduler_v2 in train.py, whose own schedules drop an
# update early, start cosines at the peak and have no constant warmup:
#     from onehour import $schedules
#     schedule = $schedule
#     lr_scheduler._get_lr = lambda t: [schedule(t * $minibatch / $samples)] * len(optimizer.param_groups)
$torchrun train.py \\
    --batch-size $per_worker --grad-accum-steps $passes --epochs $epochs --cooldown-epochs 0 --seed $seed \\
    --sched cosine --sched-on-updates --warmup-epochs 0 --smoothing 0 --color-jitter 0 --dist-bn reduce --no-ddp-bb \\
    $timm_flags

# What is left to you, and how to do it:
# 1. With several passes BatchNorm's running statistics move in each, and passes of $per_worker images are small
#    → After create_model, onehour.convert_batchnorm(model, per_worker=$per_worker), with --batch-size $together
#      --grad-accum-steps 1: each group of $per_worker is still normalised by itself, so the loss is the same.
# 2. An epoch repeats images until the processes have equal shares, and drops those that do not fill a batch
#    → DataLoader(dataset, batch_sampler=onehour.StreamBatchSampler($samples, onehour.Minibatch($per_worker, $workers),
#      seed=$seed, epochs=$epochs)), which takes the process from torch.distributed, and gives the recipe's own samples.
# 3. No bias is decayed, the classifier's included; the recipe leaves out normalisation's parameters only
#    → onehour.parameter_groups(model, weight_decay=$weight_decay) in place of the model in create_optimizer_v2.
# 4. The classifier does not start from N(0, 0.01²) (§5.1)
#    → onehour.init_weights_(model$zero) after create_model.
# 5. Validation repeats images until the processes have equal shares, and averages the processes' means
#    → `onehour evaluate` on the checkpoint counts every image once.
# 6. It resumes at epochs only, with other crops
#    → `onehour train resnet50 --model timm:NAME` resumes at any update, with the same ones.""",
    "lightning": '''\
$about
# Start: python YOUR_SCRIPT.py, or with srun
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

$shared

class LargeMinibatch:
    """Stands before LightningModule: `class Mine(LargeMinibatch, LightningModule)`, with a train_dataset.

    Its __init__ ends with `prepare(self)`; its training_step returns the mean loss of the batch. To Lightning the whole
    run is one epoch, so callbacks count steps (every_n_train_steps), not epochs.
    """

    train_dataset, loader_options = None, {}

    def configure_optimizers(self):
        optimizer, scheduler = make_optimizer(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def train_dataloader(self):
        sampler = Stream(self.global_rank, start=self.trainer.global_step)
        return DataLoader(self.train_dataset, batch_sampler=sampler, **self.loader_options)

    def on_validation_start(self):
        average_statistics(self)

    on_train_end = on_validation_start


def make_trainer(**options) -> Trainer:
    """The Trainer; it divides the loss by PASSES, and DDP by PROCESSES: the mean over all of kn (§3, Remark 3)."""
    own = {
        "max_steps": UPDATES,
        "accumulate_grad_batches": PASSES,
        "num_nodes": $nodes,
        "devices": PROCESSES // $nodes,
        "strategy": DDPStrategy(broadcast_buffers=False) if PROCESSES > 1 else "auto",
        "use_distributed_sampler": False,  # it would pad, and drop what `Stream` does
        "val_check_interval": $once * PASSES,  # once an epoch, to the nearest update
        "precision": "bf16-mixed" if BF16 else "32-true",
    }
    return Trainer(**(own | options))
$open
# 5. With use_distributed_sampler=False every process validates on all images: exact, but p times the work
#    → Divide them as in 2, and sum counts.''',
    "accelerate": """\
$about
# Start: accelerate launch --num_processes $processes$machines YOUR_SCRIPT.py
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs

$shared

def train(model: nn.Module, dataset, **loader_options) -> None:
    accelerator = Accelerator(
        gradient_accumulation_steps=PASSES,
        mixed_precision="bf16" if BF16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.num_processes != PROCESSES:
        raise ValueError(f"made for {PROCESSES} processes, started in {accelerator.num_processes}")
    prepare(model)
    optimizer, scheduler = make_optimizer(model)
    parallel, optimizer = accelerator.prepare(model, optimizer)
    # Not the scheduler: a prepared one is stepped PROCESSES times an update (accelerate#2926). Nor the loader: its
    # batches are dealt, and a prepared one repeats samples until all processes have equally many.
    accelerator.register_for_checkpointing(scheduler)
    for images, labels in DataLoader(dataset, batch_sampler=Stream(accelerator.process_index), **loader_options):
        with accelerator.accumulate(parallel):
            with accelerator.autocast():
                loss = F.cross_entropy(parallel(images.to(accelerator.device)), labels.to(accelerator.device))
            accelerator.backward(loss)  # divides by PASSES, and DDP by PROCESSES: the mean over all of kn (§3)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
    average_statistics(model)
$open
# 5. accelerator.save_state keeps no position in the data
#    → Save the count of updates t with it, and resume with Stream(rank, start=t).""",
    "hf": '''\
$about
# Start: $torchrun YOUR_SCRIPT.py
from transformers import Trainer, TrainingArguments

$shared

class LargeMinibatchTrainer(Trainer):
    """A Trainer whose batches are `Stream`'s and whose loss is the mean over the minibatch."""

    def get_train_dataloader(self):
        options = {"collate_fn": self.data_collator, "num_workers": self.args.dataloader_num_workers}
        return DataLoader(self.train_dataset, batch_sampler=Stream(self.args.process_index), **options)

    def evaluate(self, *args, **options):
        average_statistics(self.model)
        return super().evaluate(*args, **options)


def make_trainer(model: nn.Module, dataset, output_dir: str, trainer_options=None, **options) -> Trainer:
    """A Trainer for a model that returns the mean loss of its batch."""
    own = {
        "max_steps": UPDATES,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": PASSES,
        "max_grad_norm": 0.0,  # its default clips gradients at 1.0
        "logging_nan_inf_filter": False,  # its default hides losses that are not finite
        "ddp_broadcast_buffers": False,
        "bf16": BF16,
        "seed": SEED,
    }
    arguments = TrainingArguments(output_dir, **(own | options))
    if arguments.world_size * max(arguments.n_gpu, 1) != PROCESSES:
        raise ValueError(f"made for {PROCESSES} processes of one device each; start it so, with torchrun")
    prepare(model)
    more = {"optimizers": make_optimizer(model)} | (trainer_options or {})
    trainer = LargeMinibatchTrainer(model, arguments, train_dataset=dataset, **more)
    # Else a model whose forward takes **kwargs is trusted to divide by the count of all items; if it returns the mean
    # of its batch all the same, gradients are PROCESSES · PASSES times too large.
    trainer.model_accepts_loss_kwargs = False
    return trainer
$open
# 5. Its epochs, in logs and with eval_strategy="epoch", are the whole run
#    → eval_strategy="steps", eval_steps=$once, and the same save_steps.''',
}


def translate(plan: Plan, tool: str) -> str:
    """The plan for `tool`, on the plan's number of processes, or a process for each worker.

    A Python file (for timm a shell script) whose rate is the plan's at every update; behind it, as comments, what the
    tool does otherwise than the paper, each with its remedy. Needs no torch. A ValueError for an unknown tool, and for
    a plan that no other tool can follow, as without the number of samples.
    """
    if tool not in TEMPLATES:
        raise ValueError(f"no tool is called {tool!r}; expected {nearest(tool, TEMPLATES)}")
    values, parts = values_of(plan), {"about": ABOUT, "shared": SHARED, "open": OPEN}
    values |= {name: Template(text).substitute(values) for name, text in parts.items()}
    return Template(TEMPLATES[tool]).substitute(values)


def values_of(plan: Plan) -> dict[str, Any]:
    """By name. kn = p · passes · n; a process for each worker where the plan names no number of processes."""
    recipe, workers, samples = plan.recipe, plan.recipe.workers.workers, plan.recipe.samples
    processes = plan["placement"].value if "placement" in plan.values else workers
    if samples is None:
        raise ValueError("a translation needs the number of training samples; give --samples N")
    if workers % processes:
        fits = [p for p in range(1, workers + 1) if workers % p == 0]
        below, above = max(p for p in fits if p < processes), min(p for p in fits if p > processes)
        raise ValueError(
            f"{workers} workers (k = kn / n) do not divide evenly among {processes} processes, and other tools"
            f" average over processes as if they did; use --processes {below} or {above}, or `onehour train`"
        )
    if recipe.optimizer == "muon":
        raise ValueError("optimizer muon is not translated; use --optimizer sgd, and put your tool's own in its place")
    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer {recipe.optimizer} is your own, and what it takes is not known here; translate with"
            " --optimizer sgd, and put your own in its place"
        )
    if recipe.epochs % 1:
        raise ValueError(f"other tools count whole epochs, and epochs is {recipe.epochs:g}; give a whole number")
    if recipe.scaling == "adascale":
        raise ValueError("scaling adascale is not translated; use linear, sqrt or fixed")
    if recipe.precision == "float64":
        raise ValueError("precision float64 is not translated; use --precision float32 or bf16")
    if recipe.pitfall is not None:
        raise ValueError(f"pitfall {recipe.pitfall} is not translated; leave it out")
    for name in LEFT:
        if getattr(recipe, name):
            raise ValueError(f"{name} is not translated; leave it out here, and set it in your tool")
    passes, schedule, n = workers // processes, schedule_code(recipe), recipe.per_worker
    nodes = processes // (each := max(g for g in range(1, 9) if processes % g == 0))  # at most the paper's 8 (§4)
    momentum = f", momentum={recipe.momentum!r}{', nesterov=True' * recipe.nesterov}" * (recipe.optimizer == "sgd")
    adam = "" if recipe.adam is None else f", betas={recipe.adam['betas']!r}, eps={recipe.adam['eps']!r}"
    layout, compiles = "    model.to(memory_format=torch.channels_last)\n", "    model.compile()\n"
    return recipe.as_dict() | {
        "name": shown(recipe.name),
        "workers": workers,
        "processes": processes,
        "passes": passes,
        "together": n * passes,
        "weight_decay": recipe.target_weight_decay,
        "iterations": recipe.workers.iterations(samples, recipe.epochs),
        "once": max(1, round(samples / recipe.minibatch)),
        "nodes": nodes,
        "torchrun": f"torchrun{f' --nnodes {nodes}' * (nodes > 1)} --nproc-per-node {each}",
        "machines": f" --num_machines {nodes}" * (nodes > 1),
        "bf16": recipe.precision == "bf16",
        "schedule": schedule,
        "schedules": ", ".join(re.findall(r"\w+(?=\()", schedule)),
        "zero": "" if recipe.zero_gamma else ", zero_gamma=False",
        "speed": layout * recipe.channels_last + compiles * recipe.compile,
        "optim": f"{OPTIMIZERS[recipe.optimizer]}(groups, lr=SCHEDULE(0.0){momentum}{adam})",
        "timm_flags": " \\\n    ".join(_timm_flags(recipe)),
    }


def schedule_code(recipe: Recipe) -> str:
    """The recipe's schedule as it is written with onehour's rules; it gives the same rates to the bit."""
    if recipe.decay == "cosine":
        usual = f"cosine_decay({recipe.target_lr!r}, epochs={recipe.epochs})"
    else:
        drops = [int(milestone) if milestone.isdecimal() else milestone for milestone in recipe.milestones]
        usual = f"step_decay({recipe.target_lr!r}, {drops}, factor={recipe.decay_factor!r})"
    if not recipe.warms_up:
        return usual
    return f"{recipe.warmup}_warmup({usual}, start_lr={recipe.base_lr!r}, epochs={recipe.warmup_epochs})"


def _timm_flags(recipe: Recipe) -> list[str]:
    name = recipe.model.removeprefix("timm:")
    model = name if name in TIMM_MODELS or recipe.model.startswith("timm:") else "MODEL"
    optimizer = TIMM_OPTIMIZERS.get(recipe.optimizer, recipe.optimizer)
    if recipe.optimizer == "sgd":
        optimizer = f"{'sgd' if recipe.nesterov else 'momentum'} --momentum {recipe.momentum!r}"
    betas = ""
    if recipe.adam is not None:
        betas = f" --opt-betas {' '.join(map(repr, recipe.adam['betas']))} --opt-eps {recipe.adam['eps']!r}"
    classes = "" if recipe.classes is None else f" --num-classes {recipe.classes}"
    return [
        f"--data-dir DATA --model {shlex.quote(model)}{classes}",
        f"--opt {optimizer} --weight-decay {recipe.target_weight_decay!r}{betas} --lr {recipe.schedule(0.0)!r}",
        *["--train-interpolation bilinear --interpolation bilinear --crop-pct 0.875"] * (model != "MODEL"),
        *["--amp --amp-dtype bfloat16"] * (recipe.precision == "bf16"),
        *["--channels-last"] * recipe.channels_last,
        *["--torchcompile"] * recipe.compile,
        *["--model-kwargs zero_init_last=False"] * (not recipe.zero_gamma),
    ]
