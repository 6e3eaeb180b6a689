# check: --base-lr 0.05 --base-minibatch 8
import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Pairs(Dataset):
    """A pair of one class at even indices, of two classes at odd ones, drawn anew each time."""

    def __init__(self):
        self.x, self.y = torch.randn(64, 4), torch.arange(64) % 4

    def __len__(self):
        return 64

    def __getitem__(self, index):
        i = random.randrange(64)
        while True:
            j = random.randrange(64)
            if bool(self.y[i] == self.y[j]) == (index % 2 == 0):
                return self.x[i], self.x[j], float(index % 2 == 0)


def main():
    loader = DataLoader(Pairs(), batch_size=8)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(4):
        for first, second, same in loader:
            optimizer.zero_grad()
            output = model(torch.cat([first, second], 1)).squeeze(1)
            F.binary_cross_entropy_with_logits(output, same.float()).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
