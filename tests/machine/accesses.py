"""Instructions that reach memory, wait, or multiply matrices, and the Python text that each becomes.

What they do stands in `memory.py`, `shared.py`, `copies.py`, `matrix.py` and `wgmma.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import matrix, wgmma
from .instructions import EMITTERS as EMITTERS
from .instructions import emits
from .ptx import DTYPES, WIDTHS, Address, Instruction, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from .translate import Emitter


def _space(i: Instruction) -> str:
    spaces = [part.split("::")[0] for part in i.parts if part.split("::")[0] in ("global", "shared", "param")]
    if len(spaces) != 1:
        raise ValueError(i.parts)
    return spaces[0]


_HINTS = (
    "ca",
    "cg",
    "cs",
    "cv",
    "wb",
    "wt",
    "L1",
    "L2",
    "v2",
    "v4",
)  # where a line is kept: no change of meaning (9.7.9.1)


def _only_hints(i: Instruction, *others: str) -> None:
    for part in i.parts[1:-1]:
        if part.split("::")[0] not in (*_HINTS, *others):
            raise ValueError(part)


@emits("ld")
def _ld(e: Emitter, i: Instruction) -> None:
    kind, (d, source) = i.parts[-1], i.operands[:2]
    width, targets = WIDTHS[kind], e.elements(d)
    space = _space(i)
    if space == "param":
        _only_hints(i, "param")
        assert isinstance(source, Address)
        assert isinstance(source.base, Symbol)
        names = list(e.code.program.parameters)
        if source.offset or WIDTHS[e.code.program.parameters[source.base.name]] != width:
            raise ValueError(source)
        e.line(f"t = (w.parameters[{names.index(source.base.name)}],)")
    elif space == "global":
        _only_hints(i, "global", "volatile", "relaxed", "gpu", "sys", "nc")
        strong = "volatile" in i.parts or "relaxed" in i.parts
        where = e.address(source, "u64")
        e.line(f"t = w.load_global({e.site}, {where}, {e.mask}, {width}, {len(targets)}, {strong})")
    else:
        _only_hints(i, "shared", "volatile")
        e.line(f"t = w.load_shared({e.site}, {e.address(source, 'u32')}, {e.mask}, {width}, {len(targets)})")
    for index, target in enumerate(targets):
        if target is None:
            continue
        size = e.size_of(target)
        if size == width:
            e.write(target, f"t[{index}]", f"u{8 * width}")
        else:  # a wider register: zeros or the sign
            signed = kind[0] == "s"
            wide = f"{'s' if signed else 'u'}{8 * size}"
            e.write(target, f"t[{index}].view('{DTYPES[kind]}').astype('{DTYPES[wide]}')", wide)


@emits("st")
def _st(e: Emitter, i: Instruction) -> None:
    kind, (target, source) = i.parts[-1], i.operands[:2]
    width = WIDTHS[kind]
    values = []
    for element in e.elements(source):
        if isinstance(element, Register) and e.size_of(element) > width:
            values.append(f"{e.read(element, f'u{8 * e.size_of(element)}')}.astype('u{width}')")
        else:
            values.append(e.read(element, f"u{8 * width}"))
    listed = f"[{', '.join(values)}]"
    if _space(i) == "global":
        _only_hints(i, "global", "volatile", "relaxed", "gpu", "sys")
        strong = "volatile" in i.parts or "relaxed" in i.parts
        e.line(f"w.store_global({e.site}, {e.address(target, 'u64')}, {e.mask}, {width}, {listed}, {strong})")
    else:
        _only_hints(i, "shared", "volatile")
        e.line(f"w.store_shared({e.site}, {e.address(target, 'u32')}, {e.mask}, {width}, {listed})")


@emits("atom")
def _atom(e: Emitter, i: Instruction) -> None:
    kind, what = i.parts[-1], i.parts[-2]
    if (
        _space(i) != "global"
        or what not in ("exch", "add", "max", "min")
        or kind not in ("b32", "u32", "s32", "u64", "b64")
    ):
        raise ValueError(i.parts)
    orders = [part for part in i.parts if part in ("relaxed", "acquire", "release", "acq_rel")]
    if not set(i.parts[1:-2]) <= {"global", "gpu", "sys", *orders} or len(orders) > 1:
        raise ValueError(i.parts)
    d, source, operand = i.operands
    order = orders[0] if orders else "relaxed"
    where = e.address(source, "u64")
    e.line(f"t = w.atomic({e.site}, {where}, {e.mask}, {e.read(operand, kind)}, {what!r}, {order!r})")
    e.write(d, "t", kind)


@emits("bar", "barrier")
def _bar(e: Emitter, i: Instruction) -> None:
    if i.parts[1] == "warp":
        e.line(f"w.whole({e.site})")
        return
    if i.opcode not in ("bar.sync", "barrier.sync") or [getattr(one, "text", "") for one in i.operands] != ["0"]:
        raise ValueError(i.opcode)
    if i.guard is not None:
        raise ValueError("a barrier under a condition")
    e.line(f"w.barrier({e.site})")


@emits("fence")
def _fence(e: Emitter, i: Instruction) -> None:
    if i.opcode != "fence.proxy.async.shared::cta":
        raise ValueError(i.opcode)
    e.line("w.block.shared.fence_proxy(w)")


@emits("membar")
def _membar(e: Emitter, i: Instruction) -> None:
    if i.opcode != "membar.sys":
        raise ValueError(i.opcode)
    # Only before a trap so far: the host's view is the newest value of everything.


@emits("cvta")
def _cvta(e: Emitter, i: Instruction) -> None:
    if i.opcode != "cvta.to.global.u64":
        raise ValueError(i.opcode)
    e.write(i.operands[0], e.read(i.operands[1], "u64"), "u64")


@emits("prefetch")
def _prefetch(e: Emitter, i: Instruction) -> None:
    pass  # a hint


# Asynchronous copies


@emits("cp")
def _cp(e: Emitter, i: Instruction) -> None:
    name = ".".join(i.parts[:3])
    if name == "cp.async.commit_group":
        e.line("w.copies.commit()")
    elif name == "cp.async.wait_all":
        e.line("w.copies.wait_all(w)")
    elif name == "cp.async.wait_group":
        e.line(f"w.copies.wait(w, {int(i.operands[0].text, 0)})")
    elif name in ("cp.async.ca", "cp.async.cg") and i.parts[3:5] == ("shared", "global"):
        target, source, size, *count = i.operands
        if e.masked:
            raise ValueError("cp.async by a part of a warp")
        size = int(size.text, 0)
        where, whence = e.address(target, "u32"), e.address(source, "u64")
        read = e.read(count[0], "u32") if count else f"np.full(32, {size}, np.uint32)"
        e.line(f"w.copy({e.site}, {where}, {whence}, {size}, {read}, {e.mask})")
    else:
        raise ValueError(i.opcode)


# Matrices


def _registers(e: Emitter, operand: Operand | None, kind: str) -> str:
    return f"[{', '.join(e.read(one, kind) for one in e.elements(operand))}]"


def _unguarded(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise ValueError("under a condition")
    e.line(f"w.whole({e.site})")


@emits("mma")
def _mma(e: Emitter, i: Instruction) -> None:
    _unguarded(e, i)
    _, _, _, shape, left, right, d_kind, a_kind, b_kind, c_kind = i.parts
    if (
        (left, right, d_kind, c_kind) != ("row", "col", "f32", "f32")
        or a_kind != b_kind
        or (shape, 32 if a_kind == "tf32" else 16) not in matrix.SHAPES
    ):
        raise ValueError(i.opcode)
    if a_kind not in ("bf16", "f16", "tf32"):
        raise ValueError(a_kind)
    d, a, b, c = i.operands
    given = ", ".join((_registers(e, a, "b32"), _registers(e, b, "b32"), _registers(e, c, "f32")))
    e.line(f"t = matrix.mma({given}, {shape!r}, {a_kind!r})")
    for index, one in enumerate(e.elements(d)):
        e.write(one, f"t[{index}]", "f32")


@emits("ldmatrix")
def _ldmatrix(e: Emitter, i: Instruction) -> None:
    _unguarded(e, i)
    if (
        i.parts[1:4] != ("sync", "aligned", "m8n8")
        or i.parts[-1] != "b16"
        or i.parts[-2] not in ("shared", "shared::cta")
    ):
        raise ValueError(i.opcode)
    d, source = i.operands
    matrices = int(i.parts[4][1:])
    e.line(f"t = matrix.from_rows(w.load_rows({e.site}, {e.address(source, 'u32')}, {matrices}), {'trans' in i.parts})")
    for index, one in enumerate(e.elements(d)):
        e.write(one, f"t[{index}]", "b32")


@emits("stmatrix")
def _stmatrix(e: Emitter, i: Instruction) -> None:
    if i.guard is not None or i.parts[1:4] != ("sync", "aligned", "m8n8") or i.parts[-1] != "b16":
        raise ValueError(i.opcode)
    target, source = i.operands
    rows = f"matrix.to_rows({_registers(e, source, 'b32')}, {'trans' in i.parts})"
    e.line(f"w.store_rows({e.site}, {e.address(target, 'u32')}, {rows})")


@emits("wgmma")
def _wgmma(e: Emitter, i: Instruction) -> None:
    _unguarded(e, i)
    name = i.parts[1]
    if name == "fence":
        e.line("w.products.fenced = True")
    elif name == "commit_group":
        e.line("w.products.commit()")
    elif name == "wait_group":
        e.line(f"w.products.wait(w, {int(i.operands[0].text, 0)})")
    elif name == "mma_async":
        _wgmma_product(e, i)
    else:
        raise ValueError(name)


def _wgmma_product(e: Emitter, i: Instruction) -> None:
    _, _, _, _, shape, d_kind, kind, b_kind = i.parts
    found = wgmma.SHAPE.match(shape)
    if found is None or d_kind != "f32" or kind != b_kind or kind not in ("bf16", "f16", "tf32"):
        raise ValueError(i.opcode)
    if int(found[2]) != (8 if kind == "tf32" else 16):
        raise ValueError(shape)
    d, a, b, scale, sign_a, sign_b, *transposed = i.operands
    numbers = [e.code.numbers[one.name] for one in e.elements(d)]
    if len(numbers) != int(found[1]) // 2:
        raise ValueError(shape)
    if isinstance(a, Vector):
        left = f"wgmma.a_of_registers({_registers(e, a, 'b32')}, {kind!r})"
        k_major = [True, *(int(one.text) == 0 for one in transposed)]
    else:
        left = f"int({e.read(a, 'u64')}[0])"
        k_major = [int(one.text) == 0 for one in transposed] or [True, True]
    k_major += [True] * (2 - len(k_major))
    sign = int(sign_a.text) * int(sign_b.text)
    scaled = f"bool({e.read(scale, 'pred')}[0])"
    e.line(
        f"w.products.issue(w, wgmma.Product({e.site}, {tuple(numbers)}, {left}, int({e.read(b, 'u64')}[0]), {kind!r}, "
        f"{found[1]}, {scaled}, {sign}, {tuple(k_major)}))"
    )
