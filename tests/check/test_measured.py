"""What is said of every plain broken loop: its numbers, and the line that it names.

The numbers were computed by hand from the scripts: counts and rates from their constants, the others by running them
with the two terms written out in float64. Of 90 validation samples the batches have 2, 5 and 2 right of 32, 32 and 26:
9 of 90, and 100·(2/32 + 5/32 + 2/26)/3 as the mean of the rates. |m·v + η·g − (m·(η′/η)·v + η′·g)| is at most 4.98 %
of the right update, and 4.93 % for a velocity that is scaled without need. ‖μ₁ − μ₀‖/‖μ₀‖ is 0.762 at the first
evaluation. A sample of 5, of which the window's gradient takes a half as of 16, weighs 16/5 times as much.
"""

from pathlib import Path
from types import ModuleType

import pytest

from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import ForkServer

LOOPS = Path(__file__).parent / "loops"

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
    "momentum-inside-uncorrected": (
        "from 0.115 to 0.1225; that update lies 5 % from eq 10",
        "× 1.07",
        "optimizer.step()",
    ),
    "momentum-outside-corrected": ("from 0.1 to 0.1075; that update lies 4.9 % from eq 9", "× 1", "optimizer.step()"),
    "no-warmup": ("the first iteration has rate 0.4", "0.1 at first, 0.4 after 5 epochs", "SGD("),
    "overlapping-shards": ("2 processes take 512 samples an epoch, 256 of them", "256 samples", "shuffle=True"),
    "padded-evaluation": ("102 samples are evaluated, 1 of them twice", "101 samples", "sampler=validation_sampler"),
    "padded-training-data": ("an epoch takes 256 samples, 1 of them twice", "255 samples", "sampler=sampler"),
    "same-augmentation-on-every-worker": ("torch's generator is in the same state on all 2", "", "DataLoader("),
    "same-order-every-epoch": ("epochs 0 and 1 take their 256 samples in one order", "", "sampler=sampler"),
    "scheduler-never-steps": ("0 steps of StepLR in 2 epochs; the rate stays 0.1", "", "StepLR("),
    "scheduler-steps-k-times": ("4 scheduler steps an update: the schedule of 40", "40 in the run", "scheduler.step()"),
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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SAID)
def test_the_numbers_are_right_and_the_line_is_the_user_s(
    name: str, matrix: ModuleType, forkserver: ForkServer, tmp_path: Path
):
    path = LOOPS / f"{name}_broken.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    (finding,) = check_script(path, base=matrix.base_of(path), forkserver=forkserver, cwd=tmp_path).findings
    measured, expected, line = SAID[name]
    assert measured in finding.measured
    assert expected in finding.expected
    file, _, number = (finding.where or "").rpartition(":")
    assert Path(file) == path
    assert line in lines[int(number) - 1]


def test_every_plain_broken_loop_is_here():
    assert {path.stem.removesuffix("_broken") for path in LOOPS.glob("*_broken.py")} == set(SAID)
