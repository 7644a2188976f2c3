"""A configuration of a Triton kernel: what Triton compiles it for, how the table describes it, and the two hashes it has there.

`key` is of the source, which is there at once. `ir` is of what the compiler made of it before architecture and warps count, the
optimised TTIR (40 ms): sources that differ in it no more than in names, helpers and places compile alike.
"""

import ast
import functools
import hashlib
import re
import textwrap

import torch
import triton
from triton._C.libtriton import ir as mlir
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
COMPILED_FOR = ("num_warps", "num_stages")
_TTIR: dict[str, str] = {}


@functools.cache
def code(kernel: JITFunction) -> str:
    """Hash of a kernel's code and of the functions and constants of ours that it names, without comments and docstrings."""
    tree = ast.parse(textwrap.dedent(kernel.src))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    parts = [ast.unparse(tree)]
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = kernel.fn.__globals__.get(name)
        if isinstance(value, JITFunction):
            parts.append(code(value))
        elif isinstance(value, triton.language.constexpr | int | float | str):
            parts.append(f"{name} = {value}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def key(launch: tuple, arch: int) -> str:
    """What names a configuration in the table: the hash of all that its compilation depends on but the compiler."""
    kernel, args = launch
    return _hash(code(kernel), arch, *specialised(kernel, args), list(compile_options(args).values()))


def specialised(kernel, args: dict) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that Triton's launcher would derive from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, args[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def variant(signature: dict, constants: dict) -> str:
    """What tells launches of one kernel apart, beyond tile and head dimension."""
    words = [str(constants[name]) for name in ("LOSS", "TERM", "SIZE", "DIVERGENCE") if name in constants]
    words += [name.lower() for name in ("ADD", "EACH", "SCALED", "GRADIENT", "CAREFUL") if constants.get(name) is True]
    words += [f"{name.lower()} {constants[name]}" for name in ("GROUP", "SPLIT", "BK") if constants.get(name, 1) != 1]
    optional = {
        "p_mask": "key mask",
        "p_share": "split lse",
        "p_size": "slice",
        "p_limit": "sink filter",
        "p_cosine": "cosine",
        "p_others": "no lse",
        "windows": "windows",
    }
    words += [text for name, text in optional.items() if signature.get(name, "constexpr") != "constexpr"]
    left_out = {"p_dq": "dlse alone", "p_dlse": "dq alone"}
    return ", ".join(words + [text for name, text in left_out.items() if constants.get(name, "") is None])


def source(launch: tuple) -> ASTSource:
    """A launch as Triton compiles it."""
    kernel, args = launch
    signature, constants, attributes = specialised(kernel, args)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_options(args: dict) -> dict:
    """Of a launch's arguments, the options that it is compiled with."""
    return {name: args[name] for name in COMPILED_FOR if name in args}


def described(launch: tuple, arch: int) -> dict:
    """What the table says of a configuration before it is compiled."""
    kernel, args = launch
    signature, constants, _ = specialised(kernel, args)
    return {
        "kernel": kernel.__name__,
        "variant": variant(signature, constants),
        "arch": arch,
        "tile": "x".join(str(args[name]) for name in ("BM", "BN", "BR", "BV") if name in constants),
        **compile_options(args),
    }


def ttir(launch: tuple, arch: int) -> str:
    """A launch's optimised TTIR without locations and names of the source, its constants where they are used.

    The order in which the compiler puts constants before everything else is that in which it met them, and says nothing. What
    is made for one architecture and number of warps serves for all: no kernel asks for them, and passes begin to afterwards.
    """
    name = _hash(code(launch[0]), *specialised(*launch))
    if name not in _TTIR:
        _TTIR[name] = _in_place(_made_ttir(launch, arch))
    return _TTIR[name]


def _made_ttir(launch: tuple, arch: int) -> str:
    target = GPUTarget("cuda", arch, 32)
    compiler, context, stages = make_backend(target), mlir.context(), {}
    options = compiler.parse_options(compile_options(launch[1]))
    mlir.load_dialects(context)
    compiler.load_dialects(context)
    compiler.add_stages(stages, options, Language.TRITON)
    functions, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
    return stages["ttir"](source(launch).make_ir(target, options, functions, modules, context), {}).str_nodebug()


def _in_place(text: str) -> str:
    definition = re.compile(r"^ *(%\w+) = (arith\.constant .*)\n", re.MULTILINE)
    constants = dict(definition.findall(text))
    return re.sub(r"%\w+", lambda name: constants.get(name[0], name[0]), definition.sub("", text))


def ir(launch: tuple, arch: int) -> str:
    """What else names a configuration: the hash of its IR, of what this is compiled for, and of the table's description.

    Configurations of one hash have one row but for the key, dtype and head dimension.
    """
    return _hash(ttir(launch, arch), described(launch, arch))


def _hash(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
