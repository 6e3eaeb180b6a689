# check: --base-lr 0.1 --base-minibatch 16
# An IterableDataset that shards itself: one permutation an epoch, dealt to processes and their loaders' processes.
import os
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
BATCH, EPOCHS, WARMUP, BASE_LR = 16, 4, 1, 0.1


class Stream(IterableDataset):
    """Records of a file that can only be read one after another, as far as the loop is concerned."""

    def __init__(self, x, seed):
        self.x, self.seed, self.epoch = x, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        share = islice(order, RANK, None, WORLD)
        info = get_worker_info()
        if info is not None:
            share = islice(share, info.id, None, info.num_workers)
        for index in share:
            yield self.x[index], int(self.x[index].mean() > 0)

    def __len__(self):
        return len(self.x) // WORLD


def main():
    if WORLD > 1:
        dist.init_process_group("gloo")
    x = torch.randn(256 + 63, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    stream, held_out = Stream(x[:256], seed=11), x[256:]
    loader = DataLoader(stream, batch_size=BATCH)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    model = DistributedDataParallel(net, broadcast_buffers=False) if WORLD > 1 else net
    norm, rest = list(net[1].parameters()), [*net[0].parameters(), *net[4].parameters()]
    target = BASE_LR * BATCH * WORLD / 16
    optimizer = torch.optim.SGD([{"params": rest, "weight_decay": 1e-4}, {"params": norm}], lr=target, momentum=0.9)

    for epoch in range(EPOCHS):
        stream.set_epoch(epoch)
        model.train()
        for step, (images, labels) in enumerate(loader):
            done = epoch + step / len(loader)
            rate = BASE_LR + (target - BASE_LR) * min(done / WARMUP, 1)
            for group in optimizer.param_groups:
                group["lr"] = rate if done < 3 else 0.1 * rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        if WORLD > 1:
            statistics = torch.stack([net[1].running_mean, net[1].running_var])
            dist.all_reduce(statistics)
            net[1].running_mean.copy_(statistics[0] / WORLD)
            net[1].running_var.copy_(statistics[1] / WORLD)
        net.eval()
        with torch.no_grad():
            mine = held_out[RANK::WORLD]
            wrong = (net(mine).argmax(1) != (mine.mean((1, 2, 3)) > 0).long()).sum()
        if WORLD > 1:
            dist.all_reduce(wrong)
        if RANK == 0:
            print(f"epoch {epoch + 1}: {100 * wrong.item() / len(held_out):.2f} % wrong")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
