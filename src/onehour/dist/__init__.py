"""Where workers run and how their sums travel; the only part that calls torch.distributed."""
