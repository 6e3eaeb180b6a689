"""A loop with AdamW whose parameters torch's `fully_shard` (FSDP2) divides. What the rules change is marked.

torchrun --nproc-per-node 2 sharded_adamw.py    (random data)
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import onehour  # changed

EPOCHS, SAMPLES, FEATURES, CLASSES, UNLABELLED = 3, 125, 6, 5, -100
BASE_LR = 1e-3
MINIBATCH = onehour.Minibatch(per_worker=2, workers=4)  # changed
ADAM = onehour.adam_scaling(base_minibatch=2, minibatch=MINIBATCH, lr=BASE_LR, weight_decay=0.1)  # changed
SCHEDULE = onehour.gradual_warmup(onehour.step_decay(ADAM["lr"], [2]), start_lr=BASE_LR, epochs=1)  # changed


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(FEATURES, 7), Block(7), Block(7), nn.LayerNorm(7), nn.Linear(7, CLASSES))
    return onehour.init_weights_(net)  # changed


def random_data() -> TensorDataset:
    labels = torch.randint(0, CLASSES, (SAMPLES,)).masked_fill(torch.rand(SAMPLES) < 0.3, UNLABELLED)
    return TensorDataset(torch.randn(SAMPLES, FEATURES), labels)


def train(net: nn.Sequential, data: TensorDataset) -> None:
    for part in (net[1], net[2], net):
        fully_shard(part)
    groups = onehour.parameter_groups(net, weight_decay=ADAM["weight_decay"])  # changed: once they are sharded
    optimizer = torch.optim.AdamW(groups, lr=ADAM["lr"], betas=ADAM["betas"], eps=ADAM["eps"])  # changed
    scheduler = onehour.ScheduleLR(optimizer, SCHEDULE, samples=SAMPLES, minibatch=MINIBATCH)  # changed
    sampler = onehour.StreamBatchSampler(SAMPLES, MINIBATCH, seed=0, epochs=EPOCHS)  # changed
    loader = DataLoader(data, batch_sampler=sampler)  # changed
    for _ in range(EPOCHS):
        for x, y in loader:
            dist.all_reduce(labelled := (y != UNLABELLED).sum())  # changed: those of all processes
            loss = F.cross_entropy(net(x), y, ignore_index=UNLABELLED, reduction="sum") / labelled  # changed
            optimizer.zero_grad()
            (loss * dist.get_world_size()).backward()  # changed: FSDP averages over the processes
            optimizer.step()
            scheduler.step()  # changed


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # each process keeps its shard of the same weights
    train(network(), random_data())
    dist.destroy_process_group()
