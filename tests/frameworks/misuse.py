"""What happens where a sampler is used otherwise than in the examples: an error that says so, or the right samples."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from drive import RANK, WORLD, Taped, example
from judge import EPOCHS, MINIBATCH
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from onehour import StreamBatchSampler

DATA = TensorDataset(torch.arange(125).float()[:, None], torch.arange(125) % 2)


def sampler(**options: Any) -> StreamBatchSampler:
    return StreamBatchSampler(125, MINIBATCH, seed=0, epochs=EPOCHS, **options)


def prepared(batch_sampler: StreamBatchSampler, **configuration: Any) -> Any:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**configuration))
    return accelerator.prepare(DataLoader(DATA, batch_sampler=batch_sampler))


def samples_of(loader: Any) -> list[list[int]]:
    return [[int(index) for index in x[:, 0]] for x, _ in loader]


def accelerate_deals_whole_batches() -> Any:
    return samples_of(prepared(sampler()))


def accelerate_deals_shares() -> Any:
    return samples_of(prepared(sampler(process=RANK, processes=WORLD)))


def accelerate_splits_shares() -> Any:
    return samples_of(prepared(sampler(process=RANK, processes=WORLD), split_batches=True))


def accelerate_splits_whole_batches() -> Any:
    return samples_of(prepared(sampler(process=0, processes=1), split_batches=True))


def accelerate_dispatches() -> Any:
    return samples_of(prepared(sampler(), split_batches=True, dispatch_batches=True))


def accelerate_skips_too() -> Any:
    loader = prepared(sampler(trained=20), split_batches=True)
    return samples_of(Accelerator().skip_first_batches(loader, 4))


def accelerate_sets_an_epoch() -> Any:
    (loader := prepared(sampler(), split_batches=True)).set_epoch(1)
    return [samples_of(loader), samples_of(loader)]


def accelerate_resumes_and_counts_from_0() -> Any:
    return samples_of(prepared(sampler(trained=20), split_batches=True))


def lightning(batch_sampler: StreamBatchSampler, **options: Any) -> Any:
    net, folder = Taped(), Path(tempfile.mkdtemp())
    module = example("with_lightning").Module(net, 125)
    common = {"accelerator": "cpu", "devices": WORLD, "max_epochs": EPOCHS, "logger": False, "default_root_dir": folder}
    trainer = Trainer(enable_checkpointing=False, enable_progress_bar=False, **(common | options))
    if batch_sampler._trained:
        batch_sampler._trained = lambda: trainer.global_step
    trainer.fit(module, DataLoader(DATA, batch_sampler=batch_sampler), DataLoader(DATA, 8))
    return net.tape


def lightning_replaces_the_sampler() -> Any:
    return lightning(sampler())


def lightning_counts_batches_itself() -> Any:
    return lightning(sampler(), use_distributed_sampler=False)


def lightning_reloads() -> Any:
    return lightning(sampler(trained=lambda: 0), use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1)


def lightning_accumulates() -> Any:
    return lightning(sampler(trained=lambda: 0), use_distributed_sampler=False, accumulate_grad_batches=2)


def transformers(**options: Any) -> Any:
    """The example for 23 updates, and again with these options."""
    module, folder = example("with_transformers"), Path(os.environ["MISUSE"]) / "transformers"
    arguments = module.TrainingArguments
    for changes in ({"max_steps": 23}, options):
        module.TrainingArguments = lambda out, changes=changes, **given: arguments(out, **(given | changes))
        module.train(Taped(), DATA, DATA, folder, save_every=5)
    return "trained twice"


def transformers_skips_too() -> Any:
    return transformers(ignore_data_skip=False)


def transformers_counts_epochs() -> Any:
    return transformers(max_steps=-1, num_train_epochs=EPOCHS)


def told(act: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    os.environ["MISUSE"] = str(folder)
    names = [name for name in list(globals()) if name.startswith(("accelerate_", "lightning_", "transformers_"))]
    said = {name: told(globals()[name]) for name in names}
    (folder / f"said-{RANK}.json").write_text(json.dumps(said))
