"""Frameworks are known by where their code is; the real ones are tried in tests/frameworks/."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from onehour.rules.askers import Asker, asker, fixes_its_length
from onehour.rules.minibatch import Minibatch
from onehour.rules.sampler import StreamBatchSampler

ACCELERATE = """
class BatchSamplerShard:
    def __init__(self, batch_sampler, split_batches):
        self.batch_sampler, self.split_batches, self.num_processes = batch_sampler, split_batches, 2

    def __iter__(self):
        yield from (batch[:4] for batch in self.batch_sampler)


class DataLoaderShard:
    def __init__(self, loader, iteration):
        self.loader, self.iteration = loader, iteration

    def __iter__(self):
        yield from self.loader
"""


def within(module: str, code: str) -> dict[str, Any]:
    """The names of code that is in such a module."""
    names: dict[str, Any] = {"__name__": module}
    exec(code, names)
    return names


def sampler() -> StreamBatchSampler:
    return StreamBatchSampler(125, Minibatch(per_worker=2, workers=4), seed=0, epochs=3)


def test_nobody_is_known_to_ask_from_a_users_own_code():
    assert asker() == Asker()
    assert not fixes_its_length()


@pytest.fixture
def prepared() -> Callable[..., Iterator[Any]]:
    """A loader as Accelerate leaves it on two processes."""
    names = within("accelerate.data_loader", ACCELERATE)

    def prepare(split_batches: bool, iteration: int = 0) -> Iterator[Any]:
        shard = names["BatchSamplerShard"](sampler(), split_batches)
        return names["DataLoaderShard"](DataLoader(TensorDataset(torch.arange(125)), batch_sampler=shard), iteration)

    return prepare


def test_accelerate_that_splits_gets_whole_minibatches_in_its_processes_order(prepared: Callable[..., Iterator[Any]]):
    stream = sampler().stream
    assert [rows.tolist() for (rows,) in prepared(True)] == [stream.indices(t, range(2)).tolist() for t in range(16)]


def test_accelerate_that_deals_is_refused(prepared: Callable[..., Iterator[Any]]):
    with pytest.raises(ValueError, match=r"among 2 processes once more; use .*split_batches=True"):
        list(prepared(False))


def test_accelerates_epoch_is_the_samplers(prepared: Callable[..., Iterator[Any]]):
    assert next(iter(prepared(True, iteration=2)))[0].tolist() == sampler().stream.indices(32, range(2)).tolist()


@pytest.mark.parametrize(
    ("module", "has_length"),
    [
        ("lightning.pytorch.loops.fit_loop", False),
        ("pytorch_lightning.loops.fit_loop", False),
        ("lightning.fabric.utilities.data", False),
        ("transformers.trainer_utils", False),
        ("lightning.fabric.wrappers", True),
        ("lightning_of_mine", True),
        ("__main__", True),
    ],
)
def test_a_framework_that_keeps_the_first_length_gets_none(module: str, has_length: bool):
    ask = within(module, "def ask(loader): return len(loader)")["ask"]
    loader = DataLoader(TensorDataset(torch.arange(125)), batch_sampler=sampler())
    if has_length:
        assert ask(loader) == 16
        return
    with pytest.raises(TypeError, match="epochs differ in length"):
        ask(loader)
