"""A CUDA device that is not there: real numbers in CPU memory, under CUDA's rules, for machines without one.

Within `SimulatedGpu()` a program sees one GPU or several: `.device`, `.is_cuda`, `device=`, `.to`, `torch.cuda`,
autocast, streams, events, graphs. Every tensor is a CPU tensor; a tag on its storage says that it lies "on the GPU".
What a GPU would refuse raises. What would make the host wait is counted, with the line that did it. What would be a
race, between streams or between the host and a copy in flight, is a fault. Results are the CPU's own, so that a run
can be compared with one on the CPU.

It does not know what kernels compute on a GPU (those of our own are not used on it), what cuDNN and NCCL do by
themselves, or several threads.
"""

from .device import SimulatedGpu
from .streams import GpuError

__all__ = ["GpuError", "SimulatedGpu"]
