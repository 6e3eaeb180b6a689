"""The commands beside a report are the study's own: parsed again they ask for the same cells."""

import shlex
from pathlib import Path

import pytest
import studies

from onehour.cli import make_parser
from onehour.cli.parser import parse, recipe_changes
from onehour.recipes import digits
from onehour.recipes import recipe as named
from onehour.study.findings import findings_of
from onehour.study.reproduce import BASE, commands, environment_of, left_over, more_seeds, unfinished
from onehour.study.results import read_paths, read_study
from onehour.study.spec import SweepSpec, parse_arm, spec_of


def asked(command: str) -> SweepSpec:
    """The spec of a `onehour sweep` command, as the command line makes it."""
    words = shlex.split(command)
    assert words[:2] == ["onehour", "sweep"]
    options = parse(make_parser(), words[1:])
    changes = recipe_changes(options)
    sizes, seed = changes.pop("minibatch", None), changes.pop("seed", 0)
    recipe = named(options.recipe, **changes).replace(classes=10)
    seeds = range(seed, seed + options.seeds)
    return spec_of(recipe, sizes, seeds, options.arm, options.arms_at, options.reference_seeds)


def names(spec: SweepSpec) -> set[str]:
    return {cell.name for cell in spec.cells()}


@pytest.mark.parametrize("arms", [(), studies.arms_of()], ids=["alone", "arms"])
def test_a_sweeps_command_asks_for_its_cells(tmp_path: Path, arms: tuple):
    recipe = digits(classes=10, data="digits:7", nesterov=False, milestones=("8", "64/3"), base_lr=0.25)
    arms = tuple(arm for arm in arms if arm != (("base_lr", "0.1"),))
    spec = studies.write_sweep(tmp_path, recipe=recipe, seeds=2, minibatches=(32, 512), arms=arms)
    (command,) = commands(read_study([tmp_path]))
    again = asked(command)
    assert names(again) == names(spec)
    assert again.recipe.replace(seed=0, minibatch=32) == spec.recipe.replace(seed=0, minibatch=32)


def test_seeds_with_a_gap_are_two_commands(tmp_path: Path):
    spec = SweepSpec(recipe=studies.BASE, minibatches=(32,), seeds=(7, 8, 3))
    spec.write(tmp_path)
    studies.write_run(tmp_path / "cells" / "32-s3", studies.BASE.replace(seed=3), 3.5)
    found = commands(read_study([tmp_path]))
    assert [word for command in found for word in shlex.split(command)].count("--seeds") == 2
    assert names(asked(found[0])) | names(asked(found[1])) == names(spec)


@pytest.mark.parametrize(
    ("reference", "flags"), [((), 1), (tuple(range(4)), 0), (tuple(range(7)), 1)], ids=["same", "twice", "more"]
)
def test_the_references_seeds_are_asked_for_again(tmp_path: Path, reference: tuple[int, ...], flags: int):
    spec = SweepSpec(recipe=studies.BASE, minibatches=(32, 64), seeds=(0, 1), reference_seeds=reference)
    spec.write(tmp_path)
    studies.write_run(tmp_path / "cells" / "32-s0", studies.BASE, 3.5)
    (command,) = commands(read_study([tmp_path]))
    assert command.count("--reference-seeds") == flags
    assert names(asked(command)) == names(spec)
    assert len(names(spec)) == 4 + max(len(reference) - 2, 0)


def test_more_seeds_go_on_in_the_same_folder(tmp_path: Path):
    """With twice as many at the reference, and judged as before."""
    folder = tmp_path / "my sweep"
    spec = studies.write_sweep(folder, seeds=2, minibatches=(32, 64), arms=())
    found = findings_of(read_study([folder]), 0.7, 2)
    words = shlex.split(more_seeds(found, 9))
    assert words[-6:] == ["--margin", "0.7", "--looks", "2", "--out", str(folder)]
    assert names(asked(shlex.join(words[:-6]))) > names(spec)
    assert len(names(asked(shlex.join(words[:-6])))) == 27


def test_a_csv_beside_a_sweep_does_not_move_its_folder(tmp_path: Path):
    studies.write_sweep(tmp_path / "sweep", seeds=2, minibatches=(32, 64), arms=())
    beside = studies.write_csv(tmp_path / "a.csv", [50, *[4.0] * 23], minibatch=32)
    found = findings_of(read_paths([tmp_path / "sweep", beside]))
    assert more_seeds(found, 9).endswith(f"--out {tmp_path / 'sweep'}")


def test_a_recipe_without_a_name_is_a_file_beside_the_report(tmp_path: Path):
    recipe = studies.BASE.replace(name="it's $mine; rm -rf")
    studies.write_sweep(tmp_path, recipe=recipe, seeds=1, minibatches=(32,), arms=())
    study = read_study([tmp_path])
    assert shlex.split(commands(study)[0])[:3] == ["onehour", "sweep", BASE]
    assert str(tmp_path / "cells" / "32-s0" / "recipe.toml") in more_seeds(findings_of(study), 5)
    assert "--trust" not in more_seeds(findings_of(study), 5)


def test_a_command_that_reads_the_name_of_code_from_a_file_trusts_it(tmp_path: Path):
    recipe = studies.BASE.replace(name="mine", model="mine:net")
    studies.write_sweep(tmp_path / "sweep", recipe=recipe, seeds=1, minibatches=(32,), arms=())
    study = read_study([tmp_path / "sweep"])
    assert shlex.split(commands(study)[0])[:4] == ["onehour", "sweep", BASE, "--trust"]
    assert "/32-s0/recipe.toml --trust --" in more_seeds(findings_of(study), 5)
    run = studies.write_run(tmp_path / "a", recipe, 3.5)
    assert commands(read_paths([run])) == ["onehour train a/recipe.toml --trust"]


def test_runs_have_a_command_each(tmp_path: Path):
    recipe = studies.BASE
    paths = [
        studies.write_run(tmp_path / "a", recipe, 3.5),
        studies.write_run(tmp_path / "b", recipe.replace(minibatch=512, warmup="none", zero_gamma=False, seed=3), 5.0),
        studies.write_csv(tmp_path / "c.csv", [9, 8] * 12, minibatch=64),
    ]
    found = commands(read_paths(paths))
    assert found == [
        "onehour train digits --minibatch 32 --seed 0",
        "onehour train digits --minibatch 512 --seed 3 --warmup none --no-zero-gamma",
    ]
    options = parse(make_parser(), shlex.split(found[1])[1:])
    assert named("digits", **recipe_changes(options)) == digits(minibatch=512, warmup="none", zero_gamma=False, seed=3)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"epochs": 48}, ["--epochs", "48"]),
        ({"epochs": 48, "decay": "cosine"}, ["--epochs", "48", "--decay", "cosine"]),
        (
            {"epochs": 48, "warmup_epochs": 5, "milestones": ("8", "16", "64/3")},
            ["--epochs", "48", "--milestones", "8,16,64/3", "--warmup-epochs", "5"],
        ),
    ],
)
def test_other_epochs_with_the_old_warmup_and_milestones_are_asked_for(tmp_path: Path, changes: dict, flags: list[str]):
    (command,) = commands(read_paths([studies.write_run(tmp_path / "a", studies.BASE.replace(**changes), 3.5)]))
    assert shlex.split(command)[7:] == flags
    options = parse(make_parser(), shlex.split(command)[1:])
    assert named("digits", **recipe_changes(options)).schedule == studies.BASE.replace(**changes).schedule


def test_what_was_given_from_python_has_no_command(tmp_path: Path):
    run = studies.write_run(tmp_path / "a", studies.BASE.replace(model="<Net>"), 3.5)
    assert commands(read_study([run])) == []


def test_unfinished_cells_and_those_that_nobody_asked_for(tmp_path: Path):
    studies.write_sweep(
        tmp_path, seeds=2, minibatches=(32, 64), arms=(), left_out=["32-s1"], unfinished=["64-s0"], non_finite=[]
    )
    studies.write_run(tmp_path / "cells" / "odd", studies.BASE.replace(seed=9), 3.5)
    study = read_study([tmp_path])
    assert unfinished(study) == ["32-s1", "64-s0"]
    assert left_over(study) == 1
    run = studies.write_run(tmp_path / "a", studies.BASE, 3.5, outcome="unfinished")
    assert unfinished(read_study([run])) == ["a"]


def test_an_arm_is_ended_however_it_was_typed(tmp_path: Path):
    arms = (*parse_arm("warmup_epochs=2"), *parse_arm("milestones=08+16"))
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 512), arms=arms)
    study = read_study([tmp_path])
    assert (unfinished(study), left_over(study)) == ([], 0)


def test_the_environment_is_each_value_that_occurs_and_no_private_place(tmp_path: Path):
    home = {"command": ["/home/me/bin/onehour", "train"], "from_iteration": 3, "gpu": None}
    paths = [
        studies.write_run(tmp_path / name, studies.BASE.replace(seed=seed), 3.5, environment={**home, "threads": seed})
        for seed, name in enumerate("ab")
    ]
    found = dict(environment_of(read_study(paths)))
    assert found["threads"] == "0; 1"
    assert found["torch"] == "2.13.0+cpu"
    assert not {"command", "from iteration", "gpu"} & set(found)
    assert "/home/me" not in str(found)
