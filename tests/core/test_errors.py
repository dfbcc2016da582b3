"""Bad input raises the promised type, on every backend, and says what was passed, what was wanted and what to do."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest

import xaffine
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.backends import Backend, get
from xaffine.curvature import affine_double_backward, gauss_newton_vector_product, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms

MESSAGES = Path(__file__).with_name("messages.txt")


def numpy_ones(*shape: int, dtype: Any = "float32") -> Any:
    return np.ones(shape, dtype)


def on_device(number: int, *shape: int) -> Any:
    return array_api_strict.ones(shape, device=array_api_strict.Device(f"device{number}"))


def read_only(*shape: int) -> Any:
    array = numpy_ones(*shape)
    array.flags.writeable = False
    return array


x, W, b, dy = numpy_ones(2, 3), numpy_ones(3, 4), numpy_ones(4), numpy_ones(2, 4)
shared = numpy_ones(2, 7)

CALLS = {
    "features, none fits": lambda: affine(numpy_ones(2, 5), W, b),
    "features, another slice fits": lambda: affine(numpy_ones(2, 5, 3), W),
    "features, several slices fit": lambda: affine(numpy_ones(3, 1, 3), W, n_batch_axes=0),
    "features, slice given": lambda: affine(numpy_ones(2, 5), W, n_batch_axes=-1),
    "W is no matrix": lambda: affine(x, numpy_ones(3), b),
    "W of a layer is no matrix": lambda: AffineLayer(numpy_ones(3)),
    "W of torch, by x": lambda: affine(numpy_ones(2, 4), W),
    "W of torch, by x, mapped along its last axis": lambda: affine(numpy_ones(2, 5, 4), W),
    "W of torch, by b": lambda: AffineLayer(W, numpy_ones(3)),
    "sizes in the place of weights": lambda: AffineLayer(np.int64(64), 10),
    "one size in the place of weights": lambda: AffineLayer(64),
    "a shape in the place of weights": lambda: AffineLayer((64, 10)),
    "x of another size, where b shows that W is right": lambda: affine(numpy_ones(2, 4), W, b),
    "b of another size": lambda: affine(x, W, numpy_ones(5)),
    "b is broadcast": lambda: affine(x, W, numpy_ones(4, 1)),
    "b of a layer is broadcast": lambda: AffineLayer(W, numpy_ones(1, 4)),
    "x has no axis": lambda: affine(numpy_ones(), W, b),
    "slice is no int": lambda: affine(x, W, b, n_batch_axes=1.5),
    "slice is out of range": lambda: affine(x, W, b, n_batch_axes=3),
    "dy has another shape": lambda: affine_backward(numpy_ones(2, 5), x, W, b),
    "dy of a vjp has another shape": lambda: affine_vjp(numpy_ones(3), W)[1](dy),
    "kinds of dtypes": lambda: affine(numpy_ones(2, 3, dtype="int32"), W, b),
    "two of another kind": lambda: affine(numpy_ones(2, 3, dtype="int32"), W, numpy_ones(4, dtype="bool")),
    "bool": lambda: affine(numpy_ones(2, 3, dtype="bool"), numpy_ones(3, 4, dtype="bool")),
    "complex": lambda: affine(x, numpy_ones(3, 4, dtype="complex64")),
    "no common dtype": lambda: affine(numpy_ones(2, 3, dtype="int64"), numpy_ones(3, 4, dtype="uint64")),
    "dy of another kind": lambda: affine_backward(numpy_ones(2, 4, dtype="int8"), x, W),
    "no array": lambda: affine([[1.0]], W),
    "no array at all": lambda: affine([[1.0]], [[1.0]]),
    "a tuple of tuples for W": lambda: AffineLayer(((1.0, 2.0),)),
    "x in another library than W and b": lambda: affine(array_api_strict.ones((2, 3)), W, b),
    "dy in another library than all": lambda: affine_backward(array_api_strict.ones((2, 4)), x, W, b),
    "None for W": lambda: affine(x, None),
    "a NumPy scalar": lambda: affine(np.float32(1), W),
    "two libraries": lambda: affine(x, array_api_strict.ones((3, 4)), b),
    "two arrays of another library": lambda: affine(x, array_api_strict.ones((3, 4)), array_api_strict.ones(4)),
    "two devices": lambda: affine(on_device(1, 2, 3), on_device(2, 3, 4)),
    "wrt": lambda: affine_backward(dy, x, W, wrt=("x", "dW")),
    "out of another shape": lambda: affine(x, W, out=numpy_ones(4, 2)),
    "out of another dtype": lambda: affine(x, W, out=numpy_ones(2, 4, dtype="float64")),
    "out of another library": lambda: affine(x, W, out=array_api_strict.ones((2, 4))),
    "out on another device": lambda: affine(on_device(1, 2, 3), on_device(1, 3, 4), out=on_device(2, 2, 4)),
    "out is no array": lambda: affine(x, W, out=[[1.0]]),
    "out is read-only": lambda: affine(x, W, out=read_only(2, 4)),
    "out is broadcast": lambda: affine(x, W, out=np.lib.stride_tricks.as_strided(numpy_ones(4), (2, 4), (0, 4))),
    "outs are no three": lambda: affine_backward(dy, x, W, b, out=(x, W)),
    "outs are no tuple": lambda: affine_backward(dy, x, W, b, out=x),
    "out for what is not computed": lambda: affine_backward(
        dy, x, W, b, wrt=("W",), out=(numpy_ones(2, 3), None, None)
    ),
    "out for a bias that is not there": lambda: affine_backward(dy, x, W, out=(None, None, numpy_ones(4))),
    "one out for two": lambda: affine_backward(
        numpy_ones(2, 2), numpy_ones(2, 2), numpy_ones(2, 2), out=(W[1:, 2:], W[:2, 1:3], None)
    ),
    "out overlaps an operand": lambda: affine(shared[:, :3], W, b, out=shared[:, 2:6]),
    "out of a gradient": lambda: affine_backward(dy, x, W, b, out=(None, numpy_ones(4, 3), None)),
    "backward before forward": lambda: AffineLayer(W).backward(dy),
    "primals are no tuple": lambda: affine_jvp([x, W], (None, None)),
    "tangents are too many": lambda: affine_jvp((x, W, b), (None, None, None, None)),
    "tangent of another shape": lambda: affine_jvp((x, W, b), (None, x, None)),
    "tangent of no bias": lambda: affine_jvp((x, W), (None, None, b)),
    "tangent of another kind": lambda: affine_jvp((x, W, b), (None, None, numpy_ones(4, dtype="int32"))),
    "cotangents are no three": lambda: affine_double_backward((None, None), dy, x, W, b),
    "cotangents are no tuple": lambda: affine_double_backward([None, None, None], dy, x, W, b),
    "cotangent of dx has another shape": lambda: affine_double_backward((W, None, None), dy, x, W, b),
    "cotangent of dW has another shape": lambda: affine_double_backward((None, x, None), dy, x, W, b),
    "cotangent of no bias": lambda: affine_double_backward((None, None, b), dy, x, W),
    "vector is no tuple": lambda: gauss_newton_vector_product(W, lambda y_dot: y_dot, x, W),
    "vector is of another kind": lambda: gauss_newton_vector_product(
        (None, numpy_ones(3, 4, dtype="int32")), lambda y_dot: y_dot, x, W
    ),
    "vector has another shape": lambda: gauss_newton_vector_product((W, x, x), lambda y_dot: y_dot, x, W, b),
    "factors of integers": lambda: kronecker_factors(*[numpy_ones(2, 2, dtype="int32")] * 3),
    "factors of an empty batch": lambda: kronecker_factors(numpy_ones(0, 4), numpy_ones(0, 3), W),
    "norms of integers": lambda: per_sample_gradient_norms(*[numpy_ones(2, 2, dtype="int32")] * 3),
    "norm is not above zero": lambda: clipped_gradients(dy, x, W, b, max_norm=0),
}


def message_of(call: Any) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


def written() -> dict[str, str]:
    blocks = MESSAGES.read_text(encoding="utf-8").strip().split("\n\n")
    return dict(block.split("\n", 1) for block in blocks)


@pytest.mark.parametrize("name", CALLS)
def test_message_is_the_one_that_is_listed(name: str) -> None:
    assert message_of(CALLS[name]) == written()[name]


def test_every_listed_message_is_raised() -> None:
    assert written().keys() == CALLS.keys()


@pytest.mark.parametrize(
    ("x", "W", "b", "options", "words"),
    [
        ((2, 3), (4, 5), None, {}, ["n = 4", "(2, 3)", "(4, 5)", "No n_batch_axes fits", "4 features"]),
        ((2, 3, 4), (4, 5), None, {}, ["the default", "(2, 3, 4)", "(4, 5)", "n_batch_axes = 2 would fit"]),
        ((2, 3, 4), (12, 5), None, {"n_batch_axes": 0}, ["n_batch_axes = 1 would fit"]),
        ((4,), (1, 5), None, {}, ["(4,)", "n_batch_axes = 1 would fit"]),
        ((2, 3), (3,), None, {}, ["W must be 2-D", "(2, 3)", "(3,)"]),
        ((2, 3), (3, 2, 1), None, {}, ["W must be 2-D", "(3, 2, 1)"]),
        ((2, 3), (3, 4), (4, 1), {}, ["(m,) = (4,)", "never broadcast", "(4, 1)"]),
        ((2, 3), (3, 4), (1, 4), {}, ["never broadcast", "(1, 4)"]),
        ((2, 3), (3, 4), (1,), {}, ["never broadcast", "(1,)"]),
        ((2, 3), (3, 4), (), {}, ["never broadcast", "float32 ()"]),
        ((), (1, 4), None, {}, ["at least one axis", "float32 ()"]),
        ((2, 3), (3, 4), None, {"n_batch_axes": 3}, ["3 is out of range", "-2 to 2"]),
        ((2, 3), (3, 4), None, {"n_batch_axes": -3}, ["-3 is out of range"]),
    ],
)
def test_shapes(ones: Any, x: Any, W: Any, b: Any, options: Any, words: list[str]) -> None:
    operands = [ones(*shape) for shape in (x, W, b) if shape is not None]
    for call in (affine, affine_vjp, lambda *a, **o: affine_backward(ones(2, 4), *a, **o)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
            call(*operands, **options)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("n_batch_axes", [True, 1.0, "1", (1,), np.True_, np.asarray(1.0), np.asarray([1])], ids=repr)
def test_batch_axes_that_are_no_int(ones: Any, n_batch_axes: Any) -> None:
    with pytest.raises(TypeError, match="n_batch_axes must be an int or None"):
        affine(ones(2, 3), ones(3, 4), n_batch_axes=n_batch_axes)


class Index:
    """An integer of another type."""

    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "n_batch_axes", [np.int64(1), np.uint8(1), np.asarray(1), Index()], ids=lambda axes: type(axes).__name__
)
def test_batch_axes_of_any_type_of_integer(ones: Any, n_batch_axes: Any) -> None:
    assert affine(ones(2, 3, 1), ones(3, 4), n_batch_axes=n_batch_axes).shape == (2, 4)


@pytest.mark.parametrize("shape", [(2, 5), (1, 4), (4,), (), (2, 4, 1), (3, 4)])
def test_dy_of_another_shape(ones: Any, shape: Any) -> None:
    with pytest.raises(
        ValueError, match=r"dy must have the shape of y, \(2, 4\).*\(2, 3\).*\(3, 4\).*\(4,\)"
    ) as caught:
        affine_backward(ones(*shape), ones(2, 3), ones(3, 4), ones(4))
    assert f"dy is float32 {shape}" in str(caught.value)


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        (("int32", "float32", "float32"), "Cast x to float32 first"),
        (("float32", "int32", "float32"), "Cast W to float32 first"),
        (("float32", "float32", "int32"), "Cast b to float32 first"),
        (("bool", "float32", "float32"), "Cast x to float32 first"),
        (("bool", "bool", "bool"), "Cast x and W and b to float32 first"),
    ],
)
def test_dtypes_of_two_kinds(backend: Backend, ones: Any, dtypes: Any, words: str) -> None:
    operands = {
        name: ones(*shape, dtype=dtype)
        for name, shape, dtype in zip("xWb", ((2, 3), (3, 4), (4,)), dtypes, strict=True)
    }
    with pytest.raises(TypeError, match=words) as caught:
        affine(*operands.values())
    for name, dtype in zip("xWb", dtypes, strict=True):
        assert f"{name} is {dtype}" in str(caught.value)
    names = {**operands, backend.package: importlib.import_module(backend.package)}
    for call in re.findall(r"\S+\([^()]*\)", str(caught.value).rpartition(" first: ")[2]):
        (name,) = set(re.findall(r"\b[xWb]\b", call))
        with backend.on_device_of(operands[name]):
            operands[name] = eval(call, names)  # noqa: S307 - as a reader types it
    assert backend.dtype_name(affine(*operands.values()).dtype) == "float32"


def test_dy_of_another_kind(ones: Any) -> None:
    with pytest.raises(TypeError, match="Cast dy to float32 first"):
        affine_backward(ones(2, 4, dtype="int32"), ones(2, 3), ones(3, 4))


def test_real_operands_with_complex_ones(backend: Backend, ones: Any) -> None:
    if "complex64" in backend.dtypes():
        with pytest.raises(TypeError, match="Cast x to complex64 first"):
            affine(ones(2, 3), ones(3, 4, dtype="complex64"))


def test_dtypes_without_a_common_one(backend: Backend, ones: Any) -> None:
    if {"int64", "uint64"} <= set(backend.dtypes()):
        with pytest.raises(TypeError, match=r"no common dtype of the same kind .* Cast W to int64 first: "):
            affine(ones(2, 3, dtype="int64"), ones(3, 4, dtype="uint64"))


@pytest.mark.parametrize("bad", [[[1.0, 2.0, 3.0]], 3.0, None, "x", np.float64(3)], ids=lambda bad: type(bad).__name__)
def test_what_is_no_array(backend: Backend, ones: Any, bad: Any) -> None:
    library = backend.namespace.removeprefix("array_api_compat.")
    for name, operands in {"x": (bad, ones(3, 4)), "W": (ones(2, 3), bad)}.items():
        advice = rf"for example {library}\.asarray\({name}\)$"
        if bad is None or isinstance(bad, str):
            advice = f"Pass an array for {name}$"
        with pytest.raises(TypeError, match=rf"^{name} is no array .*{advice}"):
            affine(*operands)
    with pytest.raises(TypeError, match="dy is no array"):
        affine_backward(bad, ones(2, 3), ones(3, 4))


def test_arrays_of_two_libraries(backend: Backend, ones: Any) -> None:
    if backend.name == "numpy":
        foreign = array_api_strict.ones((3, 4), dtype=array_api_strict.float32)
    else:
        foreign = np.ones((3, 4), "float32")
    words = r"two libraries: x is float32 \(2, 3\).*W is float32 \(3, 4\).*Bring x to .* first, as by "
    with pytest.raises(TypeError, match=words) as caught:
        affine(ones(2, 3), foreign)
    moved = eval(str(caught.value).rpartition(" by ")[2], {"xaffine": xaffine, "x": ones(2, 3)})  # noqa: S307
    assert affine(moved, foreign).shape == (2, 4)
    W = ones(3, 4)
    with pytest.raises(TypeError, match=rf"Bring x to {backend.name} first, as by ") as caught:
        affine(foreign[:2, :3], W, ones(4))
    advised = str(caught.value).rpartition(" by ")[2]
    moved = eval(advised, {"xaffine": xaffine, "x": foreign[:2, :3], "W": W})  # noqa: S307 - as a reader types it
    assert affine(moved, W, ones(4)).shape == (2, 4)
    with pytest.raises(TypeError, match="two libraries"):
        affine_backward(foreign[:2, :], ones(2, 3), ones(3, 4))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_of_numpy_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"x is no array of .*Make it one first, for example numpy\.asarray\(x\)"):
        affine(np.asmatrix(np.ones((2, 3))), np.ones((3, 4)))


@pytest.mark.parametrize("method", ["filled", "toarray", "todense", "to_numpy"])
def test_advice_for_what_is_no_array_keeps_all_of_it(method: str) -> None:
    """The asarray of NumPy drops the mask of a masked array, and makes one object of a sparse matrix."""
    stranger = type("Stranger", (), {method: None})()
    masked = np.ma.masked_array(np.ones((2, 3)), np.eye(2, 3))
    x, W = np.ones((2, 3)), np.ones((3, 4))
    advice = rf"Make it one first, for example {{name}}\.{method}\("
    for name, call in {
        "x": lambda some: affine(some, W),
        "W": lambda some: affine(x, some),
        "b": lambda some: affine(x, W, some),
        "dy": lambda some: affine_backward(some, x, W),
        "x_dot": lambda some: affine_jvp((x, W), (some, None)),
    }.items():
        for some in (stranger, *([masked] if method == "filled" else [])):
            with pytest.raises(TypeError, match=advice.format(name=name)):
                call(some)
    with pytest.raises(TypeError, match=r"x and W are no arrays.*for example W\.filled\(0\), with the value that"):
        affine([[1.0]], masked)


def test_dtypes_of_one_kind_that_do_not_promote_are_named_so() -> None:
    x, W = (np.ones((2, 2)).astype(dtype) for dtype in (get("numpy").dtype("bfloat16"), "float16"))
    with pytest.raises(TypeError, match=r"numpy has no common dtype of the same kind for these: "):
        affine(x, W)


@pytest.mark.parametrize("wrt", [("y",), ("x", "dW"), "Wb ", None, 5, [["x"]]])
def test_wrt_of_unknown_names(ones: Any, wrt: Any) -> None:
    with pytest.raises(ValueError, match="'x', 'W' and 'b'"):
        affine_backward(ones(2, 4), ones(2, 3), ones(3, 4), wrt=wrt)
