"""Instructions that compute, and the Python text that each becomes; those that reach memory stand in `accesses.py`.

`EMITTERS` has a function for the first word of an opcode. It writes lines by an `Emitter` (translate.py), in which
operands are vectors of 32 lanes, and raises where it does not know a modifier or a type: any exception here becomes the
MachineError that names the instruction. What is computed stands in `arithmetic.py` and `matrix.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .ptx import DTYPES, WIDTHS, Immediate, Instruction, Operand, Pair, Register, Vector

if TYPE_CHECKING:
    from .translate import Emitter

EMITTERS: dict[str, Callable[[Emitter, Instruction], None]] = {}


def emits(*names: str):
    def register(function):
        EMITTERS.update(dict.fromkeys(names, function))
        return function

    return register


def _unsigned(kind: str) -> str:
    """Where only bits count: s32 -> u32."""
    return "u" + kind[1:] if kind[0] in "sb" else kind


def _modifiers(i: Instruction, *known: str) -> set[str]:
    """The modifiers between name and type; an unknown one is an error."""
    found = set(i.parts[1:-1])
    if not found <= set(known):
        raise ValueError(found)
    return found


_WIDE_FLOATS = ("f32", "f64", "f32x2")


@emits("add", "sub", "mul")
def _sum(e: Emitter, i: Instruction) -> None:
    sign = {"add": "+", "sub": "-", "mul": "*"}[i.parts[0]]
    kind = i.parts[-1]
    d, a, b = i.operands
    if i.parts[0] == "mul" and {"wide", "hi"} & set(i.parts):
        _wide_product(e, i, None)
    elif kind in ("bf16", "f16") and "f32" in i.parts:  # mixed: one operand in 16 bits, widened exactly
        _modifiers(i, "rn", "f32")
        left, right = (_widened(e, one, kind) for one in (a, b))
        e.write(d, f"{left} {sign} {right}", "f32")
    elif kind in _WIDE_FLOATS:
        flush = "ftz" in _modifiers(i, "rn", "ftz")
        left, right = e.read(a, kind), e.read(b, kind)
        found = f"flushed(flushed({left}) {sign} flushed({right}))" if flush else f"{left} {sign} {right}"
        e.write(d, found, kind) if kind != "f32x2" else e.write(d, f"({found}).view('u8')", "b64")
    elif kind in ("bf16", "bf16x2"):
        _modifiers(i, "rn")
        _by_halves(e, i, f"f32_to_bf16(bf16_to_f32({{}}) {sign} bf16_to_f32({{}}))")
    elif kind in ("f16", "f16x2"):
        _modifiers(i, "rn")
        _by_halves(e, i, f"({{}} {sign} {{}}).view('u2')")
    else:
        _modifiers(i, "lo")
        kind = _unsigned(kind)
        e.write(d, f"{e.read(a, kind)} {sign} {e.read(b, kind)}", kind)


def _by_halves(e: Emitter, i: Instruction, form: str) -> None:
    """16-bit arithmetic on one or two values a register: `form` gives uint16."""
    kind = i.parts[-1]
    found = form.format(*(e.read(one, kind) for one in i.operands[1:]))
    if kind.endswith("x2"):
        e.write(i.operands[0], f"({found}).view('u4')", "b32")
    else:
        e.write(i.operands[0], found, "b16")


def _widened(e: Emitter, operand: Operand | None, kind: str) -> str:
    if isinstance(operand, Register) and e.size_of(operand) == 2:
        read = e.read(operand, kind)
        return f"bf16_to_f32({read})" if kind == "bf16" else f"{read}.astype('f4')"
    return e.read(operand, "f32")


def _wide_product(e: Emitter, i: Instruction, onto: Operand | None) -> None:
    """mul.wide, mul.hi and mad.wide."""
    kind, (d, a, b) = i.parts[-1], i.operands[:3]
    if "hi" in i.parts:
        if kind not in ("s32", "u32", "s16", "u16") or onto is not None:
            raise ValueError(kind)
        e.write(d, f"high_product({e.read(a, kind)}, {e.read(b, kind)})", _unsigned(kind))
        return
    wide = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}[kind]
    found = f"{e.read(a, kind)}.astype('{DTYPES[wide]}') * {e.read(b, kind)}"
    if onto is not None:
        found += f" + {e.read(onto, wide)}"
    e.write(d, found, wide)


@emits("mad")
def _mad(e: Emitter, i: Instruction) -> None:
    d, a, b, c = i.operands
    if "wide" in i.parts:
        _wide_product(e, i, c)
    else:
        _modifiers(i, "lo")
        kind = _unsigned(i.parts[-1])
        e.write(d, f"{e.read(a, kind)} * {e.read(b, kind)} + {e.read(c, kind)}", kind)


@emits("fma")
def _fma(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    flush = "ftz" in _modifiers(i, "rn", "ftz", "f32")
    d, a, b, c = i.operands
    if kind in ("bf16", "f16") and "f32" in i.parts:
        left, right, onto = (_widened(e, one, kind) for one in (a, b, c))
        e.write(d, f"fma({left}, {right}, {onto})", "f32")
    elif kind == "f64":
        e.write(d, f"fma64({e.read(a, kind)}, {e.read(b, kind)}, {e.read(c, kind)})", kind)
    elif kind in ("bf16", "bf16x2"):
        _by_halves(e, i, "f32_to_bf16(fma(bf16_to_f32({}), bf16_to_f32({}), bf16_to_f32({})))")
    elif kind in ("f32", "f32x2"):
        found = f"fma({e.read(a, kind)}, {e.read(b, kind)}, {e.read(c, kind)})"
        found = f"flushed({found})" if flush else found
        e.write(d, found, kind) if kind == "f32" else e.write(d, f"{found}.view('u8')", "b64")
    else:
        raise ValueError(kind)


@emits("neg", "abs")
def _sign(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    flush = "ftz" in _modifiers(i, "ftz")
    d, a = i.operands
    if kind == "s32" and i.parts[0] == "neg":
        e.write(d, f"-{e.read(a, 'u32')}", "u32")
    elif kind in ("s64", "s32", "f32", "f64"):
        found = f"-{e.read(a, kind)}" if i.parts[0] == "neg" else f"np.abs({e.read(a, kind)})"
        e.write(d, f"flushed({found})" if flush else found, kind)
    elif kind in ("bf16", "f16", "bf16x2", "f16x2"):
        bits = "b32" if kind.endswith("x2") else "b16"
        signs = 0x80008000 if bits == "b32" else 0x8000
        mask = signs if i.parts[0] == "neg" else signs ^ (0xFFFFFFFF if bits == "b32" else 0xFFFF)
        sign = "^" if i.parts[0] == "neg" else "&"
        e.write(d, f"{e.read(a, bits)} {sign} {e.read(Immediate(hex(mask)), bits)}", bits)
    else:
        raise ValueError(kind)


@emits("min", "max")
def _extreme(e: Emitter, i: Instruction) -> None:
    kind, name = i.parts[-1], i.parts[0]
    nan = "NaN" in _modifiers(i, "NaN", "ftz")
    d, a, b = i.operands
    if kind in ("f32", "f64"):
        function = ("np.minimum" if nan else "np.fmin") if name == "min" else "np.maximum" if nan else "np.fmax"
        e.write(d, f"{function}({e.read(a, kind)}, {e.read(b, kind)})", kind)
    elif kind in ("u16x2", "s16x2"):
        e.write(d, f"np.{name}imum({e.read(a, kind)}, {e.read(b, kind)}).view('u4')", "b32")
    elif kind[0] in "us":
        e.write(d, f"np.{name}imum({e.read(a, kind)}, {e.read(b, kind)})", kind)
    else:
        raise ValueError(kind)


@emits("and", "or", "xor")
def _logic(e: Emitter, i: Instruction) -> None:
    sign, kind = {"and": "&", "or": "|", "xor": "^"}[i.parts[0]], i.parts[1]
    d, a, b = i.operands
    e.write(d, f"{e.read(a, kind)} {sign} {e.read(b, kind)}", kind)


@emits("not")
def _not(e: Emitter, i: Instruction) -> None:
    kind = i.parts[1]
    e.write(i.operands[0], f"~{e.read(i.operands[1], kind)}", kind)


@emits("shl", "shr")
def _shift(e: Emitter, i: Instruction) -> None:
    # NumPy's shifts beyond the width give 0, or the sign, as PTX's do.
    kind = i.parts[1]
    kind = _unsigned(kind) if i.parts[0] == "shl" or kind[0] == "b" else kind
    d, a, by = i.operands
    amount = e.read(by, "u32")
    if kind not in ("u32",):
        amount = f"{amount}.astype('{DTYPES[kind]}')"
    e.write(d, f"{e.read(a, kind)} {'<<' if i.parts[0] == 'shl' else '>>'} {amount}", kind)


@emits("bfe")
def _bfe(e: Emitter, i: Instruction) -> None:
    kind = i.parts[1]
    if kind not in ("u32", "s32"):
        raise ValueError(kind)
    d, a, begin, count = i.operands
    if kind == "u32" and isinstance(begin, Immediate) and isinstance(count, Immediate):
        first, bits = int(begin.text, 0), int(count.text, 0)
        if first < 32 and bits < 32:
            mask = e.read(Immediate(str((1 << bits) - 1)), kind)
            e.write(d, f"({e.read(a, kind)} >> {e.read(begin, kind)}) & {mask}", kind)
            return
    e.write(d, f"extracted({e.read(a, kind)}, {e.read(begin, 'u32')}, {e.read(count, 'u32')})", "u32")


@emits("bfi")
def _bfi(e: Emitter, i: Instruction) -> None:
    if i.parts[1] != "b32":
        raise ValueError(i.parts)
    d, *given = i.operands
    e.write(d, f"inserted({', '.join(e.read(one, 'b32') for one in given)})", "b32")


@emits("prmt")
def _prmt(e: Emitter, i: Instruction) -> None:
    if i.parts[1:] != ("b32",):
        raise ValueError(i.parts)
    d, *given = i.operands
    e.write(d, f"permuted({', '.join(e.read(one, 'b32') for one in given)})", "b32")


@emits("lop3")
def _lop3(e: Emitter, i: Instruction) -> None:
    if i.parts[1:] != ("b32",):
        raise ValueError(i.parts)
    d, *given = i.operands
    e.write(d, f"looked_up({', '.join(e.read(one, 'b32') for one in given)})", "b32")


@emits("shf")
def _shf(e: Emitter, i: Instruction) -> None:
    _, direction, mode, _ = i.parts
    d, *given = i.operands
    e.write(d, f"funnel({', '.join(e.read(one, 'b32') for one in given)}, {direction!r}, {mode!r})", "b32")


_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


def _compared(name: str, a: str, b: str, floating: bool) -> str:
    """NaN: the plain comparisons are false, those ending in u true."""
    if name in ("num", "nan"):
        found = f"(np.isnan({a}) | np.isnan({b}))"
        return f"~{found}" if name == "num" else found
    if name in _COMPARISONS:
        found = f"({a} {_COMPARISONS[name]} {b})"
        return f"({found} & ~np.isnan({a}) & ~np.isnan({b}))" if floating and name == "ne" else found
    return f"(({a} {_COMPARISONS[name[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"


@emits("setp")
def _setp(e: Emitter, i: Instruction) -> None:
    kind, name = i.parts[-1], i.parts[1]
    modifiers = set(i.parts[2:-1]) - {"ftz"}
    if not modifiers <= {"and", "or"}:
        raise ValueError(modifiers)
    d, a, b, *other = i.operands
    if kind in ("bf16x2", "f16x2"):
        low, high = (d.value, d.predicate) if isinstance(d, Pair) else e.elements(d)
        both = [f"bf16_to_f32({e.read(x, kind)})" if kind == "bf16x2" else e.read(x, kind) for x in (a, b)]
        e.line(f"t = {_compared(name, *both, True)}")
        e.write(low, "t[0::2]", "pred")
        e.write(high, "t[1::2]", "pred")
        return
    x, y = e.read(a, kind), e.read(b, kind)
    if kind == "bf16":
        x, y = f"bf16_to_f32({x})", f"bf16_to_f32({y})"
    found = _compared(name, x, y, kind in ("f32", "f64", "bf16", "f16"))
    if modifiers:
        found = f"{found} {'&' if 'and' in modifiers else '|'} {e.read(other[0], 'pred')}"
    e.write(d, found, "pred")


@emits("selp")
def _selp(e: Emitter, i: Instruction) -> None:
    kind = i.parts[1]
    d, a, b, p = i.operands
    e.write(d, f"np.where({e.read(p, 'pred')}, {e.read(a, kind)}, {e.read(b, kind)})", kind)


@emits("mov")
def _mov(e: Emitter, i: Instruction) -> None:
    kind, (d, a) = i.parts[1], i.operands
    kind = kind if kind == "pred" else _unsigned(kind) if kind[0] != "f" else kind
    if isinstance(d, Vector):
        part = {1: None, 2: "u16" if WIDTHS[kind] == 4 else "u32", 4: "u16"}[len(d.elements)]
        assert part is not None
        e.line(f"t = {e.read(a, kind)}.view('{DTYPES[part]}')")
        for index, element in enumerate(d.elements):
            e.write(element, f"t[{index}::{len(d.elements)}].copy()", part)
    elif isinstance(a, Vector):
        part = {8: {2: "u32", 4: "u16"}, 4: {2: "u16"}}[WIDTHS[kind]][len(a.elements)]
        parts = ", ".join(e.read(element, part) for element in a.elements)
        e.write(d, f"np.array([{parts}]).T.copy().view('{DTYPES[kind]}').ravel()", kind)
    else:
        e.write(d, e.read(a, kind), kind)


_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


@emits("cvt")
def _cvt(e: Emitter, i: Instruction) -> None:
    target, source = i.parts[-2:]
    modifiers = set(i.parts[1:-2])
    d, a, *rest = i.operands
    if target in _INTEGERS and source in _INTEGERS and not modifiers:
        read = e.read(a, source) if WIDTHS[source] > 1 else f"{e.read(a, 'b16')}.astype('{DTYPES[source]}')"
        kind = target if WIDTHS[target] > 1 else "u16"
        found = f"{read}.astype('{DTYPES[target]}')" + ("" if WIDTHS[target] > 1 else ".astype('u2')")
        e.write(d, found, kind)
    elif target in ("bf16x2", "f16x2") and source == "f32" and modifiers == {"rn"}:
        high, low = (f"f32_to_{target[:-2]}({e.read(one, 'f32')})" for one in (a, *rest))
        e.write(d, f"packed({high}, {low})", "b32")
    elif target in ("bf16", "f16") and source == "f32" and modifiers == {"rn"}:
        e.write(d, f"f32_to_{target}({e.read(a, 'f32')})", "b16")
    elif target == "f32" and source == "bf16" and modifiers <= {"rn", "ftz"}:
        e.write(d, f"bf16_to_f32({e.read(a, 'b16')})", "f32")
    elif target == "f32" and source == "f16" and modifiers <= {"ftz"}:
        e.write(d, f"{e.read(a, 'f16')}.astype('f4')", "f32")
    elif target == "tf32" and source == "f32" and modifiers == {"rna"}:
        e.write(d, f"to_tf32({e.read(a, 'f32')})", "b32")
    elif target in ("f32", "f64") and source in _INTEGERS[2:] and modifiers == {"rn"}:
        e.write(d, f"{e.read(a, source)}.astype('{DTYPES[target]}')", target)
    elif target == "f64" and source == "f32" and not modifiers:
        e.write(d, f"{e.read(a, source)}.astype('f8')", target)
    elif target == "f32" and source == "f64" and modifiers == {"rn"}:
        e.write(d, f"{e.read(a, source)}.astype('f4')", target)
    elif target in ("u32", "s32") and source in ("f32", "f64") and len(modifiers - {"ftz"}) == 1:
        (rounding,) = modifiers - {"ftz"}
        e.write(d, f"float_to_int({e.read(a, source)}, np.{np.dtype(DTYPES[target]).name}, {rounding!r})", target)
    else:
        raise ValueError(i.opcode)


@emits("ex2", "rcp", "sqrt", "rsqrt", "tanh")
def _approximate(e: Emitter, i: Instruction) -> None:
    if i.parts[1] != "approx" or i.parts[-1] != "f32":
        raise ValueError(i.parts)
    found = f"{i.parts[0]}({e.read(i.operands[1], 'f32')}, w.block.launch.adversary.rounding)"
    e.write(i.operands[0], found, "f32")


@emits("div")
def _div(e: Emitter, i: Instruction) -> None:
    d, a, b = i.operands
    if i.parts == ("div", "rn", "f32"):
        e.write(d, f"({e.read(a, 'f32')} / {e.read(b, 'f32')})", "f32")
    elif i.parts[-1] == "f32" and i.parts[1] in ("full", "approx"):
        kind = f"div.{i.parts[1]}"
        e.write(
            d, f"divide({e.read(a, 'f32')}, {e.read(b, 'f32')}, {kind!r}, w.block.launch.adversary.rounding)", "f32"
        )
    elif i.parts[-1] in ("s32", "u32"):
        kind = i.parts[-1]
        quotient = f"({e.read(a, kind)}.astype('f8') / {e.read(b, kind)})"
        e.write(d, f"np.trunc(np.nan_to_num({quotient}, posinf=0.0, neginf=0.0)).astype('{DTYPES[kind]}')", kind)
    else:
        raise ValueError(i.parts)


@emits("rem")
def _rem(e: Emitter, i: Instruction) -> None:
    kind, (d, a, b) = i.parts[1], i.operands
    if kind not in ("s32", "u32", "s64", "u64"):
        raise ValueError(kind)
    e.write(d, f"np.fmod({e.read(a, kind)}, {e.read(b, kind)})", kind)


# Between lanes


@emits("shfl")
def _shfl(e: Emitter, i: Instruction) -> None:
    _, _, mode, _ = i.parts
    d, a, by, clamp, members = i.operands
    value, predicate = (d.value, d.predicate) if isinstance(d, Pair) else (d, None)
    e.line(f"w.members({e.site}, {e.read(members, 'b32')})")
    e.line(f"t, u = shuffled({e.read(a, 'b32')}, {e.read(by, 'b32')}, {e.read(clamp, 'b32')}, {mode!r})")
    e.write(value, "t", "b32")
    e.write(predicate, "u", "pred")


@emits("redux")
def _redux(e: Emitter, i: Instruction) -> None:
    _, _, what, kind = i.parts
    d, a, members = i.operands
    function = {
        "max": "maximum",
        "min": "minimum",
        "add": "add",
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
    }[what]
    kind = "u32" if kind == "b32" else kind
    e.line(f"w.members({e.site}, {e.read(members, 'b32')})")
    e.write(d, f"np.full(32, np.{function}.reduce({e.read(a, kind)}))", kind)


@emits("vote")
def _vote(e: Emitter, i: Instruction) -> None:
    _, _, what, kind = i.parts
    d, a, members = i.operands
    e.line(f"w.members({e.site}, {e.read(members, 'b32')})")
    read = e.read(a, "pred")
    if what == "ballot":
        e.write(d, f"np.full(32, np.packbits({read}, bitorder='little').view('u4')[0])", "b32")
    elif kind == "pred" and what in ("any", "all"):
        e.write(d, f"np.full(32, {read}.{what}())", "pred")
    else:
        raise ValueError(what)
