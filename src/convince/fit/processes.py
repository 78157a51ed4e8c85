"""Several processes under torchrun: shards after the global batch, gradients averaged in flat buckets.

DistributedDataParallel is not used: it fails on heads that a stage does not use and on work that
parts do outside its wrapper.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convince.errors import Mistake
from convince.types import Batch

_BUCKET = 25 * 2**20 // 4  # elements


@dataclass(frozen=True)
class World:
    """This process's number and how many there are."""

    rank: int = 0
    size: int = 1

    def shard(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows of a global batch, groups whole, and their share of it."""
        if self.size == 1:
            return batch, 1.0
        groups = len(batch.index) // batch.group
        if groups < self.size:
            raise Mistake(f"a batch of {groups} cannot be shared by {self.size} processes; use fewer or a larger --batch")
        start, stop = self.rank * groups // self.size, (self.rank + 1) * groups // self.size
        rows = slice(start * batch.group, stop * batch.group)
        return Batch(
            batch.x[rows],
            None if batch.y is None else batch.y[rows],
            batch.index[rows],
            None if batch.weight is None else batch.weight[rows],
            {name: value[rows] for name, value in batch.extra.items()},
            batch.group,
        ), (stop - start) / groups

    def average(self, parameters: Iterable[nn.Parameter], share: float) -> None:
        """Sum the gradients of all processes, each weighted by its share of the batch, in place."""
        if self.size == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=_wire())
        dist.all_reduce(has, dist.ReduceOp.MAX)
        for p, any_has in zip(parameters, has.tolist(), strict=True):
            if any_has and p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad.mul_(share) for p in parameters if p.grad is not None]
        self._sum(grads)

    def _sum(self, tensors: list[Tensor]) -> None:
        bucket: list[Tensor] = []
        for at, tensor in enumerate(tensors):
            bucket.append(tensor)
            last = at + 1 == len(tensors) or tensors[at + 1].dtype != tensor.dtype
            if last or sum(t.numel() for t in bucket) > _BUCKET:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(part.view(t.shape))
                bucket = []

    def average_buffers(self, model: nn.Module) -> None:
        """Batch statistics become the mean of all processes'."""
        if self.size > 1:
            buffers = [b for b in model.buffers() if b.is_floating_point()]
            self._sum([b.div_(self.size) for b in buffers])

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all processes, in rank order; processes may hold different numbers of rows."""
        if self.size == 1:
            return tensor
        home, tensor = tensor.device, tensor.to(_wire())
        count = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        count[self.rank] = len(tensor)
        dist.all_reduce(count)
        padded = tensor.new_zeros((int(count.max()), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded)
        return torch.cat([r[:n] for r, n in zip(rows, count.tolist(), strict=True)]).to(home)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return tensor
        summed = tensor.to(_wire(), copy=True)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def wait(self) -> None:
        """Wait for the others; a process that ends while they still talk takes them down."""
        if self.size > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # a neighbour that is through has closed its side: all have arrived
                dist.barrier()


def _wire() -> str:
    """Where tensors must lie to be sent: nccl moves only what is on the GPU."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def world() -> World:
    """The world torchrun set up (gloo on CPU, nccl on GPU), or a single process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size)
