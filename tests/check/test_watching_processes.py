"""Watching on two processes: every one of them gets the findings of all, and none waits for another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("forked")

SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
import onehour.check

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 1, 6, 6), torch.arange(64) % 5)


def average(net):
    for statistic in (net[1].running_mean, net[1].running_var):
        dist.all_reduce(statistic)
        statistic /= world


def run(*, shared, averaged, window=1):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    model = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    sampler = DistributedSampler(data) if shared else None
    with onehour.check.watch(model, optimizer, base_lr=0.1, base_minibatch=8 * window) as report:
        loader = DataLoader(data, batch_size=8, sampler=sampler, shuffle=sampler is None)
        for epoch in range(3):
            if sampler is not None:
                sampler.set_epoch(epoch)
            model.train()
            for i, (x, y) in enumerate(loader):
                if (i + 1) % window:
                    with model.no_sync():
                        (F.cross_entropy(model(x), y) / window).backward()
                    continue
                (F.cross_entropy(model(x), y) / window).backward()
                optimizer.step()
                optimizer.zero_grad()
            if averaged:
                average(net)
            model.eval()
            with torch.no_grad():
                net(data.tensors[0])
    return {f.pitfall: f.measured for f in report.findings}


said = [run(shared=True, averaged=True), run(shared=True, averaged=True, window=2)]
torch.manual_seed(rank)  # or else both would see the same in the same order
said.append(run(shared=False, averaged=False))
with open(sys.argv[1] + str(rank), "w") as file:
    json.dump(said, file)
dist.destroy_process_group()
"""


def test_two_processes_get_the_findings_of_both(port: int, tmp_path: Path):
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "said")]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2))
    assert first == second
    right, accumulated, wrong = first
    assert right == {"no-warmup": "the first iteration has rate 0.2"}
    assert accumulated == right
    assert set(wrong) == {"no-warmup", "overlapping-shards", "batchnorm-stats-diverge"}
    assert wrong["overlapping-shards"].startswith("2 processes take 128 samples an epoch, 64 of them different")
