"""Adapters: what is no layer becomes one, is judged as one, and is seen for what it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.testing.test_diagnoses import textbook
from xaffine import AffineLayer, affine
from xaffine.backends import Backend
from xaffine.testing import PROPERTIES, Options, PropertyError, adapt, check_affine
from xaffine.testing.runner import Plan


def forward(x: Any, W: Any, b: Any) -> Any:
    """As CS231n has it."""
    return x.reshape(len(x), -1).dot(W) + b, (x, W, b)


def backward(dout: Any, cache: Any) -> Any:
    x, W, _ = cache
    return dout.dot(W.T).reshape(x.shape), x.reshape(len(x), -1).T.dot(dout), dout.sum(axis=0)


def wrong_backward(dout: Any, cache: Any) -> Any:
    dx, dW, db = backward(dout, cache)
    return dx, dW, db / len(dout)


TORCH = """
import torch
from torch import nn

class ModelNew(nn.Module):
    \"\"\"The form of kernel benchmarks, with W as it is.\"\"\"
    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.randn(m))
    def forward(self, x):
        return torch.matmul(x, self.weight) + self.bias

class Mean(ModelNew):
    def forward(self, x):
        return super().forward(x - x.mean())

class OnlyWeight(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, m))
    def forward(self, x):
        return x @ self.weight

class Deep(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.first, self.second = nn.Linear(n, m), nn.Linear(m, m)

class Kernel(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

class WrongKernel(Kernel):
    def forward(self, x):
        y = super().forward(x)
        return y if self.bias is None else y + self.bias.detach()

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias
    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x, dy.sum(0)

class WrongFunction(Function):
    @staticmethod
    def backward(ctx, dy):
        dx, dweight, dbias = Function.backward(ctx, dy)
        return dx, dweight, dbias / len(dy)

def plain(x, W, b):
    return x @ W + b

linear, functional = nn.Linear, nn.functional.linear
"""


@pytest.fixture
def of_torch(backend: Backend) -> Any:
    namespace: dict[str, Any] = {"__name__": "of_torch"}
    if backend.name == "torch":
        exec(TORCH, namespace)  # noqa: S102 - above
    return namespace


def test_what_a_target_is_is_seen() -> None:
    assert adapt(AffineLayer) == (AffineLayer, "layer", "numpy")
    assert adapt(textbook(), "torch")[1:] == ("layer", "torch")
    assert adapt((forward, backward))[1:] == ("pair", "numpy")
    assert adapt(affine, "jax")[1:] == ("function", "jax")
    assert adapt(lambda W, b, n_batch_axes=None: (W, b, n_batch_axes))[1] == "layer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((affine, "numpy", "function"), "torch and JAX differentiate a function of x, W and b, and numpy does not"),
        ((affine, "jax", "nothing"), "there is no adapter 'nothing'; there are 'layer', 'torch module', "),
        (((affine, affine, affine),), "a pair is a forward and a backward; got 3"),
        ((affine, "numpy", "pair"), "a pair is a forward and a backward; got one thing"),
        ((AffineLayer, "jax", "torch module"), "a torch module takes arrays of torch, not of jax"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(*arguments)


def test_pair_of_functions_with_a_cache_is_judged() -> None:
    report = check_affine((forward, backward), seed=0, max_examples=20)
    assert {result.verdict for result in report.results if result.part.prop.tier != "manners"} == {"holds"}
    with pytest.raises(PropertyError) as caught:
        check_affine((forward, wrong_backward), seed=0)
    assert caught.value.cause == "db is the mean over the batch, not the sum"
    assert "make, *_ = adapt((forward, wrong_backward), 'numpy', 'pair')" in caught.value.code
    with pytest.raises(AssertionError, match=r"db\["):
        exec(caught.value.code, {})  # noqa: S102 - our own text


@pytest.mark.parametrize("name", ["linear", "ModelNew", "Function", "functional", "plain"])
def test_what_torch_differentiates_is_right(of_torch: Any, backend: Backend, name: str) -> None:
    if backend.name != "torch":
        return  # which the modules need
    adapter = {"plain": "function", "functional": "function", "Function": "torch function"}.get(name, "torch module")
    own: Any = "torch" if adapter == "function" else None
    plan = Plan(of_torch[name], Options(backend=own, seed=0, max_examples=15))
    assert (plan.subject.facts.adapter, plan.subject.facts.backend) == (adapter, "torch")
    for result in plan.run():
        assert result.failure is None or result.part.prop.tier == "manners", result.failure
    assert "matrices" in plan.abilities.features
    assert ("no-bias" in plan.abilities.features) == (name in ("linear", "functional"))
    assert ("last-axis" in plan.abilities.features) == (name != "Function")


def test_what_torch_differentiates_is_wrong_in_words(of_torch: Any, backend: Backend) -> None:
    if backend.name != "torch":
        return  # which the modules need
    with pytest.raises(PropertyError) as caught:
        check_affine(of_torch["WrongFunction"], seed=0)
    assert caught.value.cause == "db is the mean over the batch, not the sum"
    with pytest.raises(PropertyError, match=r"forward_is_exact does not hold"):
        check_affine(of_torch["Mean"], seed=0)
    with pytest.raises(
        ValueError, match=r"of 3 features and 5 outputs must have a weight and at most a bias, and has \("
    ):
        check_affine(of_torch["Deep"], seed=0)


def test_module_without_a_bias_is_judged_without(of_torch: Any, backend: Backend) -> None:
    if backend.name != "torch":
        return
    report = check_affine(of_torch["OnlyWeight"], seed=0, max_examples=10)
    assert report.verdict == "right"
    assert "a bias (making the layer raised TypeError: the module has no bias)" in report.gaps
    assert all(" bias=False" in str(r.worst_case) for r in report.results if r.worst_case is not None)


def test_kernel_that_torch_cannot_differentiate_is_judged_by_y(of_torch: Any, backend: Backend) -> None:
    if backend.name != "torch":
        return
    report = check_affine(of_torch["Kernel"], seed=0, max_examples=10)
    assert report.gaps[-1] == "dx, dW and db: it has no backward"
    assert report.verdict == "right"
    assert " properties hold; of y alone: it has no backward; " in report.conclusion
    with pytest.raises(PropertyError) as caught:
        check_affine(of_torch["WrongKernel"], seed=0)
    assert caught.value.cause == "y has the bias added twice"


def test_function_that_nobody_differentiates_is_judged_by_y() -> None:
    report = check_affine(lambda x, W, b: x @ W + b, seed=0, max_examples=10)
    assert (report.adapter, report.backend) == ("forward", "numpy")
    assert [result.part.prop.name for result in report.results] == [p.name for p in PROPERTIES if p.of_forward]
    assert check_affine(lambda x, weight, b: x @ weight.T + b, seed=0, max_examples=10).verdict == "right"
    with pytest.raises(PropertyError) as caught:
        check_affine(lambda x, W, _b: x @ W, seed=0, adapter="forward")
    assert caught.value.cause == "y lacks the bias"
    make, *_ = adapt(lambda x, W, b: x @ W + b)
    with pytest.raises(NotImplementedError, match="there are no gradients of a forward alone"):
        make(np.ones((3, 2)), np.ones(2)).backward(np.ones((1, 2)))


@pytest.mark.parametrize(
    ("module", "name", "refused"),
    [
        ("flax.linen", "Dense", ["n = 0", "m = 0"]),
        ("flax.nnx", "Linear", ["n = 0", "m = 0"]),
        ("equinox.nn", "Linear", []),
    ],
)
def test_modules_of_jax_are_right(backend: Backend, module: str, name: str, refused: list[str]) -> None:
    if backend.name != "jax":
        return
    target = getattr(importlib.import_module(module), name)
    properties = ["backward_is_exact", "results_match_their_primals"]
    report = check_affine(target, seed=0, max_examples=4, properties=properties, dtype="float32")
    assert (report.adapter, report.verdict, report.isolated) == ("jax module", "right", False)
    assert set(refused) <= {gap.partition(" (")[0] for gap in report.gaps}
    assert "b = None" not in {gap.partition(" (")[0] for gap in report.gaps}


def test_models_of_thinc_are_right() -> None:
    Linear = importlib.import_module("thinc.api").Linear
    report = check_affine(Linear, seed=0, max_examples=20)
    assert (report.adapter, report.verdict, report.dtypes) == ("thinc model", "right", ("float32", "float64"))
    assert "b = None" in {gap.partition(" (")[0] for gap in report.gaps}


def test_what_jax_differentiates_is_right(backend: Backend) -> None:
    if backend.name != "jax":
        return
    options = Options(backend="jax", dtype="float32", seed=0, max_examples=5, properties=["exact"])
    for function in (lambda x, W, b: x @ W + b, lambda x, weight, b: x @ weight.T + (0 if b is None else b)):
        plan = Plan(
            function, replace(options, supports={"no-bias"} if "weight" in function.__code__.co_varnames else ())
        )
        assert plan.subject.facts.adapter == "function"
        assert {result.verdict for result in plan.run()} == {"holds"}


def test_command_says_what_it_took(tmp_path: Any) -> None:
    (tmp_path / "course.py").write_text(
        "def forward(x, W, b):\n    return x @ W + b, (x, W)\n"
        "def backward(dy, cache):\n    return dy @ cache[1].T, cache[0].T @ dy, dy.sum(0)\n"
        "def wrong(dy, cache):\n    return dy @ cache[1].T, cache[0].T @ dy, dy.mean(0)\n"
    )
    for names, code, last in (
        ("forward,backward", 0, "right: "),
        ("forward,wrong", 1, "wrong: db is the mean over the batch, not the sum\n"),
    ):
        command = [sys.executable, "-m", "xaffine", "check", f"course.py:{names}", "--only", "exact", "--large", "0"]
        child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert child.returncode == code, child.stdout + child.stderr
        assert f"course.py:{names} (a pair) on numpy {np.__version__}" in child.stdout
        assert child.stdout.rpartition("\n\n")[2].startswith(last)
