"""Every broken loop raises exactly its pitfall, in its own line; its twin and right loops of many styles raise none.

The numbers were computed by hand from the scripts: counts and rates from their constants, the others by running them
with the two terms written out in float64. Of 90 validation samples the batches have 2, 5 and 2 right of 32, 32 and 26:
9 of 90, and 100·(2/32 + 5/32 + 2/26)/3 as the mean of the rates. |m·v + η·g − (m·(η′/η)·v + η′·g)| is at most 4.98 %
of the right update, and 4.93 % for a velocity that is scaled without need. ‖μ₁ − μ₀‖/‖μ₀‖ is 0.762 at the first
evaluation. A sample of 5, of which the window's gradient takes a half as of 16, weighs 16/5 times as much.
"""

import ast
from pathlib import Path
from typing import Any

import pytest

import check_matrix as matrix
from check_matrix import Loop
from onehour.check.pitfalls import PITFALLS
from onehour.check.run.forkserver import ForkServer

LOOPS = matrix.loops()
PLAIN = list({loop.text: loop for loop in LOOPS if loop.framework is None and not loop.reported}.values())
"""Some pairs have the same twin."""
REPORTED = [loop for loop in LOOPS if loop.reported]
FRAMEWORKS = [
    pytest.param(loop, marks=getattr(pytest.mark, "vision" if loop.framework == "timm" else "frameworks"))
    for loop in LOOPS
    if loop.framework is not None
]

SAID: dict[str, tuple[str, str, str]] = {
    "accumulation-not-divided": ("4 batches an update, each with the weight 1", "the weight 1/4", "loss.backward()"),
    "accumulation-tail": ("an update of 2 batches has the weight 0.5 in all", "", "(loss / ACCUMULATE).backward()"),
    "adam-linear-scaling": ("rate 0.004 = 0.001 · 128 / 32", "about 0.002 = 0.001 · √(128 / 32)", "AdamW("),
    "batchnorm-n-changed": ("over n = 64 samples", "n = 16, the base recipe's", "DataLoader("),
    "batchnorm-n-changed__split": ("n = 32 on 1 process, 16 on 2", "one n", "DataLoader("),
    "batchnorm-stats-diverge": ("differ by 76.2 %", "the mean over processes", "net(images)"),
    "batchnorm-stats-of-rank-0": ("1 of 2 processes counts", "the mean over 2", "DistributedDataParallel(net)"),
    "batchnorm-synced": ("over all 2 processes' 32 samples", "its own 16", "convert_sync_batchnorm(net)"),
    "decay-decoupled-scales-with-lr": ("shrinks weights by 0.0001", "0.0002 a step", "DecoupledSGD(model"),
    "decay-in-loss": ("on 2 parameters in the loss adds 0.0001·w", "weight_decay=0.0001", "loss.backward()"),
    "decay-on-batchnorm": ("λ = 0.0001 on 2 of 2 BatchNorm parameters (1.weight, 1.bias)", "λ = 0", "SGD(groups"),
    "decay-scaled-with-loss": ("the loss is multiplied by 8, and λ = 0.0001 is not", "", "loss = K * F.cross_entropy"),
    "different-initial-weights": ("process 1's weights differ from process 0's by 1", "equal weights", "SGD("),
    "double-step": ("32 steps on 16 gradients", "one step", "optimizer.step()"),
    "drop-last-large": ("116 of 500 samples (23 %) are dropped", "under 2 %", "drop_last=True"),
    "dropped-evaluation": ("64 of 90 validation samples are evaluated", "all", "drop_last=True"),
    "gradient-mean-of-unequal": ("of 5 weighs 3.2 times one of a batch of 16", "1/kn", "F.cross_entropy(model"),
    "gradient-sum-not-mean": ("the sum of 2 processes' mean gradients: 2 times", "divided by 2", "optimizer.step()"),
    "gradient-sum-not-mean__alone": ("the loss is the sum over 16 values", "the mean over", "F.mse_loss("),
    "gradients-not-averaged": (
        "2 of 2 parameters are updated by another gradient on each of the 2 processes: 1.weight, 1.bias",
        "the mean over 2",
        "optimizer.step()",
    ),
    "gradients-not-averaged__forgotten": (
        "3 of 4 parameters are updated by another gradient on each of the 2 processes: 1.weight, 2.weight, 2.bias",
        "",
        "optimizer.step()",
    ),
    "loss-scaled-by-world-size": (
        "the loss is multiplied by 2",
        "a mean loss",
        "F.cross_entropy(model(images), labels) *",
    ),
    "lr-collapses": ("rate 1e-08 from epoch 26.2 of 90 on, 0.1 before", "over 90 epochs", "StepLR("),
    "lr-not-scaled": ("target rate 0.1 at minibatch 64", "0.4 = 0.1 · 64 / 16", "SGD("),
    "lr-scaled-wrong": ("target rate 0.2 at minibatch 64", "0.4 = 0.1 · 64 / 16", "SGD("),
    "mean-of-rates-evaluation": (
        "9.85577 is the mean of the batches' rates; one of 26",
        "10, of 9 in 90",
        "return 100 *",
    ),
    "mean-of-rates-evaluation__loss": (
        "is the mean of the batches' mean losses; one over 26 values weighs as much as one over 32",
        "each sample once",
        "total / len(validation)",
    ),
    "momentum-inside-uncorrected": (
        "from 0.115 to 0.1225; that update lies 5 % from eq 10",
        "× 1.07",
        "optimizer.step()",
    ),
    "momentum-outside-corrected": ("from 0.1 to 0.1075; that update lies 4.9 % from eq 9", "× 1", "optimizer.step()"),
    "no-warmup": ("the first iteration has rate 0.4", "0.1 at first, 0.4 after 5 epochs", "SGD("),
    "overlapping-shards": ("2 processes take 512 samples an epoch, 256 of them", "256 samples", "shuffle=True"),
    "padded-evaluation": ("102 samples are evaluated, 1 of them twice", "101 samples", "sampler=validation_sampler"),
    "padded-evaluation__walked": ("102 samples are evaluated, 1 of them twice (Dist", "101 samples", "in share"),
    "padded-training-data": ("an epoch takes 256 samples, 1 of them twice", "255 samples", "sampler=sampler"),
    "same-augmentation-on-every-worker": ("torch's generator is in the same state on all 2", "", "DataLoader("),
    "same-order-every-epoch__anew": ("epochs 0 and 1 take their 256 samples in the order of", "", "batch_size=32)"),
    "same-order-every-epoch__noisy": ("epochs 0 and 1 take their 128 samples in the order of", "", "batch_size=16)"),
    "same-order-every-epoch__slices": ("epochs 0 and 1 take their 8 batches in one order", "", "F.cross_entropy("),
    "same-order-every-epoch": ("epochs 0 and 1 take their 256 samples in one order", "", "sampler=sampler"),
    "scheduler-never-steps": ("0 steps of StepLR in 2 epochs; the rate stays 0.1", "", "StepLR("),
    "scheduler-steps-k-times": ("4 scheduler steps an update: the schedule of 40", "40 in the run", "scheduler.step()"),
    "scheduler-steps-k-times__processes": (
        "2 scheduler steps an update on 2 processes, 1 on 1: in epoch 4.12 the rate is 0.1 of its highest, 1 on 1",
        "one schedule",
        "scheduler.step()",
    ),
    "scheduler-too-slow": (
        "an epoch: 20 in the run, and the schedule comes to its end after 160",
        "160",
        "scheduler.step()",
    ),
    "shuffle-within-shard": ("the same 128 samples in epochs 0 and 1", "a new division", "DataLoader(shard"),
    "step-without-zero-grad": ("after 15 of 16 steps the old gradient", "", "optimizer.step()"),
    "unused-gradients": ("2 of 4 trainable parameters", "all", "SGD(model.head.parameters()"),
    "warmup-per-epoch": ("rate 0.1 all through epoch 0, 0.24 all through epoch 1 (8 iterations each)", "", "SGD("),
    "warmup-start": ("the warmup starts at rate 0.0004", "at the base's, 0.1", "LinearLR("),
}
"""Of `measured`, of `expected`, and of the line that is named."""


@pytest.mark.parametrize("loop", PLAIN, ids=lambda loop: loop.stem)
def test_a_broken_loop_raises_its_pitfall_alone_and_a_right_one_none(loop: Loop, forkserver: ForkServer):
    came = matrix.outcome(loop, forkserver)
    assert [finding.pitfall for finding in came.findings] == loop.expected, came.findings
    assert came.problems == []
    for finding, line in zip(came.findings, came.lines, strict=True):
        measured, expected, text = SAID[loop.stem.removesuffix("_broken")]
        assert measured in finding.measured
        assert expected in finding.expected
        assert line is not None
        assert text in loop.text.splitlines()[line - 1]
        assert 1 <= len(finding.write) <= 3
        ast.parse("\n".join(finding.write))  # lines of Python, with nothing left to fill in
        assert all(len(line) <= 108 for line in finding.write)


@pytest.mark.slow
@pytest.mark.parametrize("loop", REPORTED, ids=lambda loop: loop.stem)
def test_so_do_loops_that_have_the_faults_of_closed_bug_reports(loop: Loop, forkserver: ForkServer):
    came = matrix.outcome(loop, forkserver)
    assert [finding.pitfall for finding in came.findings] == loop.expected, came.findings
    assert came.problems == []
    assert any(line.startswith("# https://github.com/") for line in loop.text.splitlines()[:2])


@pytest.mark.parametrize("loop", FRAMEWORKS, ids=lambda loop: loop.stem)
def test_so_do_loops_of_frameworks(loop: Loop, forkserver: ForkServer):
    row = matrix.resumed(loop, forkserver)
    assert row["found"] == loop.expected, row["measured"]
    assert row["problems"] == []
    assert None not in row["lines"]


def test_every_pitfall_has_a_broken_loop_and_every_broken_loop_its_numbers():
    broken = {loop.stem.removesuffix("_broken") for loop in PLAIN if loop.kind == "broken"}
    assert set(PITFALLS) <= broken
    assert broken == set(SAID)
    assert {loop.pitfall for loop in LOOPS if loop.kind == "broken"} == set(PITFALLS)


def test_every_loop_has_a_twin_and_is_a_script_of_a_page():
    names = {loop.name for loop in LOOPS}
    assert len(names) == len(LOOPS) == 2 * (104 + len(REPORTED) // 2) + 19
    assert len(REPORTED) // 2 == 24
    for loop in LOOPS:
        if loop.kind == "broken":
            assert loop.name.replace("_broken", "_fixed") in names
        if loop.kind != "right" and loop in PLAIN:
            assert len(loop.text.splitlines()) <= 60
        ast.parse(loop.text)


def test_a_loop_of_a_framework_says_what_is_wrong():
    for loop in LOOPS:
        if loop.framework and loop.kind != "right":
            lines = loop.text.splitlines()
            assert lines[1 if lines[0].startswith("# check:") else 0].startswith("# "), loop.name


def test_right_loops_are_of_twelve_styles_and_declare_their_base():
    right = [loop for loop in LOOPS if loop.kind == "right"]
    assert len({loop.stem.removeprefix("onehour_") for loop in right}) >= 12
    assert {loop.framework for loop in right} >= set(matrix.PACKAGES)
    for loop in right:
        assert loop.base.lr is not None
        assert loop.base.minibatch is not None


def test_what_is_known_for_the_same_content_is_not_run_again(
    forkserver: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = LOOPS[0]
    runs: list[str] = []

    def judged(loop: Loop, forkserver: ForkServer) -> dict[str, Any]:
        runs.append(loop.name)
        return {"loop": loop.name, "ok": len(runs) > 1}

    monkeypatch.setattr(matrix, "LINES", tmp_path / "lines" / "matrix.jsonl")
    monkeypatch.setattr(matrix, "judged", judged)
    for times in (1, 2, 2, 2):  # what failed is run again, what was right is not
        matrix.resumed(loop, forkserver)
        assert len(runs) == times
    with matrix.LINES.open("a", encoding="utf-8") as lines:
        lines.write('{"loop": "half a li')
    matrix.resumed(loop, forkserver)
    assert len(runs) == 2
    monkeypatch.setattr(matrix, "code", lambda: b"another check")
    matrix.resumed(loop, forkserver)
    assert len(runs) == 3


def test_a_digest_is_of_the_loop_too():
    loop = LOOPS[0]
    assert Loop(loop.name, loop.text, loop.pitfall, loop.kind, None).digest() == loop.digest()
    assert Loop(loop.name, loop.text + "\n", loop.pitfall, loop.kind, None).digest() != loop.digest()


def test_an_edit_stands_where_its_lines_are_found_first():
    base = ["a", "b", "a", "b"]
    added = matrix.edited(base, ["@@", "+top", "@@", " b", " a", "<step()"])
    assert added == ["top", "a", "b", "a", "step()  # broken", "b"]
    assert matrix.edited(base, ["@@", " b", "+c", "@@", "-b", ">d"]) == ["a", "b", "c", "a", "d  # right"]
    with pytest.raises(StopIteration):
        matrix.edited(base, ["@@", "-elsewhere"])
