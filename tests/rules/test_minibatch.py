"""§2.1: how large a minibatch is, and the linear scaling rule (eq 2-4)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onehour.rules.minibatch import Minibatch, fixed_scaling, linear_scaling, parse_size, sqrt_scaling

IMAGENET = 1_281_167
K, N_EACH, LR = 4, 8, 0.1


# The paper's table of rates (§5.1) and T3b's (Mask R-CNN, 0.02 at 16), to the last bit.
@pytest.mark.parametrize(
    ("minibatch", "lr"),
    [
        *[(128, 0.05), (256, 0.1), (512, 0.2), (1024, 0.4), (2048, 0.8), (4096, 1.6), (8192, 3.2), (16384, 6.4)],
        *[(32768, 12.8), (65536, 25.6)],
    ],
)
def test_linear_scaling_gives_the_papers_rates_exactly(minibatch, lr):
    assert linear_scaling(0.1, 256, minibatch) == lr
    assert linear_scaling(0.1, 256, Minibatch.of(minibatch, per_worker=32)) == lr


@pytest.mark.parametrize(("minibatch", "lr"), [(2, 0.0025), (4, 0.005), (8, 0.01), (16, 0.02)])
def test_linear_scaling_gives_the_detection_table_exactly(minibatch, lr):
    assert linear_scaling(0.02, 16, minibatch) == lr


def test_sqrt_scaling_grows_with_the_root_and_fixed_scaling_not_at_all():
    assert sqrt_scaling(0.1, 256, 8192) == pytest.approx(0.1 * 32**0.5, rel=1e-15)
    assert sqrt_scaling(0.1, 256, 64) == 0.05
    assert fixed_scaling(0.1, 256, 8192) == 0.1
    assert sqrt_scaling(0.1, 256, Minibatch(32, 32)) == sqrt_scaling(0.1, 256, 1024)


@pytest.mark.parametrize("scaling", [linear_scaling, sqrt_scaling, fixed_scaling])
def test_every_scaling_leaves_the_rate_alone_at_the_base_minibatch(scaling):
    assert scaling(0.1, 256, 256) == 0.1


def samples() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(K, N_EACH, 3, generator=draw, dtype=torch.float64), torch.ones(3, dtype=torch.float64)


def small_steps(gradient, lr: float) -> Tensor:
    """Eq 3: k steps of n samples, w_{j+1} = w_j − η·(1/n)·Σ∇l(x, w_j)."""
    data, weight = samples()
    for minibatch in data:
        weight = weight - lr * gradient(minibatch, weight).sum(0) / N_EACH
    return weight


def big_step(gradient, lr: float) -> Tensor:
    """Eq 4: one step of kn samples, ŵ = w − η̂·(1/kn)·ΣΣ∇l(x, w)."""
    data, weight = samples()
    return weight - lr * gradient(data.flatten(0, 1), weight).sum(0) / (K * N_EACH)


def constant(minibatch: Tensor, weight: Tensor) -> Tensor:
    """∇ of l(x, w) = x·w."""
    return minibatch


def changing(minibatch: Tensor, weight: Tensor) -> Tensor:
    """∇ of l(x, w) = ½ (x·w)²."""
    return (minibatch @ weight)[:, None] * minibatch


def test_k_small_steps_equal_one_big_step_at_k_times_the_rate_while_gradients_stay():
    big = big_step(constant, linear_scaling(LR, N_EACH, Minibatch(N_EACH, K)))
    torch.testing.assert_close(big, small_steps(constant, LR), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", [sqrt_scaling, fixed_scaling])
def test_no_other_rate_than_k_times_makes_the_big_step_equal(scaling):
    difference = big_step(constant, scaling(LR, N_EACH, K * N_EACH)) - small_steps(constant, LR)
    assert difference.abs().max() > 1e-2


def test_the_steps_part_when_gradients_change():
    difference = big_step(changing, K * LR) - small_steps(changing, LR)
    assert difference.abs().max() > 1e-2


def test_one_step_at_the_base_is_equation_2():
    data, weight = samples()
    loss = 0.5 * (data[0] @ weight.requires_grad_()).square().mean()
    loss.backward()
    torch.optim.SGD([weight], lr=LR).step()
    _, before = samples()
    torch.testing.assert_close(
        weight.detach(), before - LR * changing(data[0], before).sum(0) / N_EACH, rtol=0, atol=1e-12
    )


def test_a_minibatch_is_k_workers_of_n():
    minibatch = Minibatch(per_worker=32, workers=256)
    assert minibatch.size == 8192
    assert Minibatch.of(8192, per_worker=32) == minibatch


@pytest.mark.parametrize(
    ("size", "per_worker", "told"),
    [
        (8191, 32, "minibatch 8191 is not a multiple of per_worker 32.* use 8160 or 8192"),
        (5, 32, "minibatch 5 is not a multiple of per_worker 32.* use 32 or 64"),
    ],
)
def test_a_size_that_no_workers_make_is_refused_with_the_nearest_sizes(size, per_worker, told):
    with pytest.raises(ValueError, match=told):
        Minibatch.of(size, per_worker)


@pytest.mark.parametrize(
    ("kn", "iterations"), [(256, 450_411), (512, 225_206), (8192, 14_076), (16384, 7_038), (65536, 1_760)]
)
def test_a_run_of_90_epochs_of_imagenet_has_as_many_iterations_as_the_paper(kn, iterations):
    assert Minibatch.of(kn, per_worker=32).iterations(IMAGENET, epochs=90) == iterations


def test_an_epoch_of_imagenet_at_8k_has_156_iterations_and_a_part():
    assert Minibatch.of(8192, per_worker=32).iterations_per_epoch(IMAGENET) == IMAGENET / 8192
    assert int(IMAGENET / 8192) == 156


@given(n=st.integers(1, 64), k=st.integers(1, 2048), samples=st.integers(1, 2**55), epochs=st.integers(1, 1000))
def test_iterations_are_the_fewest_that_cover_all_epochs(n, k, samples, epochs):
    minibatch = Minibatch(n, k)
    iterations = minibatch.iterations(samples, epochs)
    assert (iterations - 1) * minibatch.size < epochs * samples <= iterations * minibatch.size


@given(n=st.integers(1, 64), k=st.integers(1, 64), samples=st.integers(1, 2**30), images=st.integers(1, 2**40))
def test_a_run_of_so_many_images_has_as_many_iterations_as_cover_them(n, k, samples, images):
    minibatch = Minibatch(n, k)
    iterations = minibatch.iterations(samples, images / samples)
    assert (iterations - 1) * minibatch.size < images <= iterations * minibatch.size


@pytest.mark.parametrize(
    ("text", "size"),
    [("256", 256), ("8k", 8192), (" 8K ", 8192), ("64k", 65536), (1024, 1024), ("1", 1), ("0032", 32)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "k", "0", "0k", "-1", "+8", "8kk", "8 k", "8m", "8_192", "1e3", "2.5", "1.5k", "²", "٣", "0x10"],
        True,
    ],
)
def test_what_is_no_size_is_refused_as_written(text):
    with pytest.raises(ValueError, match="is not a size; expected") as error:
        parse_size(text)
    assert repr(text) in str(error.value)
