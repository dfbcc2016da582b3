"""torch: products and bias in one call, autograd, autocast, nested and distributed tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat.torch
import numpy as np
import torch

from xaffine.backends._memory import Memory
from xaffine.backends.standard import Backend, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

__all__ = ["BACKEND", "Torch"]

# MKL adds the terms of narrow products up one after the other. From so many terms on they are cut into blocks, whose
# products cost little to add up if they have few elements, or if one operand has few columns.
_LONG, _TERMS = 16384, 4096
_SMALL, _FEW = 8192, 16
_INT = {int}


class Torch(Backend):
    """PyTorch, on CPUs and GPUs."""

    name = "torch"
    namespace = "array_api_compat.torch"
    xp = array_api_compat.torch  # at once, since Dynamo traces no importlib.import_module
    halves = ("bfloat16", "float16")
    types = frozenset({torch.Tensor, torch.nn.Parameter})

    @property
    def devices(self) -> list[Any]:
        """The CPU, then the GPUs."""
        return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]

    def missing_on(self, device: Any) -> Collection[str]:
        """A GPU has no products of integers."""
        return ("int8", "int16", "int32", "int64", "uint8") if self.is_gpu(device) else ()

    def from_numpy(self, array: np.ndarray, *, device: Any = None) -> Tensor:
        """Copy: torch refuses negative strides and warns of read-only memory."""
        return self.xp.asarray(np.array(array, order="C"), device=device)

    def over(self, memory: np.ndarray) -> Tensor:
        """Share it: on the host alone."""
        return torch.from_numpy(memory)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        """Turn bfloat16, which NumPy lacks, into float32."""
        tensor = self.whole(array).detach().cpu().resolve_conj().resolve_neg()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # type: ignore[no-any-return]

    def wait(self, array: Tensor) -> None:
        """Wait for the GPU of a tensor."""
        if array.is_cuda:
            torch.cuda.synchronize(array.device)

    def use_full_precision(self) -> None:
        """Forbid TF32, and sums in half precision."""
        torch.set_float32_matmul_precision("highest")
        for half in ("fp16", "bf16"):
            setattr(torch.backends.cuda.matmul, f"allow_{half}_reduced_precision_reduction", False)

    def use_tf32(self) -> None:
        """Allow TF32."""
        torch.set_float32_matmul_precision("high")

    def cast_call(self, name: str, array: Tensor, dtype: str) -> str:
        """Cast by ``to``: torch has no ``astype``."""
        return f"{name}.to(torch.{dtype})"

    def stopwatch(self, device: Any) -> Any:
        """By events in the queue of a GPU."""
        if not self.is_gpu(device):
            return super().stopwatch(device)
        torch.cuda.set_device(device)
        return self._by_events(
            device, lambda: torch.cuda.Event(enable_timing=True), lambda start, end: start.elapsed_time(end)
        )

    def facts(self, array: Any) -> tuple[Any, ...] | None:
        """Dtype, shape, device and layout; only of torch's own types, and not while a compiler traces symbols."""
        if torch.compiler.is_compiling() or type(array) not in self.types or array.is_nested:
            return None
        # Under a tracer, extents are symbols or tensors.
        known = {*map(type, array.shape)} <= _INT
        return (array.dtype, array.shape, array.device, array.layout) if known else None

    def check_operands(self, **operands: Any) -> None:
        """A nested tensor has no shape, or an extent that varies."""
        for name, operand in operands.items():
            if getattr(operand, "is_nested", False):
                msg = (
                    f"{name} must have one extent along each axis, and is a nested tensor. Pass the rows of all its "
                    f"samples, torch.cat({name}.unbind())"
                )
                raise TypeError(msg)
        super().check_operands(**operands)

    def describe(self, array: Tensor) -> str:
        """Of a nested tensor without its shape."""
        return f"a nested tensor of {array.dtype}" if array.is_nested else super().describe(array)

    def device_of(self, array: Tensor) -> Any:
        """The device; of a DTensor its mesh."""
        return getattr(array, "device_mesh", None) or array.device

    def why_not_writable(self, array: Tensor) -> str | None:
        """Ask, and do not try: autograd would count that as a change."""
        # Dynamo cannot trace the question.
        if torch.compiler.is_compiling() or not array.is_inference():
            return None
        return "it was made in torch.inference_mode"

    def can_fill(self, buffers: Sequence[Tensor | None], operands: Sequence[Tensor | None]) -> bool:
        """Only what is not recorded."""
        if any(buffer is not None and self.why_not_writable(buffer) for buffer in buffers):
            return False
        if any(tensor is not None and self.is_recorded(tensor) for tensor in (*buffers, *operands)):
            return False
        return super().can_fill(buffers, operands)

    def memory_of(self, array: Tensor) -> Memory | None:
        """Of a DTensor the part of this process; a meta tensor has none."""
        if hasattr(array, "to_local"):
            array = array.to_local()
        if array.device.type == "meta":
            return None
        size = array.itemsize
        strides = [step * size for step in array.stride()]
        return Memory(array.data_ptr(), array.shape, strides, size, contiguous=array.is_contiguous())

    def reshape(self, array: Tensor, shape: tuple[int, ...]) -> Tensor:
        """All extents are known."""
        return array.reshape(shape)

    def overlaps_itself(self, array: Tensor) -> bool:
        """Not while a compiler traces, which sees no addresses."""
        if torch.compiler.is_compiling() or array.is_contiguous():
            return False
        return super().overlaps_itself(array)

    def is_recorded(self, array: Tensor) -> bool:
        """Whether autograd or a transform of ``torch.func`` follows what is done with a tensor."""
        return (array.requires_grad and torch.is_grad_enabled()) or _is_wrapped(array)

    def detached(self, array: Tensor) -> Tensor:
        """A tensor that holds no operand alive for autograd."""
        return array.detach() if array.requires_grad else array

    def is_copyable(self, array: Tensor) -> bool:
        """Not what autograd computed: of that a pickle keeps the values, and that a gradient is required."""
        return bool(array.is_leaf)

    def whole(self, array: Tensor) -> Tensor:
        """All of a DTensor, of which each process has a part."""
        return array.full_tensor() if hasattr(array, "full_tensor") else array

    def run(self, step: Callable[..., Result], plan: Any, *arrays: Any) -> Result:
        """Suspend autocast, which rounds the factors of products to half precision."""
        kind = arrays[0].device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # which rejects that device
            with torch.autocast(kind, enabled=False):
                return step(plan, *arrays)
        return step(plan, *arrays)

    def buffer(self, out: Tensor, shape: tuple[int, ...] | None, dtype: Any) -> Tensor | None:
        """A view, if there is one."""
        if out.dtype != dtype or type(out) not in self.types:
            return None
        try:
            return out if shape is None else out.view(shape)
        except RuntimeError:  # a reshape would copy it
            return None

    def product(self, a: Tensor, c: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The bias within the product."""
        if _adds_up_term_by_term(a, c):
            y = self.matmul(a, c)
            y = y.contiguous() if bias is None else y + bias
            return y if out is None else out.copy_(y)
        if bias is None and (out is not None or len(a) <= 32 * c.shape[1]):
            return torch.mm(a, c, out=out)
        dense = a.layout is torch.strided and c.layout is torch.strided
        if bias is None:
            if dense and a.stride(0) == 1 < a.stride(1):  # the wide operand second: its product is the faster one
                return torch.mm(c.mT, a.mT).mT.contiguous()
            return torch.mm(a, c)
        if not dense:
            return torch.mm(a, c) + bias  # sparse: addmm does without some of them
        return torch.addmm(bias, a, c, out=out)

    def sum_rows(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """In the dtype of the matrix: torch adds halves up in float32."""
        return torch.sum(a, 0, dtype=a.dtype, out=out)

    @staticmethod
    def transposed(matrix: Tensor) -> Tensor:
        """Of a compressed sparse matrix, too."""
        return matrix.mT

    def matmul(self, a: Tensor, c: Tensor) -> Tensor:
        """In blocks of terms, where MKL would add them up one after the other."""
        if not _adds_up_term_by_term(a, c):
            return self.xp.matmul(a, c)
        if a.shape[-2] > c.shape[-1]:  # the wide operand second: its product is the faster one
            return self.matmul(c.mT, a.mT).mT
        rows, whole = a.mT, a.shape[-1] // _TERMS * _TERMS
        first, second = (
            each[..., :whole, :].reshape(*each.shape[:-2], whole // _TERMS, _TERMS, each.shape[-1])
            for each in (rows, c)
        )
        parts = torch.matmul(first.mT, second)
        rest = torch.matmul(a[..., whole:], c[..., whole:, :])
        return self.sum(parts, parts.ndim - 3, parts.dtype) + rest

    def sum(self, array: Tensor, axis: int, dtype: Any) -> Tensor:
        """Of a DTensor the parts, where they are."""
        if hasattr(array, "device_mesh"):
            return self.xp.sum(array, axis=axis, dtype=dtype)
        return super().sum(array, axis, dtype)


def _adds_up_term_by_term(a: Tensor, c: Tensor) -> bool:
    """Whether a c would be a running sum of many terms: MKL's products of narrow operands are."""
    n, m, terms = a.shape[-2], c.shape[-1], a.shape[-1]
    if terms <= _LONG or n * m == 0 or (n * m > _SMALL and min(n, m) >= _FEW) or a.device.type != "cpu":
        return False
    dense = a.layout == c.layout == torch.strided and not hasattr(a, "device_mesh")
    return dense and (a.dtype.is_floating_point or a.dtype.is_complex) and not Backend.is_half(a.dtype)


def _is_wrapped(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # within vmap, grad or jvp it has no memory of its own
        return True
    return False


BACKEND = Torch()
