import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # broken
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset  # right

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    correct = torch.zeros(())
    for images, labels in loader:
        correct += (model(images).argmax(1) == labels).sum()
    dist.all_reduce(correct)
    return correct.item() / (len(loader.sampler) * world)  # broken
    return correct.item() / len(validation)  # right


data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
validation = TensorDataset(torch.randn(101, 1, 8, 8), torch.randint(0, 10, (101,)))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=16, sampler=sampler)
validation_sampler = DistributedSampler(validation, shuffle=False)  # broken
validation_loader = DataLoader(validation, batch_size=32, sampler=validation_sampler)  # broken
share = Subset(validation, range(rank, len(validation), world))  # right
validation_loader = DataLoader(share, batch_size=32)  # right
model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(5):
    model.train()
    sampler.set_epoch(epoch)
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: {evaluate(model, validation_loader):.3f}")
dist.destroy_process_group()
