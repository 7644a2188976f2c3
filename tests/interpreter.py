"""Triton's interpreter with less bookkeeping: the same numbers and checks in less than half of the time.

The interpreter spends most of its time on types: every operation builds and checks the types of its blocks again, compares
their shapes element by element and patches the language. `hasten` keeps what does not change between calls.
"""

import builtins
import functools
import operator
import re

import numpy as np


def hasten():
    """Replace parts of the interpreter of this process. Triton must have been imported with TRITON_INTERPRET=1."""
    _patch_once()
    _know_patches()
    _know_numpy_types()
    _know_shapes()
    _know_constants()
    _broadcast_by_shape()
    _compare_types_by_identity()
    _know_common_types()
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


def _know_patches():
    """What a launch replaces in the language is looked up once; the replacements call the functions themselves."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, semantic, known = interpreter._patch_lang, interpreter.interpreter_semantic, {}

    def direct(original):
        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return original(*args, **kwargs)

        return call

    def operator_of(name, swapped):
        operate, unwrap = getattr(semantic, name), tl.core._unwrap_if_constexpr
        if swapped:
            return lambda self, other: operate(unwrap(other), self, True)
        return lambda self, other: operate(self, other if type(other) is tl.tensor else unwrap(other), True)

    def replacement(owner, name):
        arithmetic = re.fullmatch("__(r?)(add|sub|mul)__", name)
        if owner is tl.tensor and arithmetic:
            return operator_of(arithmetic[2], arithmetic[1])
        found = getattr(owner, name)
        member = (getattr(found, "__kwdefaults__", None) or {}).get("member")
        return direct(member.__wrapped__) if hasattr(member, "__wrapped__") else found

    def patch_language(function):
        key = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if key not in known:
            scope, first = patch(function), {}
            for owner, name, original in scope._changes:
                first.setdefault((id(owner), name), (owner, name, original))
            known[key] = [(*change, replacement(*change[:2])) for change in first.values()]
            scope.restore()
        scope = interpreter._LangPatchScope()
        scope._changes = [change[:3] for change in known[key]]
        for owner, name, _, new in known[key]:
            setattr(owner, name, new)
        return scope

    interpreter._patch_lang = patch_language


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

    check, shapes, constants, types = core.block_type.__init__, {}, {}, {}

    def block_type(self, element_ty, shape):
        key = builtins.tuple([n.value if isinstance(n, core.constexpr) else n for n in shape])
        if key not in shapes:
            check(self, element_ty, shape)
            shapes[key] = self.shape, self.numel
            constants[id(self.shape)] = core.constexpr(self.numel), core.tuple([core.constexpr(n) for n in key])
        self.element_ty = element_ty
        self.shape, self.numel = shapes[key]

    scalar = core.constexpr(1), core.tuple([])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = constants[id(type.shape)] if type.is_block() else scalar

    def with_element_ty(self, element_ty):
        if element_ty.is_ptr():
            return core.block_type(element_ty, self.shape)
        key = id(element_ty), id(self.shape)
        if key not in types:
            types[key] = core.block_type(element_ty, self.shape)
        return types[key]

    core.block_type.name = property(
        lambda self: f"<{self.shape}, {self.element_ty}>",
        lambda self, name: None,
    )
    core.block_type.__init__ = block_type
    core.block_type.with_element_ty = with_element_ty
    core.tensor.__init__ = tensor


def _know_constants():
    """A number of a type is one tensor, which nothing changes; the sizes of two types are compared once."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    make, numbers, sizes = TritonSemantic.scalar_constant, {}, set()

    def scalar_constant(self, value, dtype):
        key = type(value), value or str(value), id(dtype)  # 0.0 and -0.0 are equal
        if key not in numbers:
            numbers[key] = make(self, value, dtype)
        return numbers[key]

    def handle(self, data, dtype, attr=None):
        self.data, self.dtype = data, dtype
        self.attr = {} if attr is None else attr
        key = data.dtype.num, id(dtype)
        if key not in sizes:
            self.__post_init__()
            if not dtype.is_ptr():
                sizes.add(key)

    TritonSemantic.scalar_constant = scalar_constant
    interpreter.TensorHandle.__init__ = handle


def _broadcast_by_shape():
    """How two shapes become one is decided once; operands of one shape, or without one, stay as they are."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    broadcast, known = TritonSemantic.broadcast_impl_value, {}

    def broadcast_impl_value(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        blocks = left.is_block(), right.is_block()
        if not any(blocks) or (all(blocks) and left.shape is right.shape):
            return lhs, rhs
        if not all(blocks) or len(left.shape) != len(right.shape):
            return broadcast(self, lhs, rhs)
        shape = shape_of_both(self, lhs, rhs)
        return self.broadcast_impl_shape(lhs, shape), self.broadcast_impl_shape(rhs, shape)

    def shape_of_both(self, lhs, rhs):
        pair = id(lhs.type.shape), id(rhs.type.shape)  # of shapes that stay (`_know_shapes`)
        if pair not in known:
            known[pair] = broadcast(self, lhs, rhs)[0].type.shape
        return known[pair]

    def broadcast_impl_shape(self, input, shape):
        return input if input.type.is_block() and input.type.shape is shape else to_shape(self, input, shape)

    def with_one_shape(self, left, right):
        """Both with the type of what numpy makes of them; their data stay as they are."""
        a, b = left.type, right.type
        if a.is_block() and b.is_block():
            if a.shape is b.shape:
                return left, right
            if len(a.shape) != len(b.shape):
                return self.broadcast_impl_value(left, right)
            shape = shape_of_both(self, left, right)
            if a.shape is not shape:
                left = core.tensor(left.handle, core.block_type(a.scalar, shape))
            if b.shape is not shape:
                right = core.tensor(right.handle, core.block_type(b.scalar, shape))
        elif a.is_block():
            right = core.tensor(right.handle, a.with_element_ty(b.scalar))
        elif b.is_block():
            left = core.tensor(left.handle, b.with_element_ty(a.scalar))
        return left, right

    to_shape = TritonSemantic.broadcast_impl_shape
    TritonSemantic.broadcast_impl_shape = broadcast_impl_shape
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    TritonSemantic.with_one_shape = with_one_shape


def _know_common_types():
    """The type that two operands are computed in is looked up. Their data keep their shapes, which numpy makes one."""
    from triton import language as tl
    from triton.language.semantic import TritonSemantic

    check, common = TritonSemantic.binary_op_type_checking_impl, {}
    tensor = tl.tensor

    def common_type(self, left, right, div_or_mod):
        key = id(left), id(right), div_or_mod  # of types that stay: pointers are no operands here
        if key not in common:
            common[key] = self.computation_type_impl(left, False, right, False, div_or_mod)
        return common[key]

    def number_of(self, x, number):
        """A number as a tensor of x's type, or None where the types decide."""
        dtype = x.dtype
        if type(number) is int and dtype.is_int() and not dtype.is_bool():
            fits = dtype.get_int_min_value() <= number <= dtype.get_int_max_value()
            return self.scalar_constant(number, dtype=dtype) if fits else None
        if type(number) in (int, float) and dtype.is_floating() and dtype.primitive_bitwidth > 16:
            return self.scalar_constant(number, dtype=dtype)
        return None

    def binary_op_type_checking_impl(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        left, right = lhs, rhs
        if type(rhs) is not tensor and type(lhs) is tensor:
            right = number_of(self, lhs, rhs) if arithmetic_check else None
        elif type(lhs) is not tensor and type(rhs) is tensor:
            left = number_of(self, rhs, lhs) if arithmetic_check else None
        if type(left) is not tensor or type(right) is not tensor:
            return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        a, b = left.dtype, right.dtype
        if a.is_ptr() or b.is_ptr():
            if not (a.is_ptr() and allow_lhs_ptr and b.is_int()):
                return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        elif arithmetic_check:
            dtype = common_type(self, a, b, div_or_mod)
            left = left if dtype is a else self.cast(left, dtype)
            right = right if dtype is b else self.cast(right, dtype)
        return self.with_one_shape(left, right)

    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl


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
