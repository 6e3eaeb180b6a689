"""Remedies in loops as others write them: mended where the place is sure, left with the reason where it is not."""

import subprocess
from pathlib import Path

import pytest

from onehour.check.case import Base
from onehour.check.runner import Nursery, check_script

HEAD = """\
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""
WITH_BATCHNORM = HEAD.replace("nn.Flatten(),", "nn.Flatten(), nn.BatchNorm1d(64),")
LOOP = """\
for epoch in range(10):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
"""
DDP = """\
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

def train(model, loader, optimizer, criterion):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()

@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    counts = torch.zeros(2)
    for images, labels in loader:
        counts += torch.stack([(model(images).argmax(1) == labels).sum(), torch.tensor(len(labels))])
    dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()

def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, y = torch.randn(357, 1, 8, 8), torch.randint(0, 10, (357,))
    data, val = TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    val_loader = DataLoader(val, batch_size=16, sampler=range(dist.get_rank(), 101, dist.get_world_size()))
    model = DDP(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        train(model, loader, optimizer, nn.CrossEntropyLoss())
        print(epoch, evaluate(model, val_loader))
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""
BASE = Base(0.1, 8)


def changed(text: str, *edits: tuple[str, str]) -> str:
    """A script with its fault."""
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


SCALER = ("        optimizer.step()", "        scaler.step(optimizer)\n        scaler.update()")
SCALED = ("        loss.backward()", "        scaler.scale(loss).backward()")
MAKE_SCALER = ("for epoch in", "scaler = torch.amp.GradScaler('cpu')\nfor epoch in")
WINDOW = "        if (i + 1) % 4 == 0:\n            optimizer.step()\n            optimizer.zero_grad()"
GATHERED = [
    ("        optimizer.zero_grad()\n", ""),
    ("for images, labels in loader", "for i, (images, labels) in enumerate(loader)"),
    ("        optimizer.step()", WINDOW),
]
OWN_SAMPLER = ("sampler=sampler)", "sampler=DistributedSampler(data))")

MENDED = {
    "accumulation-not-divided, a scaler's": (
        changed(
            HEAD + LOOP, *GATHERED, SCALED, MAKE_SCALER, ("optimizer.step()", "scaler.step(optimizer); scaler.update()")
        ),
        ["+        scaler.scale(loss / 4).backward()"],
        Base(),
    ),
    "accumulation-tail, thrown away": (
        changed(
            HEAD + LOOP,
            *GATHERED,
            ("loss.backward()", "(loss / 4).backward()"),
            ("torch.randn(256", "torch.randn(224"),
            ("10, (256,", "10, (224,"),
        ),
        [
            "+        (loss / min(4, len(loader) - i + i % 4)).backward()",
            "+        if (i + 1) % 4 == 0 or i + 1 == len(loader):",
        ],
        Base(),
    ),
    "batchnorm-n-changed": (
        WITH_BATCHNORM + LOOP,
        ["+import onehour", "+model = onehour.convert_batchnorm(model, per_worker=16)"],
        Base(per_worker=16),
    ),
    "decay-decoupled-scales-with-lr, of a declared base": (
        (Path(__file__).parent / "loops" / "decay-decoupled-scales-with-lr_broken.py").read_text(encoding="utf-8"),
        ["lr=lr, momentum=0.9, weight_decay=0.0001 * 32 / 16)"],
        Base(0.1, 16, None, 1e-4),
    ),
    "decay-in-loss, in the loss's line": (
        changed(HEAD + LOOP, ("labels)\n", "labels) + 1e-4 * sum((p ** 2).sum() for p in model.parameters())\n")),
        ["+        loss = F.cross_entropy(model(images), labels)", "lr=0.1, momentum=0.9, weight_decay=0.0002)"],
        Base(),
    ),
    "decay-on-batchnorm, of all parameters": (
        changed(WITH_BATCHNORM + LOOP, ("momentum=0.9", "momentum=0.9, weight_decay=5e-4")),
        ["+optimizer = torch.optim.SGD(onehour.parameter_groups(model, weight_decay=5e-4), lr=0.1, momentum=0.9)"],
        Base(),
    ),
    "double-step, the plain one first": (
        changed(HEAD + LOOP, SCALED, MAKE_SCALER, (SCALER[0], f"{SCALER[0]}\n{SCALER[1]}")),
        ["-        optimizer.step()"],
        Base(),
    ),
    "loss-scaled-by-world-size, in place": (
        changed(DDP, ("        loss.backward()", "        loss *= dist.get_world_size()\n        loss.backward()")),
        ["-        loss *= dist.get_world_size()"],
        Base(),
    ),
    "lr-not-scaled, drops at epochs, no warmup": (
        changed(
            HEAD + LOOP,
            (
                "for epoch in range(10)",
                "scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 8])\nfor epoch in range(10)",
            ),
        )
        + "    scheduler.step()\n",
        [
            "+optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * 32 / 8, momentum=0.9)",
            "+warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=8 / 32, ",
            "+        warmup.step()",
        ],
        BASE,
    ),
    "overlapping-shards, in functions": (
        changed(DDP, ("sampler=sampler)", "shuffle=True)"), ("        sampler.set_epoch(epoch)\n", "")),
        ["sampler=torch.utils.data.DistributedSampler(data))", "+        loader.sampler.set_epoch(epoch)"],
        Base(),
    ),
    "padded-evaluation, counted over processes": (
        changed(DDP, ("sampler=range(dist.get_rank(), 101, dist.get_world_size())", "sampler=DistributedSampler(val)")),
        ["sampler=range(dist.get_rank(), len(val), dist.get_world_size()))"],
        Base(),
    ),
    "same-order-every-epoch, not shuffled": (
        changed(HEAD + LOOP, (", shuffle=True", "")),
        ["+loader = DataLoader(data, batch_size=32, shuffle=True)"],
        Base(),
    ),
    "same-order-every-epoch, a sampler without a name and an epoch without one": (
        changed(
            DDP,
            OWN_SAMPLER,
            ("        sampler.set_epoch(epoch)\n", ""),
            ("print(epoch, ", "print("),
            ("for epoch", "for _"),
        ),
        ["+    for epoch in range(5):", "+        loader.sampler.set_epoch(epoch)"],
        Base(),
    ),
    "scheduler-never-steps, planned in updates": (
        changed(
            HEAD + LOOP,
            (
                "for epoch",
                "scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * len(loader))\nfor epoch",
            ),
        ),
        ["+        scheduler.step()"],
        Base(),
    ),
    "step-without-zero-grad, a scaler's": (
        changed(HEAD + LOOP, SCALED, MAKE_SCALER, SCALER, ("        optimizer.zero_grad()\n", "")),
        ["+        optimizer.zero_grad()"],
        Base(),
    ),
    "unused-gradients, cleared too early": (
        changed(
            HEAD + LOOP,
            ("        optimizer.zero_grad()\n", ""),
            ("        optimizer.step()", "        optimizer.zero_grad()\n        optimizer.step()"),
        ),
        ["-        optimizer.step()", "+        optimizer.step()"],
        Base(),
    ),
}
QUICK = ("accumulation-tail", "batchnorm-n-changed", "lr-not-scaled", "same-order-every-epoch, a", "unused-gradients")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.slow) for name in MENDED]
)
def test_a_variant_is_mended(name: str, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text, expected, base = MENDED[name]
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(text, encoding="utf-8")
    before = check_script(script, base=base, nursery=nursery, limit=60)
    assert [finding.pitfall for finding in before.findings] == [name.partition(",")[0]]
    assert before.patch.left == []
    for part in expected:
        assert part in before.patch.diff
    (tmp_path / "x.diff").write_text(before.patch.diff, encoding="utf-8")
    subprocess.run(["git", "apply", "x.diff"], cwd=tmp_path, check=True)
    after = check_script(script, base=base, nursery=nursery, limit=60)
    assert [(finding.pitfall, finding.measured) for finding in after.findings] == []


LEFT = {
    "several statements in a line": (
        changed(
            HEAD + LOOP,
            (
                "        loss.backward()\n        optimizer.step()",
                "        loss.backward(); optimizer.step(); optimizer.step()",
            ),
        ),
        "several",
    ),
    "a sampler of one's own": (
        changed(HEAD + LOOP, ("shuffle=True", "sampler=list(range(256))")),
        "the sampler is one of the loop's own",
    ),
    "options that are unpacked": (
        changed(
            HEAD + LOOP,
            ("batch_size=32, shuffle=True", "**options"),
            ("loader =", "options = {'batch_size': 32}\nloader ="),
        ),
        "shuffle may be among the arguments that line 8 unpacks",
    ),
    "a scheduler that the step's function does not know": (
        "EPOCHS = 20\n"
        + changed(HEAD, ("optimizer =", "opt ="))
        + "def make():\n    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=EPOCHS * len(loader))\n"
        "def train(optimizer):\n    for images, labels in loader:\n        optimizer.zero_grad()\n"
        "        F.cross_entropy(model(images), labels).backward()\n        optimizer.step()\n"
        "def main(scheduler):\n    for epoch in range(EPOCHS):\n        train(opt)\n        scheduler.step()\n"
        "main(make())\n",
        "scheduler is not known where it would be needed",
    ),
}


ADJUST = """\
def adjust_learning_rate(optimizer, epoch):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * 0.1 ** (epoch // 30)
"""
CALLED = ("    model.train()\n", "    adjust_learning_rate(optimizer, epoch)\n    model.train()\n")
LINEAR = "torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=5 * len(loader))"
RAMP = ("optimizer.step()\n", "optimizer.step()\n        warmup.step()\n")
BY_HAND = {
    "lr-not-scaled": (HEAD + ADJUST + changed(LOOP, CALLED), "", "train.py:12 sets the rate itself"),
    "lr-not-scaled, in another file": (
        HEAD + "from rates import *\n" + changed(LOOP, CALLED),
        ADJUST,
        "rates.py:3 sets the rate itself",
    ),
    "lr-not-scaled, in another way": (
        HEAD + changed(LOOP, ("    model.train()\n", "    optimizer.param_groups[0].update(lr=0.1 / (1 + epoch))\n")),
        "",
        "the rate is set by something other than torch's schedulers",
    ),
    "no-warmup": (
        HEAD + ADJUST.replace("0.1 * ", "0.4 * ") + changed(LOOP, CALLED),
        "",
        "train.py:12 sets the rate itself",
    ),
    "warmup-start": (
        changed(HEAD, ("lr=0.1", "lr=0.4"))
        + f"warmup = {LINEAR}\n"
        + changed(LOOP, RAMP)
        + "    if epoch > 6:\n        for group in optimizer.param_groups:\n            group['lr'] *= 0.5\n",
        "",
        "train.py:21 sets the rate itself",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rate_that_the_loop_sets_itself_is_left(name: str, nursery: Nursery, tmp_path: Path):
    text, beside, reason = BY_HAND[name]
    script = tmp_path / "train.py"
    script.write_text(text, encoding="utf-8")
    (tmp_path / "rates.py").write_text(beside, encoding="utf-8")
    checked = check_script(script, base=BASE, nursery=nursery, limit=60, only=[name.partition(",")[0]])
    assert checked.patch.diff == ""
    (said,) = checked.patch.left
    assert reason in said


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_sure_is_left_and_said(name: str, nursery: Nursery, tmp_path: Path):
    text, reason = LEFT[name]
    script = tmp_path / "train.py"
    script.write_text(text, encoding="utf-8")
    checked = check_script(script, nursery=nursery, limit=60)
    assert len(checked.findings) == 1
    assert checked.patch.diff == ""
    (said,) = checked.patch.left
    assert reason in said
