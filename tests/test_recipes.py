"""Named recipes are the paper's numbers, and a variant is a change of one."""

from fractions import Fraction
from pathlib import Path

import pytest

from onehour.planner import plan
from onehour.recipes import RECIPES, detection, digits, recipe, resnet50, resnet101


def test_resnet50_is_the_papers_section_5_1():
    paper = resnet50()
    assert (paper.samples, paper.per_worker) == (1_281_167, 32)
    assert (paper.base_lr, paper.base_minibatch, paper.epochs) == (0.1, 256, 90)
    assert (paper.momentum, paper.nesterov, paper.weight_decay) == (0.9, True, 1e-4)
    assert (paper.decay, paper.milestones, paper.decay_factor) == ("step", ("30", "60", "80"), 0.1)
    assert (paper.warmup, paper.warmup_epochs, paper.zero_gamma) == ("gradual", 5, True)
    assert (paper.scaling, paper.optimizer) == ("linear", "sgd")


def test_resnet101_differs_from_resnet50_in_its_model_alone():
    assert resnet101().replace(name="resnet50", model="resnet50") == resnet50()
    assert resnet101().model == "resnet101"


def test_digits_drops_at_the_same_shares_of_its_epochs_as_the_paper():
    """30, 60 and 80 of 90 are 1/3, 2/3 and 8/9 of the run: of 24 epochs 8, 16 and 64/3."""
    assert digits().milestones == ("8", "16", "64/3")
    assert digits().epochs == 24
    assert digits().schedule(64 / 3) < digits().schedule(21.33)


@pytest.mark.parametrize(
    ("gpus", "kn", "rate", "iterations"),
    [(1, 2, 0.0025, 1_280_000), (2, 4, 0.005, 640_000), (4, 8, 0.01, 320_000), (8, 16, 0.02, 160_000)],
)
def test_detection_gives_each_row_of_t3b_from_its_first(gpus, kn, rate, iterations):
    """The rate falls at 120k of 160k iterations (He et al. 2017), which the other rows have at the same epoch."""
    row = detection(minibatch=kn)
    assert row.samples is not None
    assert (row.workers.workers, row.workers.iterations(row.samples, row.epochs)) == (gpus, iterations)
    drop = 3 * iterations // 4
    rates = [row.schedule(iteration * kn / row.samples) for iteration in (0, drop - 1, drop, iterations - 1)]
    assert rates == pytest.approx([rate, rate, rate / 10, rate / 10], rel=1e-15)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_found_by_its_name_and_passes_its_own_checks(name):
    assert recipe(name) == RECIPES[name]()
    assert recipe(name).name == name
    assert recipe(name, seed=7) == recipe(name).replace(seed=7)
    assert recipe(name).workers.size == recipe(name).minibatch


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("times", [2, 8])
def test_the_linear_rule_gives_every_recipe_k_times_its_rate(name, times):
    grown = recipe(name, minibatch=times * recipe(name).base_minibatch)
    assert grown.target_lr == pytest.approx(times * recipe(name).base_lr, rel=1e-15)
    assert grown.epochs == recipe(name).epochs


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet5", "no recipe is called 'resnet5'; expected resnet50, or a path that ends in .toml"),
        ("vgg", "no recipe is called 'vgg'; expected one of digits, fashion, cifar10, resnet50, resnet101, detection"),
        ("", "no recipe is called ''"),
        ("resnet50.tml", "no recipe is called 'resnet50.tml'; expected resnet50"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, told):
    with pytest.raises(ValueError, match="no recipe") as error:
        recipe(name)
    assert told in str(error.value)


def test_a_name_is_changed_as_any_field():
    assert recipe("digits", name="mine") == digits().replace(name="mine")
    assert plan("digits", name="mine").recipe.name == "mine"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_recipe_is_read_from_a_toml_file_and_changed(tmp_path, kind):
    path = tmp_path / "mine.toml"
    path.write_text(digits(seed=3).to_toml(), encoding="utf-8")
    assert recipe(kind(path)) == digits(seed=3)
    assert recipe(kind(path), minibatch=64) == digits(seed=3, minibatch=64)


@pytest.mark.parametrize("epochs", [2, 45, 90, 180])
def test_another_number_of_epochs_keeps_the_papers_shares(epochs):
    """Warmup 5/90, drops at 1/3, 2/3 and 8/9 of the run."""
    changed = resnet50(minibatch=8192, epochs=epochs)
    assert [Fraction(m) for m in changed.milestones] == [epochs * Fraction(s) for s in ("1/3", "2/3", "8/9")]
    assert changed.warmup_epochs == pytest.approx(epochs * 5 / 90, rel=1e-15)
    assert changed.remarks == []
    whole = resnet50(minibatch=8192)
    for share in (0, 0.01, 0.05, 0.1, 0.4, 0.7, 0.95):
        assert changed.schedule(share * epochs) == pytest.approx(whole.schedule(share * 90), rel=1e-12)


def test_what_is_given_beside_the_epochs_stays():
    changed = digits(epochs=2, minibatch=256, warmup_epochs=1, milestones=("1",))
    assert (changed.warmup_epochs, changed.milestones) == (1, ("1",))
    assert digits(epochs=2, warmup_epochs=1).milestones == ("2/3", "4/3", "16/9")
    assert digits(epochs=12, milestones=("4",)).warmup_epochs == 2.5


def test_what_has_no_effect_does_not_move():
    assert digits(epochs=2, warmup="none").warmup_epochs == 5
    assert digits(epochs=2, decay="cosine").milestones == digits().milestones


def test_a_file_that_says_its_epochs_alone_has_the_shares_of_the_paper(tmp_path):
    file = tmp_path / "short.toml"
    file.write_text('model = "resnet50"\nepochs = 45\n', encoding="utf-8")
    assert recipe(file).milestones == ("15", "30", "40")
    file.write_text(recipe(file, epochs=9).to_toml(), encoding="utf-8")
    assert recipe(file).milestones == ("3", "6", "8")
    assert recipe(file).warmup_epochs == 0.5


def test_whole_epochs_of_warmup_are_written_as_such():
    assert "warmup_epochs = 5\n" in digits(warmup_epochs=5.0).to_toml()
    assert "warmup_epochs = 2.5\n" in digits(epochs=12).to_toml()
