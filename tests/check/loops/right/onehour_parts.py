# check: --base-lr 0.1 --base-minibatch 16 --base-per-worker 8
# A loop of one's own from onehour's parts: its stream, its rates, ghost BatchNorm, its groups; sums divided once by kn.
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import onehour

EPOCHS, PER_WORKER, HOSTED = 4, 8, 2
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world > 1:
    dist.init_process_group("gloo")

minibatch = onehour.Minibatch(per_worker=PER_WORKER, workers=HOSTED * world)
images = torch.randn(250, 3, 8, 8, generator=torch.Generator().manual_seed(0))
labels = (images.mean((1, 2, 3)) > 0).long()
sampler = onehour.StreamBatchSampler(200, minibatch, seed=0, epochs=EPOCHS)  # 12.5 or 6.25 iterations an epoch
loader = DataLoader(TensorDataset(images[:200], labels[:200]), batch_sampler=sampler)

torch.manual_seed(0)  # the same weights on every process: there is no DDP here to make them equal
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
net = onehour.convert_batchnorm(onehour.init_weights_(net), per_worker=PER_WORKER)
lr = onehour.linear_scaling(0.1, 16, minibatch)
schedule = onehour.gradual_warmup(onehour.step_decay(lr, [2, 3]), start_lr=0.1, epochs=1)
optimizer = torch.optim.SGD(onehour.parameter_groups(net, weight_decay=1e-4), lr=lr, momentum=0.9, nesterov=True)
scheduler = onehour.ScheduleLR(optimizer, schedule, samples=200, minibatch=minibatch)

for epoch in range(EPOCHS):
    net.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y, reduction="sum") / minibatch.size
        loss.backward()
        if world > 1:
            for p in net.parameters():
                dist.all_reduce(p.grad)  # a sum of sums: it was divided by kn already
        optimizer.step()
        scheduler.step()
    if world > 1:
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= world
    net.eval()
    with torch.no_grad():
        held_out, truth = images[200:][rank::world], labels[200:][rank::world]
        wrong = (net(held_out).argmax(1) != truth).sum()
    if world > 1:
        dist.all_reduce(wrong)
    if rank == 0:
        print(f"epoch {epoch + 1}: rate {scheduler.get_last_lr()[0]:.4g}, error {2 * wrong.item():.1f} %")
if world > 1:
    dist.destroy_process_group()
