"""The registry: what is here, one by name, and the error that says how to get it."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from unittest import mock

import array_api_compat
import array_api_strict
import numpy as np
import pytest

import xaffine
from tests.helpers import case_on
from xaffine import affine, affine_vjp, backends
from xaffine.backends import Backend
from xaffine.testing import make_case


def test_values_and_dtypes_survive_the_way_there_and_back(backend: Backend, device: Any) -> None:
    for dtype in backend.dtypes(device):
        if dtype == "bfloat16":
            continue  # NumPy has none to start from
        values = np.arange(6).reshape(2, 3).astype(dtype)
        there = backend.from_numpy(values, device=device)
        assert backends.backend_of(there) is backend
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


def test_names_are_those_that_a_type_checker_knows() -> None:
    assert get_args(backends.Name) == tuple(backends._INSTALL) == backends.names()


def test_version_and_repr(backend: Backend) -> None:
    assert backend.version[0].isdigit()
    assert repr(backend) == f"<xaffine backend {backend.name!r}>"
    assert backend.name in backends.installed()


def test_float32_is_among_the_dtypes(backend: Backend) -> None:
    assert "float32" in backend.dtypes()
    assert "bool" not in backend.dtypes()


def test_arrays_are_cast_to_every_dtype(backend: Backend, device: object) -> None:
    for name in backend.dtypes(device):
        array = backend.from_values(np.ones(2), name, device=device)
        with backend.on_device_of(array):
            cast = backend.xp.astype(array, backend.dtype(name))
        assert backend.dtype_name(cast.dtype) == name


def test_numpy_takes_bfloat16_from_ml_dtypes(numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numpy_backend.dtypes()[:2] == ["bfloat16", "float16"]
    assert numpy_backend.dtype("bfloat16").name == "bfloat16"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "bfloat16" not in numpy_backend.dtypes()
    assert "float16" in numpy_backend.dtypes()


def test_bfloat16_is_of_the_kind_of_floats_and_other_strangers_of_none(numpy_backend: Backend) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    float8 = np.dtype(ml_dtypes.float8_e5m2)
    kinds = {
        dtype.name: numpy_backend.kind(dtype)
        for dtype in (np.dtype(ml_dtypes.bfloat16), float8, np.dtype(bool), np.dtype("M8[s]"), np.dtype("uint8"))
    }
    assert kinds == {
        "bfloat16": "real floating", float8.name: None, "bool": None, "datetime64[s]": None, "uint8": "integral",
    }  # fmt: skip
    x = np.ones((2, 2), float8)
    with pytest.raises(TypeError, match=r"of one kind.*: x is float8_e5m2 \(2, 2\) \(numpy on cpu\)"):
        affine(x, x)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tensorflow'; the backends are numpy, cupy, torch, jax"):
        backends.get("tensorflow")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cupy", 'pip install "cupy-cuda13x[ctk]"'),
        ("torch", "pip install torch"),
        ("dask", 'pip install "dask[array]"'),
    ],
)
def test_absent_library_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        backends.get(name)
    assert command in str(caught.value)
    assert caught.value.name == name
    assert name not in backends.installed()


def test_library_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.delitem(sys.modules, "xaffine.backends.sparse", raising=False)
    monkeypatch.setitem(sys.modules, "sparse", None)  # what makes `import sparse` raise
    words = r"cannot be imported \(.*sparse.*\); to renew it: pip install sparse"
    with pytest.raises(ImportError, match=words) as caught:
        backends.get("sparse")
    assert caught.value.name == "sparse"


def test_library_that_cannot_run_here_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend
) -> None:
    monkeypatch.setattr(type(numpy_backend), "why_unusable", lambda _: "no CUDA device\nIt needs a GPU")
    with pytest.raises(RuntimeError) as caught:
        backends.get("numpy")
    assert str(caught.value) == (
        f"the backend 'numpy' is installed ({np.__version__}) and finds no CUDA device\nIt needs a GPU"
    )


def test_importing_xaffine_imports_no_other_array_library() -> None:
    others = ("cupy", "torch", "jax", "dask", "array_api_strict", "ndonnx", "sparse", "hypothesis", "rich")
    code = f"import sys, xaffine; print([name for name in {others} if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout.strip() == "[]"


def test_sub_modules_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, xaffine\n"
        "print({'testing', 'affine'} <= set(dir(xaffine)), hasattr(xaffine, 'nothing'))\n"
        "print([name for name in xaffine.__all__ if f'xaffine.{name}' in sys.modules])\n"
        "print(xaffine.testing.check_affine.__name__, xaffine.curvature.__name__, xaffine.per_sample.__name__)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout.splitlines() == [
        "True False", "['backends', 'initializers']", "check_affine xaffine.curvature xaffine.per_sample"
    ]  # fmt: skip


def test_hints_of_types_can_be_read_at_run_time() -> None:
    for module in (xaffine.functional, xaffine.curvature, xaffine.per_sample):
        for name in module.__all__:
            assert typing.get_type_hints(getattr(module, name))


def test_devices_are_found_by_their_text(backend: Backend) -> None:
    for device in backend.devices:
        assert backend.device(device) == device
        assert backend.device(str(device).strip("<>")) == device
    with pytest.raises(ValueError, match=f"{backend.name} has no device toaster; it has "):
        backend.device("toaster")


@pytest.mark.parametrize("text", ["<CUDA Device 0>", "cuda:0", "gpu:0"])
def test_gpu_is_the_first_that_is_no_cpu(monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, text: str) -> None:
    monkeypatch.setattr(type(numpy_backend), "devices", ["cpu", text, "cuda:1"])
    assert numpy_backend.device("gpu") == text


def test_dtypes_that_a_device_lacks_are_named_for_other_devices_alone(
    monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend
) -> None:
    lacking = {"cpu": ("bfloat16", "int8")}
    monkeypatch.setattr(type(numpy_backend), "missing_on", lambda _, device: lacking.get(device, ()))
    assert set(numpy_backend.dtypes()) - set(numpy_backend.dtypes("cpu")) == {"bfloat16", "int8"}


def test_a_backend_is_one_object_also_after_a_pickle(backend: Backend, ones: Any) -> None:
    again = pickle.loads(pickle.dumps(backend))  # noqa: S301 - our own
    assert again is backend is backends.get(backend.name) is backends.backend_of(ones(2)) is copy.deepcopy(backend)


@pytest.mark.parametrize(
    "stranger",
    [[1.0], 1.0, None, np.float32(1), np.ma.ones(2), np.bool_(1)],
    ids=lambda stranger: type(stranger).__name__,
)
def test_what_is_no_array_has_no_backend(stranger: Any) -> None:
    with pytest.raises(TypeError):
        backends.backend_of(stranger)


def test_scalars_of_numpy_are_refused_by_their_name() -> None:
    with pytest.raises(TypeError, match=r"^float32 does not follow the array API standard$"):
        backends.backend_of(np.float32(1))


def test_subclasses_and_structures_of_numpy_have_its_backend(numpy_backend: Backend, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "array", "f", "w+", shape=(2,))
    for array in (mapped, np.ones(2).view(np.recarray), np.zeros(2, [("a", "f")]), np.ones(2)):
        assert backends.backend_of(array) is numpy_backend


def test_tangents_of_integers_on_jax_are_no_arrays_of_numpy(
    numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are structured arrays of NumPy, which array-api-compat knows once JAX was imported."""
    strict, own = backends.get("array-api-strict"), array_api_compat.array_namespace
    monkeypatch.setattr(
        array_api_compat, "array_namespace", lambda array: own(array) if array.dtype.names is None else strict.xp
    )
    plain, tangent = np.ones(2), np.zeros(2, [("float0", "V")])
    with mock.patch.dict(backends._BY_TYPE, clear=True):
        found = [backends.backend_of(array) for array in (tangent, plain, tangent, plain)]
        assert found == [strict, numpy_backend] * 2
        assert backends._BY_TYPE[np.ndarray] is numpy_backend


class TestLibraryWithoutAFile:
    """Its arrays are computed with by the standard alone; array-api-strict without its entry is such a library."""

    @pytest.fixture
    def stranger(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
        files = {file: name for file, name in backends._FILES.items() if name != "array-api-strict"}
        monkeypatch.setattr(backends, "_FILES", files)
        monkeypatch.setattr(backends, "_OTHERS", {})
        with mock.patch.dict(backends._BY_TYPE, clear=True):
            yield backends.backend_of(array_api_strict.ones(2))

    def test_has_a_backend_that_knows_the_standard(self, stranger: Backend) -> None:
        assert type(stranger) is Backend
        assert (stranger.name, stranger.package, stranger.install) == ("array_api_strict", "array_api_strict", "")
        assert stranger.xp is array_api_strict
        assert pickle.loads(pickle.dumps(stranger)) is stranger  # noqa: S301 - our own
        with pytest.raises(ValueError, match="no backend is called 'array_api_strict'"):
            backends.get("array_api_strict")

    @pytest.mark.usefixtures("stranger")
    def test_its_namespace_need_not_be_found_by_its_name(self) -> None:
        for name in ("nowhere.first", "nowhere.second"):
            namespace = ModuleType(name)
            kind = type("Array", (), {"__array_namespace__": lambda _, namespace=namespace, **__: namespace})
            backend = backends.backend_of(kind())
            assert (backend.name, backend.xp) == (name, namespace)

    def test_is_computed_with_and_named(self, stranger: Backend) -> None:
        case = make_case((3, 4), 2, seed=0)
        dy, x, W, b = case_on(case, stranger)
        y, vjp = affine_vjp(x, W, b)
        results = {"y": y, **pickle.loads(pickle.dumps(vjp))(dy)._asdict()}  # noqa: S301 - our own
        for name, result in results.items():
            assert type(result) is type(x)
            assert np.array_equal(np.asarray(result), case.exact()[name].value), name
        with pytest.raises(
            TypeError, match=r"two libraries: x is float32 \(3, 4\) \(array_api_strict on .*Bring x to numpy"
        ):
            affine(x, case.W.values)

    def test_its_arrays_can_be_moved(self, stranger: Backend) -> None:
        x = stranger.from_numpy(np.ones((2, 3), "f"))
        moved = backends.move(x, backends.get("numpy"), dtype="float64")
        assert (type(moved), moved.dtype, moved.tolist()) == (np.ndarray, np.float64, [[1] * 3] * 2)
        assert type(backends.move(moved, stranger)) is type(x)


class TestMove:
    @pytest.fixture
    def strict(self) -> Backend:
        return backends.get("array-api-strict")  # whose devices differ in their dtypes

    def test_goes_to_a_device_in_its_dtypes(self, strict: Backend, numpy_backend: Backend) -> None:
        device = strict.device("array_api_strict.Device('no_float64')")
        moved = backends.move(np.arange(3.0), strict, device=device, dtype="float32")
        assert (moved.device, moved.dtype) == (device, strict.xp.float32)
        back = backends.move(moved, numpy_backend, dtype="float64")
        assert (back.dtype, back.tolist()) == (np.float64, [0, 1, 2])
        assert backends.move(moved, strict) is moved
        cpu = strict.devices[0]  # where there is a float64, unlike where it comes from
        wide = backends.move(moved, strict, device=cpu, dtype="float64")
        assert (wide.device, wide.dtype) == (cpu, strict.xp.float64)

    def test_names_the_dtypes_of_the_device(self, strict: Backend) -> None:
        device = strict.device("array_api_strict.Device('no_x64')")
        there = strict.from_numpy(np.ones(2, "f"), device=device)
        words = (
            r"^array-api-strict has no dtype 'float64' on array_api_strict\.Device\('no_x64'\); it has "
            r"complex64, float32, int16, int32, int8, uint16, uint32, uint8$"
        )
        for array in (np.ones(2), there):
            with pytest.raises(ValueError, match=words):
                backends.move(array, strict, device=device, dtype="float64")
        with pytest.raises(ValueError, match=words):
            backends.move(there, strict, dtype="float64")  # where it is
        with pytest.raises(ValueError, match=r"^array-api-strict has no dtype 'float16'; it has complex128, "):
            backends.move(np.ones(2, np.float16), strict)

    @pytest.mark.parametrize(
        ("own", "other", "kind"),
        [("complex64", "float32", "complex"), ("int8", "float32", "integer"), ("float32", "uint8", "floating")],
    )
    def test_stays_among_dtypes_of_its_kind(self, numpy_backend: Backend, own: str, other: str, kind: str) -> None:
        with pytest.raises(
            TypeError, match=f"^{own} and {other} are dtypes of two kinds: stay among those of {kind} numbers$"
        ):
            backends.move(np.ones(2, own), numpy_backend, dtype=other)

    def test_is_a_copy_with_and_without_dlpack(self, strict: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in range(2):
            array = np.ones(2)
            moved = backends.move(array, strict)
            array[0] = 5
            assert strict.to_numpy(moved).tolist() == [1, 1]
            monkeypatch.setattr(strict.xp, "from_dlpack", None)
