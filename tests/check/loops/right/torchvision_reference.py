# check: --base-lr 0.1 --base-minibatch 32
# torchvision's reference: MetricLogger, set_weight_decay by layer, warmup and decay in one SequentialLR of steps.
import os
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

BATCH_SIZE, EPOCHS, WARMUP_EPOCHS, LR, WEIGHT_DECAY = 32, 4, 1, 0.1, 1e-4


class SmoothedValue:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def update(self, value, n=1):
        self.total, self.count = self.total + value * n, self.count + n

    def synchronize_between_processes(self):
        if dist.is_initialized():
            t = torch.tensor([self.count, self.total], dtype=torch.float64)
            dist.all_reduce(t)
            self.count, self.total = int(t[0]), t[1].item()

    @property
    def global_avg(self):
        return self.total / self.count


class MetricLogger:
    def __init__(self):
        self.meters = defaultdict(SmoothedValue)

    def log_every(self, iterable, print_freq, header):
        for i, obj in enumerate(iterable):
            yield obj
            if i % print_freq == 0:
                print(f"{header} [{i}/{len(iterable)}]")


def set_weight_decay(model):
    groups = {"norm": [], "other": []}
    for module in model.modules():
        groups["norm" if isinstance(module, _BatchNorm) else "other"] += module.parameters(recurse=False)
    return [{"params": groups["other"], "weight_decay": WEIGHT_DECAY}, {"params": groups["norm"], "weight_decay": 0.0}]


def train_one_epoch(model, criterion, optimizer, lr_scheduler, data_loader, epoch):
    model.train()
    metric_logger = MetricLogger()
    for image, target in metric_logger.log_every(data_loader, 5, f"Epoch: [{epoch}]"):
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        metric_logger.meters["loss"].update(loss.item(), n=image.shape[0])


def evaluate(model, criterion, data_loader):
    model.eval()
    metric_logger = MetricLogger()
    with torch.inference_mode():
        for image, target in metric_logger.log_every(data_loader, 5, "Test: "):
            output = model(image)
            acc1 = (output.argmax(1) == target).float().mean() * 100
            metric_logger.meters["loss"].update(criterion(output, target).item(), n=image.shape[0])
            metric_logger.meters["acc1"].update(acc1.item(), n=image.shape[0])
    for meter in metric_logger.meters.values():
        meter.synchronize_between_processes()
    print(f"Test: Acc@1 {metric_logger.meters['acc1'].global_avg:.3f}")


def main():
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ:
        dist.init_process_group(backend="gloo")
    images = torch.randn(512 + 99, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = (images[:, 1].mean((1, 2)) > 0).long()
    dataset, dataset_test = TensorDataset(images[:512], labels[:512]), TensorDataset(images[512:], labels[512:])
    train_sampler = DistributedSampler(dataset) if dist.is_initialized() else RandomSampler(dataset)
    test_sampler = range(rank, len(dataset_test), world_size)  # exact: nothing is repeated
    data_loader = DataLoader(dataset, batch_size=BATCH_SIZE, sampler=train_sampler)
    data_loader_test = DataLoader(dataset_test, batch_size=BATCH_SIZE, sampler=test_sampler)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    model = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if dist.is_initialized() else net
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(set_weight_decay(net), lr=LR * world_size, momentum=0.9, nesterov=True)
    warmup, steps = WARMUP_EPOCHS * len(data_loader), EPOCHS * len(data_loader)
    warmup_lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / world_size, total_iters=warmup)
    main_lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup_lr_scheduler, main_lr_scheduler], [warmup])
    for epoch in range(EPOCHS):
        if dist.is_initialized():
            train_sampler.set_epoch(epoch)
        train_one_epoch(model, criterion, optimizer, lr_scheduler, data_loader, epoch)
        if dist.is_initialized():
            for module in net.modules():
                if isinstance(module, _BatchNorm):
                    dist.all_reduce(module.running_mean.div_(world_size))
                    dist.all_reduce(module.running_var.div_(world_size))
        evaluate(net, criterion, data_loader_test)


if __name__ == "__main__":
    main()
