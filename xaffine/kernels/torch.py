"""The kernel for torch: products and bias in one call, results written where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from xaffine.kernels import standard

if TYPE_CHECKING:
    from collections.abc import Collection

    Buffers: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

__all__ = ["backward", "forward"]


def forward(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W + b."""
    if b is None:
        return torch.mm(x, W, out=out)
    if x.layout is not torch.strided or W.layout is not torch.strided:
        return torch.mm(x, W) + b  # sparse: addmm does without some of them
    return torch.addmm(b, x, W, out=out)


def backward(
    dy: torch.Tensor, x: torch.Tensor, W: torch.Tensor, wanted: Collection[str], out: Buffers = (None, None, None)
) -> Buffers:
    """dx = dy Wᵀ, dW = xᵀ dy and db = Σ over the batch of dy."""
    dx, dW, db = out
    if long := "W" in wanted and standard.adds_up_all_rows(dy, x):  # first, since it may run out of memory
        total = standard.backward_W(dy, x)
        dW = total.contiguous() if dW is None else dW.copy_(total)
    if "x" in wanted:
        dx = torch.mm(dy, W.mT, out=dx)
    if "W" in wanted and not long:
        # The wide operand second: its product is the faster one.
        tall = dW is None and len(W) > 32 * W.shape[1]
        dW = torch.mm(dy.mT, x).mT.contiguous() if tall else torch.mm(x.mT, dy, out=dW)
    if "b" in wanted:
        db = torch.sum(dy, 0, dtype=dy.dtype, out=db)
    return dx, dW, db
