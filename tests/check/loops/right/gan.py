# check: --base-lr 2e-4 --base-minibatch 32
# As PyTorch's DCGAN example: two networks, two optimizers; each clears its own gradients right before its own passes.
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

nz, batch_size, epochs, lr = 4, 32, 3, 2e-4
torch.manual_seed(999)
dataset = TensorDataset(torch.randn(256, 8) + 3)
dataloader = DataLoader(dataset, batch_size=batch_size, shuffle=True)

net_d = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
net_g = nn.Sequential(nn.Linear(nz, 16), nn.ReLU(), nn.Linear(16, 8))
criterion = nn.BCEWithLogitsLoss()
optimizer_d = torch.optim.Adam(net_d.parameters(), lr=lr, betas=(0.5, 0.999))
optimizer_g = torch.optim.Adam(net_g.parameters(), lr=lr, betas=(0.5, 0.999))

for epoch in range(epochs):
    for (real,) in dataloader:
        ones, zeros = torch.ones(real.size(0)), torch.zeros(real.size(0))
        net_d.zero_grad()
        err_d_real = criterion(net_d(real).view(-1), ones)
        err_d_real.backward()
        fake = net_g(torch.randn(real.size(0), nz))
        err_d_fake = criterion(net_d(fake.detach()).view(-1), zeros)
        err_d_fake.backward()
        optimizer_d.step()
        net_g.zero_grad()
        err_g = criterion(net_d(fake).view(-1), ones)
        err_g.backward()
        optimizer_g.step()
    print(f"epoch {epoch}: Loss_D {err_d_real.item() + err_d_fake.item():.4f} Loss_G {err_g.item():.4f}")
