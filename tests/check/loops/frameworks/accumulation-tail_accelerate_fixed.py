# The windows are taken by hand, and each loss is divided by the samples of its window on all processes.
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH = 4, 16


def main():
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    x = torch.randn(352, 20)
    y = (x[:, :5].sum(1) > 0).long()
    train_loader = DataLoader(TensorDataset(x[:288], y[:288]), batch_size=BATCH, shuffle=True)
    eval_loader = DataLoader(TensorDataset(x[288:], y[288:]), batch_size=BATCH)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    for epoch in range(EPOCHS):
        model.train()
        batches = iter(train_loader)
        while window := list(islice(batches, 4)):
            count = accelerator.reduce(torch.tensor(sum(len(targets) for _, targets in window)), "sum").item()
            for i, (inputs, targets) in enumerate(window):
                with accelerator.no_sync(model) if i + 1 < len(window) else nullcontext():
                    loss = F.cross_entropy(model(inputs), targets, reduction="sum") / count
                    accelerator.backward(loss * accelerator.num_processes)  # DDP divides by the processes
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        correct = 0
        for inputs, targets in eval_loader:
            with torch.no_grad():
                predictions = model(inputs).argmax(-1)
            predictions, targets = accelerator.gather_for_metrics((predictions, targets))
            correct += (predictions == targets).sum().item()
        accelerator.print(f"epoch {epoch}: accuracy {correct / len(eval_loader.dataset):.3f}")


if __name__ == "__main__":
    main()
