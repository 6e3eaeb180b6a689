"""Random erasing, mixup and cutmix: each formula once more, and draws that follow from seed, worker and sample."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from onehour import Recipe
from onehour.data.augment import draw_erasure, uniform
from onehour.data.mixing import Mixing, draw_mix, symmetric_beta
from onehour.data.sources import refuse_mixing
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

SAMPLES, CLASSES, N, K, T = 60, 5, 3, 4, 6
SHAPE = (2, 7, 5)
"""Iteration 6 of minibatches of 12 is in the second epoch."""
DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(SAMPLES, *SHAPE, dtype=torch.float64, generator=DRAW)
LABELS = torch.randint(CLASSES, (SAMPLES,), generator=DRAW)


def mixing(n: int = N, k: int = K, **changes: Any) -> Mixing:
    recipe = Recipe(samples=SAMPLES, per_worker=n, minibatch=n * k, seed=3, **changes)
    return Mixing(recipe, SampleStream(samples=SAMPLES, minibatch=recipe.workers, seed=3))


def changed(mix: Mixing, workers: range, images: Tensor = IMAGES) -> tuple[Tensor, ...]:
    chosen = torch.from_numpy(mix.stream.indices(T, workers))
    return mix((images[chosen], LABELS[chosen]), T, workers)


def soft(labels: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    one, other = (torch.eye(CLASSES, dtype=torch.float64)[each] for each in (labels, others))
    return shares[:, None] * one + (1 - shares[:, None]) * other


def cut(key: int, alpha: float) -> tuple[int, int, int, int]:
    """timm's rand_bbox on numbers that are drawn."""
    _, u, v, vertical, horizontal = uniform(key, 5)
    _, height, width = SHAPE
    ratio = np.sqrt(1 - symmetric_beta(alpha, u, v))
    cut_h, cut_w = int(height * ratio), int(width * ratio)
    cy, cx = int(vertical * height), int(horizontal * width)
    rows = np.clip(cy - cut_h // 2, 0, height), np.clip(cy + cut_h // 2, 0, height)
    return *rows, np.clip(cx - cut_w // 2, 0, width), np.clip(cx + cut_w // 2, 0, width)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1, 4])
def test_lambda_is_of_a_symmetric_beta_distribution(alpha: float):
    drawn = [symmetric_beta(alpha, *uniform(key, 2)) for key in range(2000)]
    assert 0 <= min(drawn) < max(drawn) <= 1
    result: Any = stats.kstest(drawn, stats.beta(alpha, alpha).cdf)
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_as_the_equations_say(kind: str):
    alpha: dict[str, Any] = {kind: 0.8}
    mix, workers = mixing(**alpha), range(1, 3)
    images, *labels = changed(mix, workers)
    for j, worker in enumerate(workers):
        key, chosen = seed_for(3, "mix", T, worker), mix.stream.indices(T, worker)
        for i in range(N):
            x, before = IMAGES[chosen[i]], IMAGES[chosen[i - 1]]
            if kind == "mixup":
                share = symmetric_beta(0.8, *uniform(key, 5)[1:3])
                expected = share * x + (1 - share) * before
            else:
                top, bottom, left, right = cut(key, 0.8)
                expected = x.clone()
                expected[:, top:bottom, left:right] = before[:, top:bottom, left:right]
                share = 1 - (bottom - top) * (right - left) / (7 * 5)
            torch.testing.assert_close(images[i * 2 + j], expected, rtol=0, atol=1e-14)
            one, other = torch.eye(CLASSES, dtype=torch.float64)[LABELS[chosen[[i, i - 1]]]]
            target = soft(*labels)[i * 2 + j]
            torch.testing.assert_close(target, share * one + (1 - share) * other, rtol=0, atol=1e-14)
    assert labels[2].min() >= 0.5  # of the label that training errors are counted against


def test_of_mixup_and_cutmix_one_is_drawn_for_each_worker():
    both: dict[str, Any] = {"height": 9, "width": 9}
    drawn = [draw_mix(key, mixup=0.2, cutmix=1.0, **both) for key in range(300)]
    alone = [(draw_mix(k, mixup=0.2, cutmix=0), draw_mix(k, mixup=0, cutmix=1.0, **both)) for k in range(300)]
    assert all(mix in pair for mix, pair in zip(drawn, alone, strict=True))
    assert 120 < sum(mix == pair[0] for mix, pair in zip(drawn, alone, strict=True)) < 180


@pytest.mark.parametrize("together", [2, 4])
def test_a_worker_is_mixed_with_itself_alone_whatever_shares_its_pass(together: int):
    mix = mixing(mixup=0.3, cutmix=0.7, random_erasing=0.5)
    bad = IMAGES.clone()
    bad[mix.stream.indices(T, 2)] = torch.nan
    for start in range(0, K, together):
        workers = range(start, start + together)
        found = changed(mix, workers, bad)
        for j, worker in enumerate(workers):
            alone = changed(mix, range(worker, worker + 1), bad)
            for mine, own in zip(found, alone, strict=True):
                torch.testing.assert_close(mine[j::together], own, rtol=0, atol=0, equal_nan=True)
            assert alone[0].isnan().any() == (worker == 2)


def test_a_rectangle_is_erased_as_torchvision_draws_it():
    erased = 0
    for key in (seed_for(0, "erase", number) for number in range(400)):
        found = draw_erasure(32, 20, key, 0.4)
        if key / 2**63 >= 0.4:
            assert found == (0, 0, 0, 0)
            continue
        erased += 1
        draws = iter(uniform(key, 40))
        for _ in range(10):
            area, aspect, i, j = (next(draws) for _ in range(4))
            area = 32 * 20 * (0.02 + 0.31 * area)
            # log r of w/h is drawn upwards, as h/w is from the other end
            ratio = math.exp(math.log(3.3) - (math.log(3.3) - math.log(0.3)) * aspect)
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < 32 and 0 < w < 20:
                top, left = int(i * (32 - h + 1)), int(j * (20 - w + 1))
                assert found == (top, top + h, left, left + w)
                break
    assert 130 < erased < 190


def test_what_is_erased_of_a_sample_follows_from_seed_and_epoch_whatever_the_minibatch():
    found: dict[int, list[Tensor]] = {}
    for n, k in ((3, 4), (2, 6)):
        mix = mixing(n, k, random_erasing=0.5)
        images, _ = changed(mix, range(k))
        for index, image in zip(mix.stream.indices(T).tolist(), images, strict=True):
            found.setdefault(index, []).append(image)
            assert ((image == IMAGES[index]) | (image == 0)).all()
    assert all(torch.equal(*pair) for pair in found.values())
    assert 2 <= sum(bool((pair[0] == 0).any()) for pair in found.values()) <= 10
    other = mixing(random_erasing=0.5)
    batch = IMAGES[torch.from_numpy(other.stream.indices(T))], torch.zeros(12)
    assert not torch.equal(other(batch, T, range(K))[0] == 0, other(batch, T - 5, range(K))[0] == 0)


def test_a_recipe_without_them_leaves_a_batch_as_it_is():
    batch = IMAGES[:12], LABELS[:12]
    assert all(mine is own for mine, own in zip(mixing()(batch, 0, range(K)), batch, strict=True))


@pytest.mark.parametrize("shape", [(3, 1, 1), (16,)])
def test_what_cannot_be_cut_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"^cutmix: rectangles are cut out of images .* the data's have shape \("):
        refuse_mixing(Recipe(cutmix=1.0, mixup=0.2), torch.zeros(shape))
    refuse_mixing(Recipe(mixup=0.2), torch.zeros(shape))
    refuse_mixing(Recipe(cutmix=1.0, random_erasing=0.2), torch.zeros(1, 2, 1))
