"""Triton's interpreter with less bookkeeping: the same numbers and checks in less than half of the time.

The interpreter spends most of its time on types: every operation builds and checks the types of its blocks again, compares
their shapes element by element and patches the language. `hasten` keeps what does not change between calls.
"""

import builtins
import functools
import operator

import numpy as np


def hasten():
    """Replace parts of the interpreter of this process. Triton must have been imported with TRITON_INTERPRET=1."""
    _patch_once()
    _know_numpy_types()
    _know_shapes()
    _broadcast_by_shape()
    _compare_types_by_identity()
    _check_overflow_in_numpy()


def _patch_once():
    """A device function need not patch the language that the kernel which calls it has patched."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter.InterpretedFunction.__call__

    @functools.cache
    def languages(function):
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def call(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.arange) for language in languages(self.fn)):
            return patch(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _know_numpy_types():
    """The numpy type of a block, which is looked up in a dictionary that is built for each."""
    from triton.runtime import interpreter

    find, known = interpreter._get_np_dtype, {}

    def numpy_type(type):
        name = str(type.scalar)
        if name not in known:
            known[name] = find(type)
        return known[name]

    interpreter._get_np_dtype = numpy_type


def _know_shapes():
    """Blocks of one shape share one checked shape; a block's name is made when it is asked for."""
    from triton.language import core

    check, shapes, constants = core.block_type.__init__, {}, {}

    def block_type(self, element_ty, shape):
        key = builtins.tuple([n.value if isinstance(n, core.constexpr) else n for n in shape])
        if key not in shapes:
            check(self, element_ty, shape)
            shapes[key] = self.shape, self.numel
            constants[id(self.shape)] = core.constexpr(self.numel), core.tuple([core.constexpr(n) for n in key])
        self.element_ty = element_ty
        self.shape, self.numel = shapes[key]

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.is_block():
            self.numel, self.shape = constants[id(type.shape)]
        else:
            self.numel, self.shape = core.constexpr(1), core.tuple([])

    core.block_type.name = property(
        lambda self: f"<{self.shape}, {self.element_ty}>",
        lambda self, name: None,
    )
    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor


def _broadcast_by_shape():
    """How two shapes become one is decided once; operands of one shape, or without one, stay as they are."""
    from triton.language.semantic import TritonSemantic

    broadcast, known = TritonSemantic.broadcast_impl_value, {}

    def broadcast_impl_value(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        blocks = left.is_block(), right.is_block()
        if not any(blocks) or (all(blocks) and left.shape is right.shape):
            return lhs, rhs
        if not all(blocks) or len(left.shape) != len(right.shape):
            return broadcast(self, lhs, rhs)
        pair = id(left.shape), id(right.shape)  # of shapes that stay (`_know_shapes`)
        if pair not in known:
            known[pair] = [x.type.shape for x in broadcast(self, lhs, rhs)]
        return tuple(map(self.broadcast_impl_shape, (lhs, rhs), known[pair]))

    def broadcast_impl_shape(self, input, shape):
        return input if input.type.is_block() and input.type.shape is shape else to_shape(self, input, shape)

    to_shape = TritonSemantic.broadcast_impl_shape
    TritonSemantic.broadcast_impl_shape = broadcast_impl_shape
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _compare_types_by_identity():
    """A type is equal to itself, whatever its name."""
    from triton.language import core

    equal = core.dtype.__eq__
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _check_overflow_in_numpy():
    """That a sum, difference or product of integers is one of their type: in numpy, not by eleven operations of blocks."""
    from triton.language.semantic import TritonSemantic

    operations = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}

    def binary_op_sanitize_overflow_impl(self, lhs, rhs, binary_op):
        scalar = lhs.type.scalar
        if scalar.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        assert scalar == rhs.type.scalar and scalar.is_int()
        left, right = (np.asarray(x.handle.data).astype(np.int64) for x in (lhs, rhs))
        result = operations[binary_op.__name__](left, right)
        if result.min() < scalar.get_int_min_value() or result.max() > scalar.get_int_max_value():
            raise AssertionError(f"int{scalar.int_bitwidth} overflow detected for operation {binary_op.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = binary_op_sanitize_overflow_impl
