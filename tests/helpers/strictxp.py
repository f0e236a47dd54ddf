"""A stand-in for CuPy that needs no GPU: NumPy computes, CuPy's rules apply.

Importing it gives a module to pass where `cupy` would be passed. It refuses what CuPy refuses or
what would make the host wait for the GPU:

- mixing its arrays with NumPy arrays, or handing them to NumPy functions;
- turning an array into a Python number or truth value, iterating over one, boolean-mask indexing,
  `.get()`: all wait for the GPU. `with reading():` allows them where a wait is meant;
- functions, methods and keywords that CuPy does not have (checked against the real package when it
  is installed, GPU or not).

Reductions give 0-d arrays, as CuPy's do, never scalars. `operations` counts what would start a
kernel: functions, operators and methods that compute or copy, not views. `with capturing():` also
refuses what a CUDA graph cannot record: copies from the host, CuPy's products (its cuBLAS handle),
its sorts (they wait).
"""

import collections
import contextlib
import inspect
import operator
import sys
from types import SimpleNamespace

import numpy

try:
    import cupy
except ImportError:
    cupy = None

SCALARS = (bool, int, float, numpy.generic)
VIEWS = set("reshape swapaxes transpose squeeze view broadcast_to expand_dims moveaxis empty "
            "empty_like promote_types finfo result_type can_cast ndim shape".split())
operations = collections.Counter()  # by name
UFUNC_METHODS = {"reduceat": {"add"}, "accumulate": {"add", "multiply"}}
UNRECORDED = {"matmul", "dot", "vdot", "inner", "outer", "einsum", "tensordot", "sort", "argsort",
              "lexsort", "partition", "argpartition", "unique", "nonzero", "searchsorted"}
_may_read = _captures = _clears = False
sys.modules["strictxp"] = sys.modules[__name__]


class Waits(AssertionError):
    """The host would wait for the GPU here."""


@contextlib.contextmanager
def reading():
    """Inside, results may be read back."""
    global _may_read
    before, _may_read = _may_read, True
    try:
        yield
    finally:
        _may_read = before


class Unrecorded(AssertionError):
    """A CUDA graph cannot hold this."""


@contextlib.contextmanager
def capturing(warm_up=False):
    """Inside, as while CuPy's stream is captured, or in the warm-up before, where all is allowed.

    Either way new arrays hold zeros, so that indices fit where no kernel fills them.
    """
    global _captures, _clears
    _captures, _clears = not warm_up, True
    try:
        yield
    finally:
        _captures = _clears = False


def _record(name, *arguments):
    if _captures and name in UNRECORDED:
        raise Unrecorded(f"{name} in a CUDA graph")
    if _captures and any(isinstance(x, numpy.ndarray) for x in arguments):
        raise Unrecorded(f"{name}: a copy from the host in a CUDA graph")


def _read(what):
    if not _may_read:
        raise Waits(f"{what} waits for the GPU")


def _inner(value):
    """NumPy's view of an argument; TypeError for a NumPy array."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, numpy.ndarray):
        raise TypeError("a NumPy array among device arrays")
    if isinstance(value, list | tuple):
        return type(value)(map(_inner, value))
    return value


def _outer(value):
    if isinstance(value, numpy.ndarray | numpy.generic):
        return ndarray(numpy.asarray(value))
    if isinstance(value, list | tuple):
        return type(value)(map(_outer, value))
    return value


def _counted(name, argument, result):
    """The result of an operation, which is counted unless it is its argument, or a view."""
    same = isinstance(argument, ndarray) and getattr(result, "_host", None) is argument._host
    if name not in VIEWS and not same:
        operations[name] += 1
    return result


def _index(index, name=None):
    """NumPy's form of an index; counted as an operation with a name, or where it copies."""
    parts = index if isinstance(index, tuple) else (index,)
    if name or any(isinstance(i, ndarray) for i in parts):
        operations[name or "take"] += 1
    for i in parts:
        if isinstance(i, ndarray) and i.dtype == bool:
            _read("indexing with a mask")
        if isinstance(i, slice) and any(isinstance(x, ndarray) for x in (i.start, i.stop, i.step)):
            raise TypeError("a device array as a bound of a slice")
    return _inner(index)


class ndarray:
    """A device array."""

    __array_ufunc__ = None
    __hash__ = None
    __module__ = "strictxp"  # arrays name a package, as CuPy's do: `dispatch.array_module`

    def __init__(self, host):
        self._host = host

    def __array__(self, *_, **__):
        raise TypeError("a device array handed to NumPy")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} of a device array")

    def get(self):
        _read(".get()")
        return self._host.copy()

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        raise Waits("iterating over a device array")

    def __getitem__(self, index):
        return _outer(self._host[_index(index)])

    def __setitem__(self, index, value):
        self._host[_index(index, "copy")] = _inner(value)

    def __getattr__(self, name):
        if name.startswith("__") or cupy is not None and not hasattr(cupy.ndarray, name):
            raise AttributeError(f"cupy.ndarray has no {name}")
        if name in ("item", "tolist", "tobytes"):
            _read(f".{name}()")
        value = getattr(self._host, name)
        if name == "data":
            return SimpleNamespace(ptr=self._host.ctypes.data)
        if not callable(value):
            return _outer(value)
        _record(name)
        return lambda *args, **options: _counted(name, self, _outer(
            value(*map(_inner, args), **{k: _inner(v) for k, v in options.items()})))


def _operator(name, function):
    def apply(self, other):
        if not isinstance(other, (ndarray, *SCALARS)):
            raise TypeError(f"{name} of a device array and {type(other)}")
        return _counted(name, self, _outer(function(self._host, _inner(other))))

    def reflected(self, other):
        if not isinstance(other, SCALARS):
            raise TypeError(f"{name} of {type(other)} and a device array")
        return _counted(name, self, _outer(function(other, self._host)))

    def in_place(self, other):
        if not isinstance(other, (ndarray, *SCALARS)):
            raise TypeError(f"{name} of a device array and {type(other)}")
        operations[name] += 1
        self._host[...] = function(self._host, _inner(other))
        return self

    setattr(ndarray, f"__{name}__", apply)
    setattr(ndarray, f"__r{name}__", reflected)
    setattr(ndarray, f"__i{name}__", in_place)


for _name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split():
    _operator(_name, getattr(operator, _name + "_" * (_name in ("and", "or"))))


def _matmul(self, other):
    if not isinstance(other, ndarray):
        raise TypeError(f"product of a device array and {type(other)}")
    _record("matmul")
    return _counted("matmul", self, _outer(self._host @ other._host))


ndarray.__matmul__ = _matmul


def _plain(name, function):
    setattr(ndarray, f"__{name}__", lambda self, *other: _counted(name, self, _outer(
        function(self._host, *map(_inner, other)))))


for _name in "lt le gt ge eq ne neg abs invert".split():
    _plain(_name, getattr(operator, _name))
for _name, _function in (("float", float), ("int", int), ("bool", bool)):
    def _convert(self, name=_name, function=_function):
        _read(f"{name}()")
        return function(self._host)
    setattr(ndarray, f"__{_name}__", _convert)


class _Function:
    def __init__(self, name):
        self.name, self.function = name, getattr(numpy, name)
        self.signature = None
        if cupy is not None and not isinstance(self.function, numpy.ufunc):
            with contextlib.suppress(ValueError, TypeError):
                self.signature = inspect.signature(getattr(cupy, name))

    def __call__(self, *args, **options):
        if self.signature is not None:
            self.signature.bind(*args, **options)  # TypeError for what CuPy does not take
        _record(self.name, *args)
        if _clears and self.name in ("empty", "empty_like"):
            return _outer(numpy.zeros_like(_inner(args[0]), *args[1:], **options)
                          if self.name == "empty_like" else numpy.zeros(*args, **options))
        if self.name in ("asarray", "array"):  # the way in: from NumPy as well
            args = (args[0]._host if isinstance(args[0], ndarray) else args[0], *args[1:])
            return _counted(self.name, None, _outer(numpy.array(*args, **options)))
        return _counted(self.name, args[0] if args else None, _outer(self.function(
            *map(_inner, args), **{k: _inner(v) for k, v in options.items()})))

    def __getattr__(self, method):
        if self.name not in UFUNC_METHODS.get(method, ()):
            raise AttributeError(f"cupy.{self.name} has no {method}")
        call = getattr(self.function, method)
        return lambda *args, **options: _outer(
            call(*map(_inner, args), **{k: _inner(v) for k, v in options.items()}))


class lib:
    """Of cupy.lib what gives views."""

    class stride_tricks:
        @staticmethod
        def as_strided(x, shape=None, strides=None):
            return _outer(numpy.lib.stride_tricks.as_strided(_inner(x), shape, strides))


def __getattr__(name):
    if cupy is not None and not hasattr(cupy, name):
        raise AttributeError(f"cupy has no {name}")
    value = getattr(numpy, name)
    return _Function(name) if callable(value) and not isinstance(value, type) else value
