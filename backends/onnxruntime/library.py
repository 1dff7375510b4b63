"""The C interface of ONNX Runtime, as far as this engine needs it, by ctypes.

The Python interface offers no operators of one's own without a C++ compiler; the C interface, which
is in the same wheel, takes them as a table of functions. A function has the same number in every
version: new ones are only ever added at the end (`struct OrtApi` in `onnxruntime_c_api.h`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.errors import BackendError, BackendMisconfigured

API_VERSION = 18
"""The first with everything below; any later library offers it."""

_NUMBERS = {
    "GetErrorMessage": 2, "CreateEnv": 3, "CreateSessionFromArray": 8, "Run": 9,
    "CreateSessionOptions": 10, "SetSessionGraphOptimizationLevel": 23,
    "SetIntraOpNumThreads": 24, "CreateCustomOpDomain": 26, "CustomOpDomain_Add": 27,
    "AddCustomOpDomain": 28, "CreateTensorWithDataAsOrtValue": 49, "GetTensorMutableData": 51,
    "GetTensorShapeElementCount": 64, "GetTensorTypeAndShape": 65, "CreateCpuMemoryInfo": 69,
    "KernelInfoGetAttribute_int64": 86, "KernelContext_GetInput": 90,
    "KernelContext_GetOutput": 91, "ReleaseStatus": 93, "ReleaseMemoryInfo": 94,
    "ReleaseSession": 95, "ReleaseValue": 96, "ReleaseTensorTypeAndShapeInfo": 99,
    "ReleaseSessionOptions": 100, "ReleaseCustomOpDomain": 101, "AddSessionConfigEntry": 130,
    "AddExternalInitializers": 210, "KernelContext_ParallelFor": 274,
}  # fmt: skip

_WARNING, _ALL_OPTIMIZATIONS = 2, 99
_ARENA, _DEFAULT_MEMORY = 1, 0
_TYPES = {"float32": 1, "uint8": 2, "int64": 7}

Array = NDArray[Any]


class OnnxRuntimeFailed(BackendError):
    """ONNX Runtime refused what it was asked; the message is its own."""


class _Base(ctypes.Structure):
    _fields_ = (
        ("GetApi", CFUNCTYPE(c_void_p, c_uint32)),
        ("GetVersionString", CFUNCTYPE(c_char_p)),
    )


class Library:
    """The library of the installed wheel, loaded once in a process, with its environment."""

    def __init__(self) -> None:
        base = ctypes.CDLL(str(_find())).OrtGetApiBase
        base.restype = POINTER(_Base)
        self.table = base().contents.GetApi(API_VERSION)
        if not self.table:
            version = base().contents.GetVersionString().decode()
            raise BackendMisconfigured(f"onnxruntime {version} is too old; 1.18 or later is needed")
        self.environment = self.made("CreateEnv", c_int(_WARNING), c_char_p(b"baton"))
        self.memory = self.made("CreateCpuMemoryInfo", c_int(_ARENA), c_int(_DEFAULT_MEMORY))

    def address(self, name: str) -> int:
        """Where a function of the interface is."""
        place = self.table + _NUMBERS[name] * ctypes.sizeof(c_void_p)
        return int(c_void_p.from_address(place).value or 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that answers with a status.

        Raises:
            OnnxRuntimeFailed: the status is an error.
        """
        status = CFUNCTYPE(c_void_p, *map(type, arguments))(self.address(name))(*arguments)
        if status:
            told = CFUNCTYPE(c_char_p, c_void_p)(self.address("GetErrorMessage"))(status)
            self.release("ReleaseStatus", status)
            raise OnnxRuntimeFailed((told or b"").decode(errors="replace"))

    def made(self, name: str, *arguments: Any) -> int:
        """Call a function whose last argument is where it puts what it made."""
        found = c_void_p()
        self.call(name, *arguments, ctypes.pointer(found))
        return int(found.value or 0)

    def release(self, name: str, what: int) -> None:
        """Give back what was made."""
        CFUNCTYPE(None, c_void_p)(self.address(name))(what)

    def tensor(self, array: Array) -> int:
        """A value over the memory of a contiguous array, which must outlive it."""
        shape = (c_int64 * array.ndim)(*array.shape)
        return self.made(
            "CreateTensorWithDataAsOrtValue",
            c_void_p(self.memory),
            c_void_p(array.ctypes.data),
            c_size_t(array.nbytes),
            ctypes.pointer(shape),
            c_size_t(array.ndim),
            c_int(_TYPES[str(array.dtype)]),
        )

    def array(self, value: int) -> NDArray[np.float32]:
        """The numbers of a value of float32, flat; they are gone when the value is released."""
        place = self.made("GetTensorMutableData", c_void_p(value))
        about = self.made("GetTensorTypeAndShape", c_void_p(value))
        count = c_size_t()
        self.call("GetTensorShapeElementCount", c_void_p(about), ctypes.pointer(count))
        self.release("ReleaseTensorTypeAndShapeInfo", about)
        if not count.value:
            return np.empty(0, np.float32)
        numbers: Any = (ctypes.c_float * count.value).from_address(place)
        found: NDArray[np.float32] = np.frombuffer(numbers, np.float32)
        return found


@cache
def library() -> Library:
    """The one library of this process.

    Raises:
        BackendMisconfigured: it is not installed, or too old.
    """
    return Library()


def _find() -> Path:
    spec = find_spec("onnxruntime")  # which does not import it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "capi").glob("libonnxruntime.*")):
            return path
    raise BackendMisconfigured(
        "the library of ONNX Runtime is not installed: `pip install baton-gateway[onnxruntime]`"
    )


# ---- an operator of our own


class _CustomOp(ctypes.Structure):
    """`struct OrtCustomOp`. What it does not fill is null and, being optional, not called."""

    _fields_ = (
        ("version", c_uint32),
        ("CreateKernel", c_void_p),
        ("GetName", CFUNCTYPE(c_void_p, c_void_p)),
        ("GetExecutionProviderType", CFUNCTYPE(c_void_p, c_void_p)),
        ("GetInputType", CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetInputTypeCount", CFUNCTYPE(c_size_t, c_void_p)),
        ("GetOutputType", CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetOutputTypeCount", CFUNCTYPE(c_size_t, c_void_p)),
        ("KernelCompute", c_void_p),
        ("KernelDestroy", CFUNCTYPE(None, c_void_p)),
        ("GetInputCharacteristic", CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetOutputCharacteristic", CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetInputMemoryType", CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetVariadicInputMinArity", CFUNCTYPE(c_int, c_void_p)),
        ("GetVariadicInputHomogeneity", CFUNCTYPE(c_int, c_void_p)),
        ("GetVariadicOutputMinArity", CFUNCTYPE(c_int, c_void_p)),
        ("GetVariadicOutputHomogeneity", CFUNCTYPE(c_int, c_void_p)),
        ("CreateKernelV2", CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_void_p))),
        ("KernelComputeV2", c_void_p),
        ("InferOutputShapeFn", c_void_p),
        ("GetStartVersion", CFUNCTYPE(c_int, c_void_p)),
        ("GetEndVersion", CFUNCTYPE(c_int, c_void_p)),
        *(
            (name, c_void_p)
            for name in ("MayInplace", "ReleaseMayInplace", "Alias", "ReleaseAlias")
        ),
    )


DOMAIN = "baton"
OPERATOR = "PagedAttention"


class Operator:
    """One input and one output of float32, computed at address `compute` for each node.

    `state(layer)` is the address that `compute` gets for the node whose attribute `layer` that is.
    """

    def __init__(self, compute: int, state: Callable[[int], int]) -> None:
        self._library = library()
        self._state = state
        self._name = ctypes.create_string_buffer(OPERATOR.encode())
        name = ctypes.addressof(self._name)
        one, required = 1, 0
        answers: dict[str, Any] = {
            "GetName": lambda _op: name,
            "GetExecutionProviderType": lambda _op: None,
            "GetInputType": lambda _op, _index: _TYPES["float32"],
            "GetInputTypeCount": lambda _op: one,
            "GetOutputType": lambda _op, _index: _TYPES["float32"],
            "GetOutputTypeCount": lambda _op: one,
            "KernelDestroy": lambda _kernel: None,
            "GetInputCharacteristic": lambda _op, _index: required,
            "GetOutputCharacteristic": lambda _op, _index: required,
            "GetInputMemoryType": lambda _op, _index: _DEFAULT_MEMORY,
            "GetVariadicInputMinArity": lambda _op: one,
            "GetVariadicInputHomogeneity": lambda _op: one,
            "GetVariadicOutputMinArity": lambda _op: one,
            "GetVariadicOutputHomogeneity": lambda _op: one,
            "CreateKernelV2": self._create,
            "GetStartVersion": lambda _op: one,
            "GetEndVersion": lambda _op: (1 << 31) - 1,
        }
        kinds: dict[str, Any] = {field[0]: field[1] for field in _CustomOp._fields_}
        self._table = _CustomOp(
            version=API_VERSION,
            KernelComputeV2=compute,
            **{name: kinds[name](function) for name, function in answers.items()},
        )
        self.domain = self._library.made("CreateCustomOpDomain", c_char_p(DOMAIN.encode()))
        self._library.call(
            "CustomOpDomain_Add", c_void_p(self.domain), c_void_p(ctypes.addressof(self._table))
        )

    def _create(self, _op: int, _api: int, info: int, kernel: Any) -> int:
        layer = c_int64()
        self._library.call(
            "KernelInfoGetAttribute_int64",
            c_void_p(info),
            c_char_p(b"layer"),
            ctypes.pointer(layer),
        )
        kernel[0] = self._state(layer.value)
        return 0


# ---- a session


class Session:
    """One graph, ready to run. `weights` are the external initializers that it names."""

    def __init__(
        self, model: bytes, weights: Mapping[str, Array], operator: Operator, threads: int
    ) -> None:
        self._library = library()
        self._operator = operator
        self._session = 0
        options = self._library.made("CreateSessionOptions")
        values = [self._library.tensor(it) for it in weights.values()]
        try:
            told = c_void_p(options)
            self._library.call("SetSessionGraphOptimizationLevel", told, c_int(_ALL_OPTIMIZATIONS))
            self._library.call("SetIntraOpNumThreads", told, c_int(threads))
            self._library.call("AddCustomOpDomain", told, c_void_p(operator.domain))
            names = (c_char_p * len(weights))(*(it.encode() for it in weights))
            self._library.call(
                "AddExternalInitializers",
                told,
                ctypes.pointer(names),
                ctypes.pointer((c_void_p * len(values))(*values)),
                c_size_t(len(values)),
            )
            self._session = self._library.made(
                "CreateSessionFromArray",
                c_void_p(self._library.environment),
                c_char_p(model),
                c_size_t(len(model)),
                told,
            )
        finally:
            self._library.release("ReleaseSessionOptions", options)
            for value in values:
                self._library.release("ReleaseValue", value)

    def run(self, inputs: Mapping[str, Array], output: str) -> NDArray[np.float32]:
        """What the graph computes for `output`, flat.

        Raises:
            OnnxRuntimeFailed: it could not.
        """
        values = [self._library.tensor(it) for it in inputs.values()]
        found = c_void_p()
        try:
            self._library.call(
                "Run",
                c_void_p(self._session),
                c_void_p(),
                ctypes.pointer((c_char_p * len(inputs))(*(it.encode() for it in inputs))),
                ctypes.pointer((c_void_p * len(values))(*values)),
                c_size_t(len(values)),
                ctypes.pointer((c_char_p * 1)(output.encode())),
                c_size_t(1),
                ctypes.pointer(found),
            )
            return self._library.array(int(found.value or 0)).copy()
        finally:
            for value in values:
                self._library.release("ReleaseValue", value)
            if found.value:
                self._library.release("ReleaseValue", found.value)

    def close(self) -> None:
        """Give back threads and weights."""
        self._library.release("ReleaseSession", self._session)
        self._library.release("ReleaseCustomOpDomain", self._operator.domain)
