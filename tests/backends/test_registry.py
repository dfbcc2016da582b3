"""The registry: what is here, one by name, and the error that says how to get it."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from xaffine import affine, backends
from xaffine.backends import Backend


def test_values_and_dtypes_survive_the_way_there_and_back(backend: Backend, device: Any) -> None:
    for dtype in backend.dtypes(device):
        if dtype == "bfloat16":
            continue  # NumPy has none to start from
        values = np.arange(6).reshape(2, 3).astype(dtype)
        there = backend.from_numpy(values, device=device)
        assert backends.namespace_of(there) is backend.xp
        assert str(there.dtype).rpartition(".")[2] == dtype
        back = backend.to_numpy(there)
        assert back.dtype == values.dtype
        assert np.array_equal(back, values)


@pytest.mark.parametrize(
    "values",
    [np.ones((0, 3)), np.float32(2) * np.ones(()), np.arange(8.0)[::-2], np.broadcast_to(1.0, (2, 3))],
    ids=["empty", "0-d", "negative strides", "read-only"],
)
def test_any_memory_converts(backend: Backend, values: Any) -> None:
    back = backend.to_numpy(backend.from_numpy(values))
    assert back.shape == values.shape
    assert np.array_equal(back, values)


def test_every_device_takes_arrays(backend: Backend) -> None:
    assert backend.devices
    for device in backend.devices:
        array = backend.from_numpy(np.ones(2, "float32"), device=device)
        assert array.device == device if hasattr(array, "device") else device == "cpu"
        backend.wait(array)
        assert backend.to_numpy(array).tolist() == [1, 1]


def test_version_and_repr(backend: Backend) -> None:
    assert backend.version[0].isdigit()
    assert repr(backend) == f"<xaffine backend {backend.name!r}>"
    assert backend.name in backends.installed()


def test_float32_is_among_the_dtypes(backend: Backend) -> None:
    assert "float32" in backend.dtypes()
    assert "bool" not in backend.dtypes()


def test_numpy_takes_bfloat16_from_ml_dtypes(numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numpy_backend.dtypes()[:2] == ["bfloat16", "float16"]
    assert numpy_backend.dtype("bfloat16").name == "bfloat16"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "bfloat16" not in numpy_backend.dtypes()
    assert "float16" in numpy_backend.dtypes()


def test_bfloat16_is_of_the_kind_of_floats_and_other_strangers_of_none() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    float8 = np.dtype(ml_dtypes.float8_e5m2)
    kinds = {
        dtype.name: [kind for kind in ("integral", "real floating") if backends.is_of_kind(np, dtype, kind)]
        for dtype in (np.dtype(ml_dtypes.bfloat16), float8)
    }
    assert kinds == {"bfloat16": ["real floating"], float8.name: []}
    x = np.ones((2, 2), float8)
    with pytest.raises(TypeError, match=r"of one kind.*: x is float8_e5m2 \(2, 2\) \(numpy on cpu\)"):
        affine(x, x)


def test_precision_of_cupy_is_set_where_its_products_look(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    linalg = types.SimpleNamespace(
        COMPUTE_TYPE_TF32=7, COMPUTE_TYPE_DEFAULT=1, set_compute_type=lambda *what: told.append(what)
    )
    cupy = types.SimpleNamespace(float32="float32")
    for name, module in (("cupy", cupy), ("cupy._core._routines_linalg", linalg)):
        monkeypatch.setitem(sys.modules, name, module)
    backend = backends._REGISTRY["cupy"]
    backend.use_tf32()
    backend.use_full_precision()
    assert told == [("float32", 7), ("float32", 1)]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tensorflow'; the backends are numpy, cupy, torch, jax"):
        backends.get("tensorflow")


@pytest.mark.parametrize(
    ("name", "command"),
    [("cupy", 'pip install "xaffine[cuda13]"'), ("torch", 'pip install "xaffine[torch]"'), ("sparse", "pip install")],
)
def test_absent_library_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        backends.get(name)
    assert command in str(caught.value)
    assert name not in backends.installed()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, library: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    for module in (name, f"array_api_compat.{name}"):
        monkeypatch.setitem(sys.modules, module, library)


def test_library_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "cupy", None)  # what makes `import cupy` raise
    with pytest.raises(ImportError, match=r"cannot be imported \(.*cupy.*\); to renew it: pip install"):
        backends.get("cupy")


def test_cupy_without_a_gpu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 0, CUDARuntimeError=RuntimeError)
    cuda = types.SimpleNamespace(runtime=runtime)
    stand_in(monkeypatch, "cupy", types.SimpleNamespace(cuda=cuda, __version__="14.2.0"))
    with pytest.raises(RuntimeError, match=r"'cupy' is installed \(14\.2\.0\) and finds no CUDA device.*nvidia-smi"):
        backends.get("cupy")


def test_importing_xaffine_imports_no_other_array_library() -> None:
    others = ("cupy", "torch", "jax", "dask", "array_api_strict", "ndonnx", "sparse", "hypothesis", "rich")
    code = f"import sys, xaffine; print([name for name in {others} if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout.strip() == "[]"


@pytest.mark.parametrize(("dtype", "expected"), [("torch.bfloat16", "float32"), ("torch.float64", "float64")])
def test_bfloat16_of_torch_becomes_float32(dtype: str, expected: str) -> None:
    class Tensor:
        """A stand-in for torch's, so that no torch is needed."""

        values = np.ones(2)

        def __init__(self) -> None:
            self.dtype = dtype
            self.detach = self.cpu = self.resolve_conj = self.resolve_neg = lambda: self

        def float(self) -> Any:
            self.values = self.values.astype("float32")
            return self

        def numpy(self) -> np.ndarray:
            return self.values

    assert backends._torch_to_numpy(Tensor()).dtype == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"device": "gpu"}, "gpu"),
        ({"device": None}, None),
        ({"device": types.SimpleNamespace(device_set={1, 2})}, None),
        ({"device": "gpu", "committed": True}, "gpu"),
        ({"device": "gpu", "committed": False}, None),
    ],
)
def test_device_binds_only_what_is_committed_to_one(facts: dict[str, Any], expected: Any) -> None:
    assert backends.device_of(types.SimpleNamespace(**facts)) == expected


def test_devices_are_found_by_their_text(backend: Backend) -> None:
    for device in backend.devices:
        assert backend.device(device) == device
        assert backend.device(str(device).strip("<>")) == device
    with pytest.raises(ValueError, match=f"{backend.name} has no device toaster; it has "):
        backend.device("toaster")


@pytest.mark.parametrize("text", ["<CUDA Device 0>", "cuda:0", "gpu:0"])
def test_gpu_is_the_first_that_is_no_cpu(text: str) -> None:
    backend = dataclasses.replace(backends.get("numpy"), _devices=lambda _: ["cpu", text, "cuda:1"])
    assert backend.device("gpu") == text


def test_dtypes_that_a_device_lacks_are_named_for_other_devices_alone() -> None:
    lacking = {"cpu": ("bfloat16", "int8")}
    backend = dataclasses.replace(backends.get("numpy"), _not_on=lambda device: lacking.get(device, ()))
    assert set(backend.dtypes()) - set(backend.dtypes("cpu")) == {"bfloat16", "int8"}
