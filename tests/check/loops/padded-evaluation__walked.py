import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
x, y = torch.randn(357, 20), torch.randint(0, 10, (357,))
data, validation = TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=16, sampler=sampler)
share = DistributedSampler(validation, shuffle=False)  # broken
share = range(rank, len(validation), world)  # right
model = DistributedDataParallel(nn.Linear(20, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(4):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    counts = torch.zeros(2)
    with torch.no_grad():
        for i in share:
            inputs, label = validation[i]
            counts += torch.tensor([float(model.module(inputs).argmax() == label), 1.0])
    dist.all_reduce(counts)
    print(f"epoch {epoch}: accuracy {counts[0] / counts[1]:.3f}")
dist.destroy_process_group()
