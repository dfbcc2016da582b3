"""What only torch has: autograd as an oracle and through the layer, compile, vmap, meta, Parameters."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers import assert_fills, case_on, peers
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp, backends
from xaffine._command import clock
from xaffine.backends import torch as module
from xaffine.backends.torch import BACKEND
from xaffine.curvature import affine_double_backward, gauss_newton_vector_product, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.testing import bounds, checks, make_case
from xaffine.testing.cases import worst_error
from xaffine.testing.strategies import cases

pytestmark = pytest.mark.usefixtures("backend")


def autograd(dy: Any, x: Any, W: Any, b: Any, batch: tuple[int, ...]) -> dict[str, Any]:
    """The gradients of torch's own linear layer."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, W, b)]
    flat = leaves[0].reshape(*batch, W.shape[0])
    y = torch.nn.functional.linear(flat, leaves[1].mT, leaves[2])
    wanted = [leaf for leaf in leaves if leaf is not None]
    return dict(zip(("dx", "dW", "db"), torch.autograd.grad(y, wanted, dy), strict=False))


@given(cases(["float32", "float64", "bfloat16", "float16"], mixed=False))
def test_equals_autograd_on_integers(backend: Any, case: Any) -> None:
    dy, x, W, b = case_on(case, backend)
    ours = affine_backward(dy, x, W, b, n_batch_axes=case.n_batch_axes)
    for name, theirs in autograd(dy, x, W, b, case.batch).items():
        assert torch.equal(getattr(ours, name), theirs), name


@given(cases(["float32", "float64"], values="floats", mixed=False))
def test_autograd_keeps_the_same_bounds(backend: Any, case: Any) -> None:
    exact = case.exact()
    for name, theirs in autograd(*case_on(case, backend), case.batch).items():
        assert worst_error(backend.to_numpy(theirs), exact[name])[0] <= 1, name


def test_complex_gradients_are_conjugate_to_those_of_autograd(backend: Any) -> None:
    case = make_case((5, 3), 2, seed=3, dtypes="complex64")
    dy, x, W, b = case_on(case, backend)
    ours = affine_backward(dy.conj(), x, W, b)
    for name, theirs in autograd(dy, x, W, b, case.batch).items():
        assert torch.equal(getattr(ours, name).conj(), theirs), name


def test_autograd_runs_through_the_layer(backend: Any) -> None:
    case = make_case((5, 2, 3), 4, seed=4)
    dy, x, W, b = case_on(case, backend)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    theirs = torch.autograd.grad(affine(*leaves), leaves, dy)
    for ours, grad in zip(affine_backward(dy, x, W, b), theirs, strict=True):
        assert torch.equal(ours, grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
@pytest.mark.parametrize("layout", ["C", "Fortran", "strided"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3), (6,), (0, 6)])
def test_buffers_of_any_layout_are_filled(backend: Any, device: Any, dtype: str, layout: str, shape: Any) -> None:
    if dtype not in backend.dtypes(device):
        pytest.skip("GPUs have no products of integers in torch")
    case = make_case(shape, 4, seed=6, dtypes=dtype)
    dy, x, W, b = case_on(case, backend)
    buffers = []
    for like in (dy, x, W, b):
        wide = torch.full((2, *like.shape, 2), 7, dtype=like.dtype)
        buffer = wide[0, ..., 0] if layout == "strided" else wide[0, ..., 0].contiguous()
        buffers.append(buffer.mT.contiguous().mT if layout == "Fortran" and buffer.ndim > 1 else buffer)
    assert_fills(buffers, AffineLayer(W, b), x, dy)
    exact = case.exact()
    for name, buffer in zip(("y", "dx", "dW", "db"), buffers, strict=True):
        assert worst_error(backend.to_numpy(buffer), exact[name])[0] == 0, name


def test_buffers_of_dtypes_apart_from_that_of_the_products_are_filled(backend: Any) -> None:
    case = make_case((5, 3), 4, seed=0, dtypes=("float32", "float64", "float16", "float32"))
    dy, x, W, b = case_on(case, backend)
    out = torch.zeros_like(x), torch.zeros_like(W), torch.zeros_like(b)
    for gradient, buffer, name in zip(affine_backward(dy, x, W, b, out=out), out, ("dx", "dW", "db"), strict=True):
        assert gradient is buffer
        assert worst_error(backend.to_numpy(buffer), case.exact()[name])[0] == 0, name


class Model(torch.nn.Module):
    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.W, self.b = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.zeros(2))
        self.layer = AffineLayer(self.W, self.b)
        self.y = self.layer(self.first(torch.ones(rows, 3))).detach()


class Masked(AffineLayer):
    """A subclass that keeps a tensor in a slot."""

    __slots__ = ("mask",)


@pytest.mark.parametrize("attribute", ["W", "scale", "mask"])
def test_what_autograd_computed_is_copied_wherever_it_is_kept(attribute: str) -> None:
    layer = Masked(torch.ones(3, 2))
    setattr(layer, attribute, 2 * torch.ones(3, 2, requires_grad=True))
    new = getattr(copy.deepcopy(layer), attribute)
    assert torch.equal(new, torch.full((3, 2), 2.0))
    assert new.is_leaf
    assert new.requires_grad


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),  # noqa: S301 - our own
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_modules_that_hold_a_layer_are_copied_after_a_step(how: str, accumulate: bool) -> None:
    model = Model()
    for _ in range(2):
        model.layer.backward(model.y, accumulate=accumulate)
    new = COPIES[how](model)
    assert new.layer.W is new.W is not model.W
    assert new.layer.b is new.b
    assert new.W.requires_grad
    for name in ("dW", "db"):
        old, gradient = getattr(model.layer, name), getattr(new.layer, name)
        assert torch.equal(gradient, old)
        assert gradient is not old
        assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        new.layer.backward(model.y)


@pytest.mark.parametrize("how", COPIES)
def test_weights_that_autograd_computed_are_copied(how: str) -> None:
    linear = torch.nn.Linear(3, 2)
    layer = AffineLayer(linear.weight.mT, linear.bias * 2)
    layer.more = linear.bias * 3
    layer.forward(torch.ones(4, 3))
    new = COPIES[how]([layer, layer])[1]
    for name in ("W", "b", "more"):
        old, array = getattr(layer, name), getattr(new, name)
        assert torch.equal(array, old)
        assert array.is_leaf
        assert array.requires_grad
        assert array.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
    shared = COPIES[how]([layer, AffineLayer(layer.W)])
    assert shared[0].W is shared[1].W


def test_shallow_copy_shares_weights_and_their_graph() -> None:
    linear = torch.nn.Linear(3, 2)
    layer = AffineLayer(linear.weight.mT, linear.bias)
    layer.backward(layer(torch.ones(4, 3)))
    new = copy.copy(layer)
    assert new.W is layer.W
    assert new.b is linear.bias
    new(torch.ones(4, 3)).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["sum", "gradient"])
def test_sums_keep_no_batch_alive(dtype: Any, first: str) -> None:
    W, b = (torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3, 2), (2,)))
    layer = AffineLayer(W, b)
    batches = []
    for step in range(3):
        x = torch.ones(4, 3, dtype=dtype)
        dy = torch.ones(4, 2, dtype=dtype, requires_grad=True) * 1
        layer.forward(x)
        layer.backward(dy, accumulate=step > 0 or first == "sum")
        batches += [weakref.ref(x), weakref.ref(dy)]
        if step:
            assert layer.dW.grad_fn is layer.db.grad_fn is None
            assert not any(wide.requires_grad for _, wide in layer._sums.values() if wide is not None)
    layer.forward(torch.ones(1, 3, dtype=dtype))
    del x, dy
    assert [batch() for batch in batches] == [None] * 6
    assert (layer.dW.tolist(), layer.db.tolist()) == ([[12, 12]] * 3, [12, 12])


def test_gradients_of_one_backward_can_be_differentiated() -> None:
    layer = AffineLayer(torch.nn.Parameter(torch.ones(3, 2)))
    x = torch.full((4, 3), 2.0, requires_grad=True)
    layer.forward(x)
    dy = torch.ones(4, 2, requires_grad=True)
    layer.backward(dy)
    assert torch.autograd.grad(layer.dW.sum(), dy)[0].tolist() == [[6, 6]] * 4


def test_gradient_that_autograd_follows_is_not_written_into() -> None:
    layer = AffineLayer(torch.ones(3, 2))
    layer.forward(torch.ones(4, 3))
    layer.dW = held = torch.ones(3, 2, requires_grad=True) * 1
    layer.backward(torch.ones(4, 2), accumulate=True)
    assert held.tolist() == [[1, 1]] * 3
    assert layer.dW.tolist() == [[5, 5]] * 3
    assert not layer.dW.requires_grad


def test_overlapping_buffers_are_refused() -> None:
    shared = torch.ones(2, 7)
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        affine(shared[:, :3], torch.ones(3, 4), out=shared[:, 2:6])
    assert affine(shared[:, :3], torch.ones(3, 4), out=shared[:, 3:]).tolist() == [[3] * 4] * 2


def test_buffers_are_not_filled_where_autograd_records() -> None:
    layer = AffineLayer(torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.zeros(2)))
    x, y = torch.ones(4, 3), torch.zeros(4, 2)
    with pytest.raises(TypeError, match=r"out cannot be filled: autograd .* follows W and b.*torch\.no_grad"):
        layer.forward(x, out=y)
    with torch.no_grad():
        assert layer.forward(x, out=y) is y
    recorded = torch.ones(3, 2, requires_grad=True) * 1
    dx = torch.zeros(4, 3)
    with pytest.raises(TypeError, match=r"out's dx and out's dW cannot be filled: .* follows out's dW"):
        affine_backward(y, x, torch.ones(3, 2), out=(dx, recorded, None))
    assert not dx.any()


def test_buffers_are_not_filled_within_a_transform() -> None:
    y = torch.zeros(3)
    with pytest.raises(TypeError, match=r"out cannot be filled: autograd or another transform of torch follows x"):
        torch.vmap(lambda x: affine(x, torch.ones(2, 3), out=y))(torch.ones(4, 2))


def test_rejected_buffers_count_as_unchanged() -> None:
    buffer, w = torch.ones(2, 4), torch.ones(2, 4, requires_grad=True)
    z = (buffer * w).sum()
    with pytest.raises(ValueError, match="dW must have the shape"):
        affine_backward(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3), out=(buffer, torch.zeros(5, 5), None))
    z.backward()
    assert w.grad is not None


def test_sparse_weights_keep_their_meaning() -> None:
    y = affine(torch.ones(2, 3), torch.eye(3).to_sparse(), torch.ones(3))
    assert y.tolist() == [[2] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_autocast_rounds_no_factors(dtype: torch.dtype) -> None:
    """1 + 2⁻¹² is 1 in the half precisions; what the layer computes is of the dtype of its operands in any case."""
    x, W, dy = (torch.full(shape, 1 + 2**-12, dtype=dtype) for shape in ((2, 4), (4, 3), (2, 3)))
    b, real = torch.zeros(3, dtype=dtype), not dtype.is_complex

    def everything() -> list[Any]:
        layer, y, buffers = AffineLayer(W, b), torch.empty(2, 3, dtype=dtype), tuple(map(torch.empty_like, (x, W, b)))
        results = [affine(x, W), affine(x, W, b), affine(x, W, b, out=y), *affine_backward(dy, x, W, b)]
        results += [*affine_backward(dy, x, W, b, out=buffers), *affine_jvp((x, W), (x, W))]
        results += [layer(x), layer.backward(dy), layer.backward(dy, accumulate=True), layer.dW, layer.db]
        results += [*affine_double_backward((x, W, b), dy, x, W, b), per_sample_gradient_norms(dy, x, W)]
        results += [*per_sample_gradients(dy, x, W, b), *clipped_gradients(dy, x, W, b, max_norm=1.0)[1:]]
        results += [*per_sample_gradients(dy[None], x[None], W, n_batch_axes=2)][:1]
        results += [per_sample_gradient_norms(dy[None], x[None], W, n_batch_axes=2)]
        return results + ([*kronecker_factors(dy, x, W)] if real else [])

    expected = everything()
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast(x.device.type, dtype=half):
            for number, (got, other) in enumerate(zip(everything(), expected, strict=True)):
                assert torch.equal(got, other), number


def test_autocast_stays_on_in_the_function_of_the_user() -> None:
    x, W = torch.ones(2, 3), torch.ones(3, 4)
    seen = []

    def hessian_vector_product(y_dot: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled(x.device.type))
        return y_dot

    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        gauss_newton_vector_product((x, None, None), hessian_vector_product, x, W)
    assert seen == [True]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")
def test_autocast_rounds_no_factors_of_recorded_or_compiled_gradients() -> None:
    x, W = torch.full((2, 4), 1 + 2**-12), torch.full((4, 3), 1 + 2**-12, requires_grad=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        total = affine(x, W).sum()
        y = torch.compile(affine, fullgraph=True, backend="eager")(x, torch.ones(4, 3))
    (dW,) = torch.autograd.grad(total, W)  # outside of autocast, as torch advises
    assert dW.tolist() == [[2 + 2**-11] * 3] * 4
    assert y.tolist() == [[4 + 2**-10] * 3] * 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_with_what_fits(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    x, W = torch.ones(6, 3), torch.ones(3, 3)
    for name, call in {
        "x": lambda: affine(nested, W),
        "x and dy": lambda: affine_backward(nested, nested, W),
        "dy": lambda: affine_backward(nested, x, W),
        "W": lambda: AffineLayer(nested),
        "out": lambda: affine(x, W, out=nested),
        "x_dot": lambda: affine_jvp((x, W), (nested, None)),
        "x beside another library": lambda: affine(nested, np.ones((3, 2))),
        "x beside a list": lambda: affine(nested, [[1.0]]),
        "W beside a list": lambda: affine([[1.0]], nested),
        "x without W": lambda: affine(nested, None),
    }.items():
        with pytest.raises(TypeError, match=r"nested tensor\. Pass the rows of all its samples, torch\.cat\("):
            call()
        assert affine(torch.cat(nested.unbind()), W).shape == (6, 3), name
    for call in (
        lambda: affine(nested, W, n_batch_axes=True),
        lambda: affine(np.ones((6, 3)), np.ones((3, 3)), out=nested),
    ):
        with pytest.raises(TypeError, match=r" is a nested tensor of torch\.float32"):
            call()


def test_gradient_whose_elements_share_memory_is_not_added_to_in_place() -> None:
    layer = AffineLayer(torch.ones(3, 4), torch.ones(4))
    for _ in range(2):
        layer.forward(torch.ones(2, 3))
        layer.db = torch.ones(1).expand(4)
        layer.backward(torch.ones(2, 4), accumulate=True)
    assert layer.dW.tolist() == [[4] * 4] * 3
    assert layer.db.tolist() == [3] * 4


# Each case runs in a fork of a process that has imported torch and xaffine and has called nothing of xaffine.
COLD = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork cannot use CUDA once its parent has looked at it
import torch
from tests.helpers import assert_fills, case_on
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp, curvature, per_sample

torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # imports the compiler, once for all forks

def a_layer(dy, x, W, b):
    layer = AffineLayer(W, b)
    return layer(x), layer.backward(dy), layer.dW, layer.db

def vjp(dy, x, W, b):
    return affine_vjp(x, W, b)[1](dy)

def sums(dy, x, W, b):
    layer = AffineLayer(W, b)
    for accumulate in (False, True, True):
        layer(x)
        layer.backward(dy, accumulate=accumulate)
    return layer.dW, layer.db

FUNCTIONS = {
    "affine": lambda dy, x, W, b: affine(x, W, b),
    "affine_backward": affine_backward,
    "affine_vjp": vjp,
    "affine_jvp": lambda dy, x, W, b: affine_jvp((x, W, b), (x, W, b)),
    "a layer": a_layer,
    "norms": per_sample.per_sample_gradient_norms,
    "gradients": per_sample.per_sample_gradients,
    "clipped": lambda *some: per_sample.clipped_gradients(*some, max_norm=1.0)[1:],
    "sums": sums,
    "factors": curvature.kronecker_factors,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.complex64]

def run(name, dtypes, warm=None, parameters=False):
    make = (lambda t: torch.nn.Parameter(t, requires_grad=False)) if parameters else (lambda t: t)
    shapes = (3, 2), (3, 6), (6, 2), (2,)
    dy, x, W, b = (make(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes))
    if warm is not None:
        affine(*(torch.ones(shape, dtype=warm) for shape in shapes[1:]))
    got = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")(dy, x, W, b)
    expected = FUNCTIONS[name](dy, x, W, b)
    tuples = (got, expected) if isinstance(got, tuple) else ((got,), (expected,))
    for one, other in zip(*tuples):
        assert torch.equal(one, other), (one, other)

CASES = {name: (name, DTYPES[:1] * 4) for name in FUNCTIONS}
CASES |= {f"vjp in {dtype}": ("affine_vjp", [dtype] * 4) for dtype in DTYPES[1:]}
CASES |= {f"float32, then {dtype}": ("a layer", [dtype] * 4, torch.float32) for dtype in DTYPES[1:3]}
CASES |= {f"{dtype} with float64": ("affine_vjp", [dtype, dtype, torch.float64, dtype]) for dtype in DTYPES[2:4]}
CASES |= {f"{name} in {dtype}": (name, [dtype] * 4) for name in ("norms", "clipped", "sums") for dtype in DTYPES[2:4]}
CASES |= {f"Parameters in {dtype}": ("affine_vjp", [dtype] * 4, None, True) for dtype in DTYPES[:3]}
def wait():
    _, status = os.wait()
    if os.WIFSIGNALED(status):
        print("a case was ended by signal", os.WTERMSIG(status), flush=True)

running = 0
for name, case in CASES.items():
    if running == os.cpu_count():
        wait()
        running -= 1
    running += 1
    if os.fork() == 0:
        try:
            run(*case)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            os._exit(1)
        os._exit(0)
for _ in range(running):
    wait()
print(len(CASES), "cases")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks stand for fresh processes, each of which takes seconds")
def test_compiles_before_anything_else_ran() -> None:
    """Whatever function, dtype or kind of tensor is the first that a process sees."""
    # Measuring coverage would double the time, and these lines are covered elsewhere.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, "-W", "ignore", "-c", COLD]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert child.stdout == "28 cases\n", child.stdout + child.stderr


def test_wide_gradients_are_contiguous() -> None:
    """Their product is transposed where n is far above m."""
    dW = affine_backward(torch.ones(5, 1), torch.ones(5, 40), torch.ones(40, 1)).dW
    assert dW.is_contiguous()
    assert dW.tolist() == [[5]] * 40


def test_narrow_operands_beside_wide_ones_are_multiplied_in_blocks() -> None:
    N, n, m = 60_000, 3, 2800
    dW = affine_backward(torch.full((N, m), 0.1), torch.ones(N, n), torch.zeros(n, m), wrt="W").dW
    exact = N * float(np.float32(0.1))
    bound = float(bounds.gamma(4096 + N // 4096 + 1, bounds.unit_roundoff("float32")))
    assert float(abs(dW.double() / exact - 1).max()) <= bound


def test_parameters_mix_with_tensors() -> None:
    W, b = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.zeros(2))
    layer = AffineLayer(W, b)
    assert layer(torch.ones(4, 3)).tolist() == [[3, 3]] * 4
    assert layer.backward(torch.ones(4, 2)).tolist() == [[2, 2, 2]] * 4


@pytest.mark.filterwarnings("ignore")  # of torch's compiler and the C++ compiler it calls, about themselves
def test_compiles_as_one_graph(backend: Any) -> None:
    case = make_case((5, 2, 3), 4, seed=5)
    dy, x, W, b = case_on(case, backend)

    def forward_and_backward(dy: Any, x: Any, W: Any, b: Any) -> Any:
        y, vjp = affine_vjp(x, W, b)
        return (y, *vjp(dy))

    compiled = torch.compile(forward_and_backward, fullgraph=True)
    for got, expected in zip(compiled(dy, x, W, b), forward_and_backward(dy, x, W, b), strict=True):
        assert torch.equal(got, expected)


def test_vmap_over_layers(backend: Any) -> None:
    case = make_case((6, 3), 4, seed=6)
    _, x, W, b = case_on(case, backend)
    stack = torch.stack([W, 2 * W])
    mapped = torch.vmap(lambda w: affine(x, w, b))(stack)
    assert torch.equal(mapped, torch.stack([affine(x, w, b) for w in stack]))


def test_meta_device_computes_shapes_alone() -> None:
    x, W = torch.ones(2, 3, 4, device="meta"), torch.ones(12, 5, device="meta")
    y, vjp = affine_vjp(x, W)
    assert y.shape == (2, 5)
    assert y.device.type == "meta"
    assert vjp(y).dx.shape == x.shape


def test_arrays_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two devices: x is .* \(torch on (cpu|cuda:0)\); W is .* \(torch on meta\)"):
        affine(torch.ones(2, 3), torch.ones(3, 4, device="meta"))


def test_bfloat16_converts_to_float32_exactly(backend: Any) -> None:
    tensor = torch.tensor([1.5, -3.0], dtype=torch.bfloat16)
    converted = backend.to_numpy(tensor)
    assert converted.dtype == np.float32
    assert converted.tolist() == [1.5, -3.0]


def test_out_is_filled() -> None:
    out = torch.zeros(2, 4)
    assert affine(torch.ones(2, 3), torch.ones(3, 4), out=out) is out
    assert out.tolist() == [[3] * 4] * 2


@pytest.mark.parametrize(
    ("unwritable", "error", "words"),
    [
        pytest.param(lambda: torch.nn.Parameter(torch.zeros(3, 4)), TypeError, "follows out's dW", id="parameter"),
        pytest.param(lambda: torch.zeros(4).expand(3, 4), ValueError, "out's dW overlaps itself", id="expanded"),
        pytest.param(
            lambda: torch.inference_mode()(lambda: torch.zeros(3, 4))(),
            TypeError,
            "dW cannot be written",
            id="inference",
        ),
    ],
)
def test_out_that_torch_would_not_write_leaves_all_alone(unwritable: Any, error: Any, words: str) -> None:
    dx = torch.zeros(2, 3)
    with pytest.raises(error, match=words):
        affine_backward(torch.ones(2, 4), torch.ones(2, 3), torch.ones(3, 4), out=(dx, unwritable(), None))
    assert not dx.any()


def test_conjugated_and_negated_views_convert(backend: Any) -> None:
    assert backend.to_numpy(torch.tensor([1 + 2j]).conj().imag).tolist() == [-2]


def test_tf32_is_allowed_where_it_is_asked_for_and_taken_back(backend: Any) -> None:
    try:
        backend.use_tf32()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        backend.use_full_precision()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.filterwarnings("ignore")  # as above
def test_compiled_peer_is_right(backend: Any) -> None:
    case = make_case((5, 3), 4, seed=0)
    for check in (checks.forward_is_exact, checks.backward_is_exact):
        assert check(peers.torch_compiled, case, backend) == 0


@pytest.mark.filterwarnings("ignore")  # of parts of torch about other parts
def test_jvp_equals_that_of_torch(backend: Any) -> None:
    case, dots = (make_case((5, 2, 3), 4, seed=seed, dtypes="float64") for seed in (1, 2))
    primals, tangents = (tuple(case_on(some, backend)[1:]) for some in (case, dots))
    ours = affine_jvp(primals, tangents)
    theirs = torch.func.jvp(lambda x, W, b: torch.nn.functional.linear(x.flatten(1), W.mT, b), primals, tangents)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_double_backward_equals_that_of_torch(backend: Any, dtype: str) -> None:
    case, other = (make_case((5, 2, 3), 4, seed=seed, dtypes=dtype) for seed in (1, 2))
    dy, x, W, b = (tensor.requires_grad_() for tensor in case_on(case, backend))
    _, *cotangents = case_on(other, backend)
    y = torch.nn.functional.linear(x.flatten(1), W.mT, b)
    # torch conjugates what it pulls back through: on both ways here, on none in ours.
    first = torch.autograd.grad(y, (x, W, b), dy.conj(), create_graph=True)
    first = tuple(gradient.conj() for gradient in first)
    theirs = torch.autograd.grad(first, (dy, x, W), [cotangent.conj() for cotangent in cotangents])
    ours = affine_double_backward(tuple(cotangents), dy.detach(), x.detach(), W.detach(), b.detach())
    for name, own, other_ in zip(ours._fields, ours, theirs, strict=True):
        assert torch.equal(own, other_.conj()), name


def test_gradients_of_samples_equal_vmap_of_grad(backend: Any) -> None:
    for shape, axes in (((5, 3), None), ((4, 6, 3), 2), ((4, 2, 3), 2)):
        case = make_case(shape, 7, seed=1, dtypes="float64", n_batch_axes=axes)
        dy, x, W, b = case_on(case, backend)

        def loss(W: Any, b: Any, x: Any, dy: Any) -> Any:
            return (torch.nn.functional.linear(x, W.mT, b) * dy).sum()

        dW, db = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))(W, b, x, dy)
        ours = per_sample_gradients(dy, x, W, b, n_batch_axes=axes)
        assert torch.equal(ours.dW, dW)
        assert torch.equal(ours.db, db)
        norms = per_sample_gradient_norms(dy, x, W, b, n_batch_axes=axes)
        theirs = torch.sqrt((dW**2).sum((1, 2)) + (db**2).sum(1))  # of exact sums
        limit = float(bounds.gamma(5, bounds.unit_roundoff("float64")))
        assert ((norms - theirs).abs() <= limit * theirs).all()


def test_linear_layer_in_memory_shares_its_weights() -> None:
    linear = torch.nn.Linear(3, 2)
    layer = AffineLayer(linear.weight.detach().mT, linear.bias.detach(), n_batch_axes=-1)
    x = torch.ones(4, 5, 3)
    with torch.no_grad():
        linear.weight += 1
        assert torch.allclose(layer(x), linear(x), rtol=0, atol=4 * 4 * 2**-24 * 8)  # γ_4 of at most 8, from both


def test_gradients_add_up_where_autograd_records(backend: Any) -> None:
    dy, x, W, b = case_on(make_case((5, 3), 4, seed=1), backend)
    W.requires_grad_()
    layer = AffineLayer(W, b)
    layer.forward(x)
    layer.backward(dy.requires_grad_())
    held, before = layer.dW, layer.dW.detach().clone()
    layer.backward(dy, accumulate=True)
    assert layer.dW is not held
    assert torch.equal(held, before)
    assert torch.equal(layer.dW.detach(), 2 * before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vjp: pickle.loads(pickle.dumps(vjp))])  # noqa: S301 - our own
def test_copies_know_their_device(copied: Any) -> None:
    operands = [[torch.ones(shape, device=device) for shape in ((2, 3), (3, 4))] for device in ("cpu", "meta")]
    here, there = (copied(affine_vjp(*some)[1]) for some in operands)
    dy = torch.ones(2, 4, device="cpu")
    here(dy)
    with pytest.raises(ValueError, match="arrays on two devices"):
        there(dy)


@pytest.mark.parametrize("name", ["numpy", "array-api-strict"])
def test_reversed_arrays_move(backend: Any, name: str) -> None:
    source = backends.get(name)
    for array in (np.arange(6.0).reshape(2, 3)[::-1], np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)[:, ::-1]):
        flipped = source.xp.flip(source.from_numpy(np.flip(array).copy()))
        assert backends.move(flipped, backend).tolist() == array.tolist()
    assert backends.move(array, backend).tolist() == array.tolist()


def test_parameters_move_without_their_tape() -> None:
    layer = AffineLayer(torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.zeros(2)))
    assert layer.to("numpy").W.tolist() == [[1, 1]] * 3
    assert layer.to("torch").W is layer.W


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone; tests/distributed/test_torch.py has two."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors(backend: Any, mesh: Any) -> None:
    whole = [tensor.cpu() for tensor in case_on(make_case((5, 6), 4, seed=7), backend)]
    places = Shard(0), Shard(0), Replicate(), Replicate()
    dy, x, W, b = (distribute_tensor(tensor, mesh, [place]) for tensor, place in zip(whole, places, strict=True))
    out = torch.zeros_like(dy)
    assert affine(x, W, b, out=out) is out
    layer = AffineLayer(W, b)
    assert torch.equal(layer(x).full_tensor(), out.full_tensor())
    layer.backward(dy)
    assert layer.dW.placements == (Partial("sum"),)
    assert np.array_equal(AffineLayer(layer.dW).to("numpy").W, whole[1].mT @ whole[0])
    assert layer.to("torch").W is W
    wide = layer.to("torch", dtype="float64").W
    assert (wide.dtype, wide.placements) == (torch.float64, W.placements)
    with pytest.raises(ValueError, match=r"two devices: x is .* \(torch on DeviceMesh.*\); W is .* \(torch on cpu\)"):
        affine(x, whole[2], b)
    with pytest.raises(ValueError, match="out's dx overlaps"):
        affine_backward(dy, dy, distribute_tensor(torch.eye(4), mesh, [Replicate()]), wrt="x", out=(dy, None, None))


class TestProductsOfManyTerms:
    """MKL adds the terms of narrow products up one after the other; they are cut into blocks."""

    @pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
    @pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 2), (2, 2)])
    @pytest.mark.parametrize("N", [3, 4, 9, 300])  # of blocks that are added up in more than one round
    @pytest.mark.parametrize("in_blocks", [True, False])
    def test_in_blocks(
        self, monkeypatch: pytest.MonkeyPatch, N: int, n: int, m: int, stack: Any, in_blocks: bool
    ) -> None:
        parts = []

        def record(self: Any, array: Any, axis: int, dtype: Any) -> Any:
            parts.append(tuple(array.shape))
            return add_up(self, array, axis, dtype)

        add_up = module.Torch.sum
        monkeypatch.setattr(module, "_TERMS", 4)
        monkeypatch.setattr(module, "_adds_up_term_by_term", lambda *_: in_blocks)
        monkeypatch.setattr(module.Torch, "sum", record)
        rng = np.random.default_rng(0)
        x, dy = (rng.integers(-4, 5, (*stack, N, columns)).astype("f") for columns in (n, m))
        expected = np.einsum("...ij,...ik->...jk", x, dy)
        results = [BACKEND.matmul(torch.from_numpy(x).mT, torch.from_numpy(dy))]
        if not stack:
            results.append(
                BACKEND.product(torch.from_numpy(x).T, torch.from_numpy(dy), torch.ones(m, device="cpu")) - 1
            )
            results.append(
                BACKEND.product(torch.from_numpy(x).T, torch.from_numpy(dy), None, torch.zeros(n, m, device="cpu"))
            )
        for result in results:
            assert result.dtype == torch.float32
            assert np.array_equal(result, expected)
        wide_second = (*stack, N // 4, *sorted((n, m)))
        assert parts == ([wide_second] * len(results) if in_blocks else [])

    @pytest.mark.parametrize(
        ("n", "m", "terms", "changed", "expected"),
        [
            (2, 3, 16_385, {}, True),
            (2, 3, 16_384, {}, False),
            (64, 128, 16_385, {}, True),
            (64, 129, 16_385, {}, False),
            (15, 10_000, 16_385, {}, True),
            (10_000, 15, 16_385, {}, True),
            (16, 10_000, 16_385, {}, False),
            (10_000, 16, 16_385, {}, False),
            (1, 1, 16_385, {}, True),
            (0, 3, 16_385, {}, False),
            (2, 0, 16_385, {}, False),
            (2, 3, 16_385, {"dtype": torch.int64}, False),
            (2, 3, 16_385, {"dtype": torch.complex64}, True),
            (2, 3, 16_385, {"dtype": torch.float16}, False),
            (2, 3, 16_385, {"dtype": torch.bfloat16}, False),
            (2, 3, 16_385, {"layout": torch.sparse_coo}, False),
            (2, 3, 16_385, {"layout_of_c": torch.sparse_coo}, False),
            (2, 3, 16_385, {"layout": torch.jagged, "layout_of_c": torch.jagged}, False),
            (2, 3, 16_385, {"device": "cuda"}, False),
            (2, 3, 16_385, {"device_mesh": None}, False),
        ],
        ids=str,
    )
    def test_running_sums_are_of_dense_narrow_long_floats_on_a_cpu(
        self, n: int, m: int, terms: int, changed: dict[str, Any], expected: bool
    ) -> None:
        made = {
            "dtype": torch.float32,
            "layout": torch.strided,
            "layout_of_c": torch.strided,
            "device": "cpu",
        } | changed
        device = SimpleNamespace(type=made["device"])
        a = SimpleNamespace(shape=(2, n, terms), dtype=made["dtype"], layout=made["layout"], device=device)
        if "device_mesh" in made:
            a.device_mesh = made["device_mesh"]
        c = SimpleNamespace(shape=(2, terms, m), layout=made["layout_of_c"])
        assert module._adds_up_term_by_term(a, c) is expected  # type: ignore[arg-type]

    def test_sum_of_a_dtensor_is_one_sum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BACKEND.xp, "concat", None)  # which sums in stretches call
        array = torch.ones((1000, 2), dtype=torch.int8)
        array.device_mesh = None  # type: ignore[attr-defined]
        total = BACKEND.sum(array, 0, torch.int8)
        assert (total.dtype, total.tolist()) == (torch.int8, [1000 - 1024] * 2)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "float32"), (torch.float64, "float64")])
def test_bfloat16_becomes_float32(dtype: Any, expected: str) -> None:
    for tensor in (torch.full((2,), 1.5, dtype=dtype), torch.full((2,), 1.5, dtype=dtype, requires_grad=True)):
        array = BACKEND.to_numpy(tensor)
        assert (array.dtype, array.tolist()) == (expected, [1.5, 1.5])


@pytest.mark.parametrize("make", [torch.randn, lambda *shape: torch.nn.Parameter(torch.randn(*shape))])
def test_plans_are_remembered_for_dense_tensors_alone(make: Any) -> None:
    tensor = make(2, 3)
    known = BACKEND.signature(tensor, None)
    assert known == BACKEND.signature(torch.zeros(2, 3), None)
    others = (
        torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(),
    )  # fmt: skip
    signatures = [BACKEND.signature(other, None) for other in others]
    assert known not in signatures
    assert len({*signatures, known}) == 5
    assert BACKEND.signature(torch.zeros(2, 3)) != known
    assert BACKEND.signature(torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), None) is None


class Queue:
    """The queue of a GPU as torch shows it: an event takes the time at its place in the queue."""

    def __init__(self) -> None:
        self.now = 0.0  # milliseconds
        self.calls: list[str] = []

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        made = SimpleNamespace(done=False)

        def elapsed(end: Any) -> float:
            assert end.done
            return float(end.at - made.at)

        made.record = lambda: setattr(made, "at", self.now)
        made.synchronize = lambda: setattr(made, "done", True)
        made.elapsed_time = elapsed
        return made

    def run(self, count: int) -> tuple[str]:
        self.calls += ["call"] * count
        self.now += 3.0 * count
        return ("result",)


def test_events_time_what_is_queued_and_nobody_waits(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: queue.calls.append(str(device)))
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    larger_than_caches = mock.MagicMock()
    larger_than_caches.__setitem__.side_effect = lambda *_: queue.calls.append("flush")
    monkeypatch.setattr(backend.xp, "zeros", lambda *_, **__: larger_than_caches)
    monkeypatch.setattr(type(backend), "wait", lambda _, array: array is larger_than_caches or pytest.fail("waited"))
    stopwatch = clock.clock_of(backend, torch.device("cuda", 1))
    assert (stopwatch.name, queue.calls) == ("device events", ["cuda:1"])
    assert stopwatch.time(queue.run, 4) == pytest.approx(3e-3, rel=1e-12)
    assert stopwatch.time_cold(queue.run) == pytest.approx(3e-3, rel=1e-12)
    assert queue.calls[1:] == ["call"] * 4 + ["flush", "call"]


def test_host_times_what_runs_on_the_cpu(backend: Any) -> None:
    assert clock.clock_of(backend, torch.device("cpu")).name == "host"


@pytest.mark.usefixtures("backend")
def test_buffers_are_looked_at_in_every_call() -> None:
    x, W, y = torch.ones(2, 3), torch.ones(3, 4), torch.zeros(2, 4)
    for _ in range(2):
        assert affine(x, W, out=y) is y
    W.requires_grad_()
    with pytest.raises(TypeError, match=r"out cannot be filled: autograd .* follows W"):
        affine(x, W, out=y)
    meta = [tensor.detach().to("meta") for tensor in (x, W, y)]
    for _ in range(2):
        assert affine(*meta[:2], out=meta[2]) is meta[2]


def test_no_plan_is_remembered_of_symbols(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    assert backend.signature(x) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backend.signature(x) is None


def test_wait_is_for_the_gpu_of_a_tensor(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    backend.wait(torch.ones(2, device="cpu"))
    backend.wait(SimpleNamespace(is_cuda=True, device="cuda:1"))
    assert waited == ["cuda:1"]


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("N", [4, 200])
def test_sparse_layouts_are_multiplied(layout: Any, N: int) -> None:
    dense, W, b, dy = torch.ones(N, 5), torch.ones(5, 2), torch.ones(2), torch.ones(N, 2)
    x = dense.to_sparse(layout=layout)
    assert torch.equal(affine(x, W), affine(dense, W))
    assert torch.equal(affine(x, W, b), affine(dense, W, b))
    assert torch.equal(affine_backward(dy, x, W, wrt="W").dW, affine_backward(dy, dense, W).dW)
    sparse_W = W.to_sparse(layout=layout)
    assert torch.equal(affine_backward(dy, dense, sparse_W, wrt="x").dx, affine_backward(dy, dense, W).dx)
    second = affine_double_backward((dense, None, None), dy, x, W)
    assert torch.equal(second.W, torch.full((5, 2), float(N)))


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated:DeprecationWarning"
)
def test_extents_that_are_symbols_or_tensors_have_no_signature(backend: Any) -> None:
    def function(x: Any, W: Any) -> Any:
        return affine(x, W)

    traced = make_fx(functionalize(function), tracing_mode="symbolic")(torch.ones(2, 3), torch.ones(3, 4))
    assert torch.equal(traced(torch.ones(5, 3), torch.ones(3, 4)), torch.full((5, 4), 3.0))
    before = len(backend.plans)
    torch.jit.trace(function, (torch.ones(7, 3), torch.ones(3, 4)), check_trace=False)
    assert len(backend.plans) == before


def test_batch_axes_may_be_a_tensor_of_an_integer_and_none_of_a_bool() -> None:
    x, W = torch.ones(2, 3), torch.ones(3, 4)
    assert affine(x, W, n_batch_axes=torch.tensor(1)).shape == (2, 4)
    with pytest.raises(TypeError, match="n_batch_axes must be an int or None"):
        affine(x, W, n_batch_axes=torch.tensor(True))


def test_buffer_of_inference_mode_is_refused_where_its_signature_is_known() -> None:
    x, W = torch.ones(2, 3), torch.ones(3, 4)
    assert affine(x, W, out=torch.zeros(2, 4)).tolist() == [[3] * 4] * 2
    with torch.inference_mode():
        out = torch.zeros(2, 4)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"out cannot be written, since it was made in torch\.inference_mode"):
            affine(x, W, out=out)
    assert not out.any()
