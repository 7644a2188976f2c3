"""What the texts of a compiled kernel, TTGIR, PTX and the log of ptxas, say about its matrix products and its loops.

Products are those by matrix instructions. Loops are those that hold a product and no such loop within; of several loops
that with most counts.
"""

import re

PRODUCT = r"\btt\.dot .*-> tensor<.*#mma|\bttng\.(?:warp_group_dot|tc_gen5_mma) "
MATRIX_INSTRUCTION = r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)"


def register_wgmma(ptx: str) -> int:
    """Hopper matrix instructions whose left operand comes from registers."""
    operands = (m.group(0).split("}", 1)[1] for m in re.finditer(r"wgmma\.mma_async[^;]*\}[^;]*;", ptx))
    return sum("{" in o for o in operands)


def transposed_register_operands(ttgir: str) -> int:
    """Hopper dots whose left operand is a transposed tensor in registers, of which the bundled ptxas makes wrong code."""
    made = {}
    for line in ttgir.splitlines():
        if match := re.match(r"\s*(%[\w#:]+) = \"?([\w.]+)\"?(.*)", line):
            made[match[1].split(":")[0]] = match[2], re.findall(r"%[\w]+", match[3])

    def transposed(name: str) -> bool:
        op, operands = made.get(name, ("", []))
        if op == "tt.trans":
            return True
        same_place = op.startswith(("arith.", "math.", "tt.fp_to_fp", "ttg.convert_layout", "ttg.local_"))
        return same_place and any(transposed(operand) for operand in operands)

    lefts = re.findall(r"ttng\.warp_group_dot (%\w+),.*? : tensor<", ttgir)
    return sum(transposed(left) for left in lefts)


def matrix_layouts(ttgir: str) -> dict[str, list[list[int]]]:
    """Of the layouts of results of matrix instructions, the warps along each axis and the shape of an instruction."""
    layouts = re.findall(
        r"(#\w+) = #ttg\.nvidia_mma<\{[^}]*?warpsPerCTA = \[([\d, ]+)\][^}]*?instrShape = \[([\d, ]+)\]", ttgir
    )
    return {name: [[int(n) for n in numbers.split(", ")] for numbers in layout] for name, *layout in layouts}


def replicated_products(ttgir: str, product: str) -> int:
    """Products by ``product`` (an operation) of which several warps compute the same tiles, being more than it has tiles."""
    layouts, found = matrix_layouts(ttgir), 0
    for *size, layout in re.findall(rf"{product} .*?-> tensor<(\d+)x(\d+)x\w+, (#\w+)>", ttgir):
        warps, shape = layouts.get(layout, ([], []))  # no matrix instructions
        found += any(w * n > int(extent) for w, n, extent in zip(warps, shape, size, strict=False))
    return found


def wgmma_products(ttgir: str) -> int:
    """Products by Hopper's own matrix instructions, which take 64 rows or more, in the loop with most."""
    return max((loop.count("ttng.warp_group_dot ") for loop in ttgir_loops(ttgir)), default=0)


def serialised_wgmma(log: str) -> int:
    """Functions in which ptxas waits after every Hopper matrix instruction, as it warns."""
    return len(re.findall(r"\bC7515\b", log))


def innermost(found: list[tuple[int, int]], lines: list[str], product: str) -> list[str]:
    """Of loops given by their first and last lines, the texts of those with a product and without such a loop within."""
    with_product = [(a, b) for a, b in found if re.search(product, "\n".join(lines[a : b + 1]))]
    return [
        "\n".join(lines[a : b + 1])
        for a, b in with_product
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in with_product)
    ]


def ttgir_loops(ttgir: str) -> list[str]:
    """The innermost loops of a kernel that hold a product."""
    lines, found = ttgir.splitlines(), []
    for start, line in enumerate(lines):
        if "scf.for" in line or "scf.while" in line:
            depth = len(line) - len(line.lstrip())
            found.append((start, next(i for i in range(start + 1, len(lines)) if lines[i][: depth + 1].strip())))
    return innermost(found, lines, PRODUCT)


def ptx_loops(ptx: str) -> list[str]:
    """The innermost loops of a kernel that hold a matrix instruction."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    found = {}
    for stop, line in enumerate(lines):
        if (match := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)) and labels[match[1]] < stop:
            found[labels[match[1]]] = stop  # the last branch back
    return innermost(list(found.items()), lines, MATRIX_INSTRUCTION)


def tile_conversions(ttgir: str) -> int:
    """Tiles that loops move between threads: changes of layout, but for those of a product that becomes a left operand.

    Vectors are not counted: one number of each thread moves.
    """
    warps = {name: layout[0] for name, layout in matrix_layouts(ttgir).items()}
    conversion = r"ttg\.convert_layout .*? : tensor<(\d+)x(\d+)x\w+, (.*)> -> tensor<\d+x\d+x\w+, (.*)>"

    def moves(rows: str, columns: str, source: str, target: str) -> bool:
        left = re.search(r"dot_op<\{opIdx = 0, parent = (#\w+),", target)
        in_place = left and source in warps and warps[source] == warps.get(left[1])
        return min(int(rows), int(columns)) > 1 and not in_place

    return max((sum(moves(*found) for found in re.findall(conversion, loop)) for loop in ttgir_loops(ttgir)), default=0)


def shared_accesses(ttgir: str, ptx: str) -> float:
    """Ordinary loads and stores of shared memory by a thread (LDS, STS) per product, over all loops."""
    products = sum(len(re.findall(PRODUCT, loop)) for loop in ttgir_loops(ttgir))
    accesses = sum(len(re.findall(r"\b(?:ld|st)\.shared", loop)) for loop in ptx_loops(ptx))
    return round(accesses / max(products, 1), 1)


def narrow_loads(ptx: str) -> int:
    """Loads of two bytes of global memory (LDG.U16) in loops."""
    return max((len(re.findall(r"\bld\.global[^;]*?\.[bu]16\s", loop)) for loop in ptx_loops(ptx)), default=0)
