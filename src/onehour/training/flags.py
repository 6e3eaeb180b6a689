"""What the host learns of an iteration on the device, without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostFlags"]


class HostFlags:
    """Two booleans an iteration: a stop was asked for, the run has halted.

    On the CPU they are read at once. On CUDA they are copied behind the iteration and read one iteration later, so that
    the device always has work; every process reads the same iteration's, so all act alike.

    >>> flags = HostFlags(torch.device("cpu"))
    >>> flags.read(torch.tensor(0.0), torch.tensor(1.0))
    (False, True)
    """

    def __init__(self, device: torch.device) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._cuda = device.type == "cuda"
        self.late = int(self._cuda)
        """How many iterations ago what is told may have been."""

    def read(self, stop: Tensor, halted: Tensor, *, now: bool = False) -> tuple[bool, bool]:
        """(stop asked, halted) of this iteration; on CUDA of the one before, unless `now`.

        >>> HostFlags(torch.device("cpu")).read(torch.tensor(2.0), torch.tensor(0.0))
        (True, False)
        """
        if not self._cuda:
            return stop.item() > 0, halted.item() > 0
        earlier, self._pending = self._pending, self._copy(stop, halted)
        chosen = self._pending if now else earlier
        if chosen is None:
            return False, False
        chosen[1].synchronize()
        return bool(chosen[0][0]), bool(chosen[0][1])

    def _copy(self, stop: Tensor, halted: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        on_host = torch.empty(2, dtype=torch.bool, pin_memory=True)
        on_host.copy_(torch.stack((stop > 0, halted > 0)), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event
