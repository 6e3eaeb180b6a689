"""What an iteration counts: each pass once, over all processes, whichever way it is reduced."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from steps import step_of
from torch import nn
from wires import on_threads

from onehour import Recipe
from onehour.data.bad_images import Skipped
from onehour.data.loader import Batch
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.training.build import build_optimizer, pick_share

K = 6


Reduce = Literal["fast", "canonical"]


def counted(group: Group, reduce: Reduce) -> list[list[float]]:
    """Two iterations in which worker j replaces j images and gets j + 1 of its 7 labels wrong."""
    recipe = Recipe(samples=1000, minibatch=7 * K, per_worker=7, base_minibatch=7 * K, bad_images="skip", reduce=reduce)
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    own = passes(pick_share(recipe, group), 1 if reduce == "canonical" else 2)
    optimizer = build_optimizer(recipe.replace(base_lr=1e-30), model)
    skipped = Skipped()
    step = step_of(recipe, model, own, group=group, optimizer=optimizer, replaced=skipped)

    def batches() -> Iterator[Batch]:
        for workers in own * 2:
            skipped.add(range(sum(workers)))
            wrong = torch.tensor([row <= j for j in workers for row in range(7)])
            yield torch.eye(2)[wrong.long()], torch.zeros(len(wrong), dtype=torch.int64)

    given = batches()
    found = [step(iteration, given, stopping=stopping) for iteration, stopping in enumerate((group.rank == 0, False))]
    return [[float(one.sums[1, 0]), float(one.stop), float(one.skipped)] for one in found]


@pytest.mark.parametrize("reduce", ["fast", "canonical"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_errors_replaced_images_and_stops_are_counted_once(
    monkeypatch: pytest.MonkeyPatch, reduce: Reduce, processes: int
):
    for found in on_threads(monkeypatch, processes, lambda group: counted(group, reduce)):
        # 1 + 2 + … + 6 errors, 0 + 1 + … + 5 images.
        assert found == [[21, 1, 15], [21, 0, 15]]
