"""What only ndonnx has: shapes that are unknown until the exported model runs."""

from __future__ import annotations

from typing import Any

import ndonnx as ndx
import numpy as np
import onnxruntime
import pytest

from xaffine import affine_vjp
from xaffine.testing import make_case
from xaffine.testing.cases import worst_error


def exported(features: tuple[int, ...], m: int) -> onnxruntime.InferenceSession:
    """Forward and backward with an unknown batch size as an ONNX model."""
    n = int(np.prod(features))
    shapes: dict[str, Any] = {"x": ("N", *features), "W": (n, m), "b": (m,), "dy": ("N", m)}
    inputs = {name: ndx.argument(shape=shape, dtype=ndx.float32) for name, shape in shapes.items()}
    y, vjp = affine_vjp(inputs["x"], inputs["W"], inputs["b"])
    model = ndx.build(inputs, {"y": y, **vjp(inputs["dy"])._asdict()})
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("features", [(6,), (2, 3)])
def test_exported_layer_runs_on_any_batch_size(features: tuple[int, ...]) -> None:
    session = exported(features, 4)
    names = [output.name for output in session.get_outputs()]
    for seed, N in enumerate((1, 2, 3, 7, 31, 0)):
        case = make_case((N, *features), 4, seed=seed)
        feeds = {name: getattr(case, name).values for name in ("x", "W", "b", "dy")}
        exact = case.exact()
        for name, result in zip(names, session.run(None, feeds), strict=True):
            assert result.shape == exact[name].value.shape
            assert worst_error(result, exact[name])[0] == 0, (name, N)


def test_unknown_extents_pass_and_known_ones_are_checked() -> None:
    x = ndx.argument(shape=("N", 3), dtype=ndx.float32)
    with pytest.raises(ValueError, match=r"W takes n = 4: x is float32 \(\?, 3\)"):
        affine_vjp(x, ndx.argument(shape=(4, 5), dtype=ndx.float32))


@pytest.mark.parametrize(
    ("shape", "n", "n_batch_axes"), [(("N", 0, 3), 0, 1), (("N", 2, 3), 3, 2), (("A", "B", 3), 3, 2)]
)
def test_shapes_that_onnx_cannot_infer_say_what_to_do(shape: Any, n: int, n_batch_axes: int) -> None:
    x = ndx.argument(shape=shape, dtype=ndx.float32)
    with pytest.raises(ValueError, match="before its unknown extents"):
        affine_vjp(x, ndx.argument(shape=(n, 0), dtype=ndx.float32), n_batch_axes=n_batch_axes)


def test_each_product_is_one_node_where_the_extents_are_known() -> None:
    shapes = {"x": (5, 6), "W": (6, 4), "b": (4,), "dy": (5, 4)}
    x, W, b, dy = (ndx.argument(shape=shape, dtype=ndx.float32) for shape in shapes.values())
    y, vjp = affine_vjp(x, W, b)
    model = ndx.build(dict(zip(shapes, (x, W, b, dy), strict=True)), {"y": y, **vjp(dy)._asdict()})
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMul") == 3
    assert "If" not in kinds
