"""A program -> Python functions over NumPy vectors, one for every segment.

A segment is a run of instructions that a warp executes at a stretch: it begins at a label, behind a branch, or at an
instruction that other warps and programs can notice (an access to global memory, an atomic, a barrier, a wait), so that
the scheduler may let somebody else go first. Interpreting one instruction at a time would cost ten times as much.

Every segment exists twice: for warps whose lanes are all active, and for the rest, where only active lanes take part.
Both are made when they are first needed. A register holds a vector of 32 numbers in the type in which it is used most;
an instruction that wants its bits as another type takes a view.

`_EMITTERS` is the list of instructions the machine knows, with the code each becomes. Any other is a MachineError that
names it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic, matrix, wgmma
from .faults import MachineError
from .ptx import SIZES, Address, Immediate, Instruction, Operand, Pair, Program, Register, Symbol, Vector, parse
from .shared import BASE
from .warp import END, Warp

if TYPE_CHECKING:
    from .scheduler import Adversary

Segment = Callable[[Warp, list[np.ndarray]], int]

DTYPES = {"b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2"}
DTYPES |= {"b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8"}
DTYPES |= {"f32x2": "f4", "u16x2": "u2", "s16x2": "i2", "f16x2": "f2", "bf16x2": "u2", "pred": "?"}
WIDTHS = SIZES | {"f32x2": 8, "u16x2": 4, "s16x2": 4, "f16x2": 4, "bf16x2": 4, "bf16": 2, "tf32": 4}

# Where others may notice that this instruction comes before or after one of theirs.
_NOTICED = (
    "ld.global",
    "ld.volatile",
    "ld.relaxed",
    "ld.acquire",
    "st.global",
    "st.volatile",
    "st.relaxed",
    "st.release",
)
_NOTICED += ("atom.", "cp.async.wait", "wgmma.wait", "fence", "membar")


def _noticed(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(_NOTICED)


def _is_barrier(instruction: Instruction) -> bool:
    """What the warp may have to wait at ends its segment."""
    return instruction.parts[0] in ("bar", "barrier") and instruction.parts[1] != "warp"


class Code:
    """A program ready to run. source: the Python text of the segments made so far, by number and kind."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers = {name: index for index, name in enumerate(program.registers)}
        self.types = _register_types(program)
        instructions = program.instructions
        starts = {0, len(instructions)} | {program.labels[name] for name in _targets(program)}
        for index, instruction in enumerate(instructions):
            if _ends_block(instruction) or _is_barrier(instruction):
                starts.add(index + 1)
            elif _noticed(instruction):
                starts.add(index)
        self.starts = sorted(start for start in starts if start < len(instructions))
        self.segment_at = {start: number for number, start in enumerate(self.starts)}
        self.segment_at[len(instructions)] = END
        self.meets = _post_dominators(self)
        self.functions: dict[tuple[int, bool], Segment] = {}
        self.source: dict[tuple[int, bool], str] = {}
        opcodes = {instruction.opcode for instruction in instructions}
        self.releases = any(".release" in opcode or ".acq_rel" in opcode for opcode in opcodes)
        self.by_proxy = any(opcode.startswith("wgmma") for opcode in opcodes)
        self.global_granule = min([4, *(_width(o) for o in opcodes if re.match(r"st\.(\w+\.)*global", o))])
        self.shared_granule = min(
            [
                4,
                *(_width(o) for o in opcodes if re.match(r"(ld|st)\.(\w+\.)*shared", o)),
                *(2 for o in opcodes if "matrix" in o or "wgmma" in o),
            ]
        )
        self.statics: dict[str, int] = {}
        end = BASE
        for name, size in program.shared.items():
            self.statics[name] = end
            end += size

    def segment(self, number: int, masked: bool) -> Segment:
        found = self.functions.get((number, masked))
        if found is None:
            emitter = _Emitter(self, masked)
            emitter.segment(number)
            self.source[number, masked] = text = emitter.text()
            scope = dict(emitter.constants, np=np, **_HELPERS)
            exec(compile(text, f"<{self.program.name} segment {number}>", "exec"), scope)
            found = self.functions[number, masked] = scope["segment"]
        return found

    def new_registers(self, adversary: Adversary) -> list[np.ndarray]:
        """Poison: a kernel's results must not depend on what it has not written."""
        words = np.full(32, adversary.poison, np.uint64)
        kinds = {
            kind: words.view(kind)[:32].copy() if kind != "?" else adversary.lanes((32,)) for kind in set(self.types)
        }
        return [kinds[kind] for kind in self.types]


@lru_cache(maxsize=512)
def code_of(ptx: str) -> Code:
    return Code(parse(ptx))


def _width(opcode: str) -> int:
    return next(WIDTHS[part] for part in reversed(opcode.split(".")) if part in WIDTHS)


def _ends_block(instruction: Instruction) -> bool:
    return instruction.parts[0] in ("bra", "ret", "exit", "trap")


def _targets(program: Program) -> set[str]:
    return {
        operand.name
        for instruction in program.instructions
        if instruction.parts[0] == "bra"
        for operand in instruction.operands
        if isinstance(operand, Symbol)
    }


def _register_types(program: Program) -> list[str]:
    """NumPy's type of every register: the one it is used as most."""
    votes = {name: Counter() for name in program.registers}  # type: dict[str, Counter[str]]
    for instruction in program.instructions:
        kinds = [DTYPES[part] for part in instruction.parts if part in DTYPES and WIDTHS.get(part, 0) <= 8]
        for position, operand in enumerate(instruction.operands):
            if isinstance(operand, Register) and kinds:
                votes[operand.name][kinds[0] if position == 0 or len(kinds) == 1 else kinds[-1]] += 1
    types = []
    for name, kind in program.registers.items():
        plain = DTYPES[kind]
        same_size = [used for used in votes[name] if used[1:] == plain[1:] and used[0] in "uf"]
        types.append(max(same_size, key=lambda used: votes[name][used], default=plain) if plain != "?" else plain)
    return types


def _post_dominators(code: Code) -> dict[int, int]:
    """Segment -> where the sides of a branch at its end meet again; END if nowhere before the end."""
    instructions, count = code.program.instructions, len(code.starts)
    successors: list[list[int]] = []
    for number in range(count):
        end = code.starts[number + 1] if number + 1 < count else len(instructions)
        last = instructions[end - 1]
        follows = code.segment_at[end]
        if last.parts[0] == "bra":
            target = last.operands[0]
            assert isinstance(target, Symbol)
            there = code.segment_at[code.program.labels[target.name]]
            successors.append([there] if last.guard is None else [there, follows])
        elif last.parts[0] in ("ret", "exit", "trap"):
            successors.append([END] if last.guard is None else [END, follows])
        else:
            successors.append([follows])
    everything = frozenset(range(count)) | {END}
    found = dict.fromkeys(range(count), everything) | {END: frozenset([END])}
    changed = True
    while changed:
        changed = False
        for number in range(count - 1, -1, -1):
            common = frozenset.intersection(*(found[other] for other in successors[number])) | {number}
            if common != found[number]:
                found[number], changed = common, True
    # Of all that every path passes, the first: the one that has the most behind it.
    return {number: max(found[number] - {number}, key=lambda other: len(found[other])) for number in range(count)}


_HELPERS = {name: value for name, value in vars(arithmetic).items() if callable(value)}
_HELPERS |= {"matrix": matrix, "wgmma": wgmma}


class _Emitter:
    """Writes the Python text of one segment."""

    def __init__(self, code: Code, masked: bool) -> None:
        self.code, self.masked = code, masked
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self.names: dict[object, str] = {}
        self.instruction: Instruction = code.program.instructions[0]
        self.guard = ""  # expression of the lanes that take part, "" for all

    def text(self) -> str:
        return "def segment(w, r):\n" + "\n".join(f"    {line}" for line in self.lines) + "\n"

    def line(self, text: str) -> None:
        self.lines.append(text)

    def constant(self, value: object, key: object = None) -> str:
        key = id(value) if key is None else key
        if key not in self.names:
            self.names[key] = f"k{len(self.names)}"
            self.constants[self.names[key]] = value
        return self.names[key]

    def segment(self, number: int) -> None:
        code, instructions = self.code, self.code.program.instructions
        end = code.starts[number + 1] if number + 1 < len(code.starts) else len(instructions)
        for index in range(code.starts[number], end):
            self.instruction = instruction = instructions[index]
            if _ends_block(instruction):
                self._leave(instruction, number, code.segment_at[index + 1])
                return
            self._emit(instruction)
        self.line(f"return {code.segment_at[end]}")

    def _leave(self, instruction: Instruction, number: int, follows: int) -> None:
        kind = instruction.parts[0]
        if kind == "bra":
            target = instruction.operands[0]
            assert isinstance(target, Symbol)
            there = self.code.segment_at[self.code.program.labels[target.name]]
        elif kind == "trap":
            if instruction.guard is not None:
                self.line(f"if ({self._guard_of(instruction)}).any(): return w.trap({self.site})")
                self.line(f"return {follows}")
            else:
                self.line(f"return w.trap({self.site})")
            return
        else:
            there = END
        if instruction.guard is None:
            self.line(f"return {there}")
        else:
            self.line(f"return w.branch({self._guard_of(instruction)}, {there}, {follows}, {self.code.meets[number]})")

    def _guard_of(self, instruction: Instruction) -> str:
        assert instruction.guard is not None
        register = f"r[{self.code.numbers[instruction.guard.register]}]"
        return f"~{register}" if instruction.guard.negated else register

    def _emit(self, instruction: Instruction) -> None:
        self.guard = "" if instruction.guard is None else self._guard_of(instruction)
        if self.masked:
            self.guard = f"w.mask & {self.guard}" if self.guard else "w.mask"
        if self.guard:
            self.line(f"m = {self.guard}")
            self.guard = "m"
        emit = _EMITTERS.get(instruction.parts[0])
        if emit is None:
            raise self.unknown()
        try:
            emit(self, instruction)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, StopIteration) as error:
            raise self.unknown() from error

    def unknown(self) -> MachineError:
        return MachineError(
            f"{self.code.program.name}: an instruction that the machine does not know: {self.instruction}"
        )

    # Operands

    @property
    def site(self) -> str:
        return self.constant(self.instruction)

    @property
    def mask(self) -> str:
        """The lanes that take part, as an argument."""
        return self.guard or "None"

    def read(self, operand: Operand | None, kind: str) -> str:
        """An expression of the operand's bits as `kind`."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            number = self.code.numbers[operand.name]
            own = self.code.types[number]
            if own != "?" and int(own[1:]) > WIDTHS[kind]:  # the low bits of a wider register (9.4.1)
                return f"r[{number}].view('u{own[1:]}').astype('u{WIDTHS[kind]}').view('{dtype}')"
            return f"r[{number}]" if own == dtype else f"r[{number}].view('{dtype}')"
        if isinstance(operand, Immediate):
            packed = f"u{WIDTHS[kind]}" if kind.endswith("x2") else dtype
            return self.constant(_number(operand.text, packed).view(dtype), (operand.text, packed, dtype))
        if isinstance(operand, Symbol) and operand.name.startswith("%"):
            return f"w.special[{operand.name!r}]"
        if isinstance(operand, Symbol) and operand.name in self.code.statics:
            return self.constant(np.full(32, self.code.statics[operand.name], dtype), (operand.name, dtype))
        raise self.unknown()

    def write(self, operand: Operand | None, expression: str, kind: str) -> None:
        """`expression` has NumPy's type of `kind`."""
        if operand is None:
            return
        if not isinstance(operand, Register):
            raise self.unknown()
        number = self.code.numbers[operand.name]
        own = self.code.types[number]
        if own != DTYPES[kind]:
            expression = f"({expression}).view('{own}')"
        if self.guard:
            expression = f"np.where({self.guard}, {expression}, r[{number}])"
        self.line(f"r[{number}] = {expression}")

    def elements(self, operand: Operand | None) -> tuple[Operand | None, ...]:
        return operand.elements if isinstance(operand, Vector) else (operand,)

    def address(self, operand: Operand | None, kind: str) -> str:
        if not isinstance(operand, Address):
            raise self.unknown()
        base = self.read(operand.base, kind)
        if operand.offset == 0:
            return base
        wrapped = operand.offset % (1 << (8 * WIDTHS[kind]))
        return f"{base} + {self.constant(np.full(32, wrapped, DTYPES[kind]), (wrapped, kind, 'offset'))}"

    def size_of(self, operand: Operand | None) -> int:
        assert isinstance(operand, Register)
        return WIDTHS[self.code.program.registers[operand.name]]


def _number(text: str, dtype: str) -> np.ndarray:
    """A literal as a vector."""
    if text[:2].lower() in ("0f", "0d"):
        size = 4 if text[1] in "fF" else 8
        bits = np.full(32, int(text[2:], 16), f"u{size}")
        return bits.view(dtype) if np.dtype(dtype).itemsize == size else bits.view(f"f{size}").astype(dtype)
    value = int(text, 0)
    if dtype == "?":
        return np.full(32, value != 0)
    size = np.dtype(dtype).itemsize
    return np.full(32, value % (1 << (8 * size)), f"u{size}").view(dtype)


# The instructions

_EMITTERS: dict[str, Callable[[_Emitter, Instruction], None]] = {}


def _emits(*names: str):
    def register(function):
        _EMITTERS.update(dict.fromkeys(names, function))
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


@_emits("add", "sub", "mul")
def _sum(e: _Emitter, i: Instruction) -> None:
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


def _by_halves(e: _Emitter, i: Instruction, form: str) -> None:
    """16-bit arithmetic on one or two values a register: `form` gives uint16."""
    kind = i.parts[-1]
    found = form.format(*(e.read(one, kind) for one in i.operands[1:]))
    if kind.endswith("x2"):
        e.write(i.operands[0], f"({found}).view('u4')", "b32")
    else:
        e.write(i.operands[0], found, "b16")


def _widened(e: _Emitter, operand: Operand | None, kind: str) -> str:
    if isinstance(operand, Register) and e.size_of(operand) == 2:
        read = e.read(operand, kind)
        return f"bf16_to_f32({read})" if kind == "bf16" else f"{read}.astype('f4')"
    return e.read(operand, "f32")


def _wide_product(e: _Emitter, i: Instruction, onto: Operand | None) -> None:
    """mul.wide, mul.hi and mad.wide."""
    kind, (d, a, b) = i.parts[-1], i.operands[:3]
    if "hi" in i.parts:
        if kind not in ("s32", "u32") or onto is not None:
            raise ValueError(kind)
        e.write(d, f"high_product({e.read(a, kind)}, {e.read(b, kind)})", "u32")
        return
    wide = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}[kind]
    found = f"{e.read(a, kind)}.astype('{DTYPES[wide]}') * {e.read(b, kind)}"
    if onto is not None:
        found += f" + {e.read(onto, wide)}"
    e.write(d, found, wide)


@_emits("mad")
def _mad(e: _Emitter, i: Instruction) -> None:
    d, a, b, c = i.operands
    if "wide" in i.parts:
        _wide_product(e, i, c)
    else:
        _modifiers(i, "lo")
        kind = _unsigned(i.parts[-1])
        e.write(d, f"{e.read(a, kind)} * {e.read(b, kind)} + {e.read(c, kind)}", kind)


@_emits("fma")
def _fma(e: _Emitter, i: Instruction) -> None:
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


@_emits("neg", "abs")
def _sign(e: _Emitter, i: Instruction) -> None:
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


@_emits("min", "max")
def _extreme(e: _Emitter, i: Instruction) -> None:
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


@_emits("and", "or", "xor")
def _logic(e: _Emitter, i: Instruction) -> None:
    sign, kind = {"and": "&", "or": "|", "xor": "^"}[i.parts[0]], i.parts[1]
    d, a, b = i.operands
    e.write(d, f"{e.read(a, kind)} {sign} {e.read(b, kind)}", kind)


@_emits("not")
def _not(e: _Emitter, i: Instruction) -> None:
    kind = i.parts[1]
    e.write(i.operands[0], f"~{e.read(i.operands[1], kind)}", kind)


@_emits("shl", "shr")
def _shift(e: _Emitter, i: Instruction) -> None:
    # NumPy's shifts beyond the width give 0, or the sign, as PTX's do.
    kind = i.parts[1]
    kind = _unsigned(kind) if i.parts[0] == "shl" or kind[0] == "b" else kind
    d, a, by = i.operands
    amount = e.read(by, "u32")
    if kind not in ("u32",):
        amount = f"{amount}.astype('{DTYPES[kind]}')"
    e.write(d, f"{e.read(a, kind)} {'<<' if i.parts[0] == 'shl' else '>>'} {amount}", kind)


@_emits("bfe")
def _bfe(e: _Emitter, i: Instruction) -> None:
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


@_emits("bfi")
def _bfi(e: _Emitter, i: Instruction) -> None:
    if i.parts[1] != "b32":
        raise ValueError(i.parts)
    d, *given = i.operands
    e.write(d, f"inserted({', '.join(e.read(one, 'b32') for one in given)})", "b32")


@_emits("prmt")
def _prmt(e: _Emitter, i: Instruction) -> None:
    if i.parts[1:] != ("b32",):
        raise ValueError(i.parts)
    d, *given = i.operands
    e.write(d, f"permuted({', '.join(e.read(one, 'b32') for one in given)})", "b32")


@_emits("lop3")
def _lop3(e: _Emitter, i: Instruction) -> None:
    if i.parts[1:] != ("b32",):
        raise ValueError(i.parts)
    d, *given = i.operands
    e.write(d, f"looked_up({', '.join(e.read(one, 'b32') for one in given)})", "b32")


@_emits("shf")
def _shf(e: _Emitter, i: Instruction) -> None:
    _, direction, mode, _ = i.parts
    d, *given = i.operands
    e.write(d, f"funnel({', '.join(e.read(one, 'b32') for one in given)}, {direction!r}, {mode!r})", "b32")


_COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def _compared(name: str, a: str, b: str, floating: bool) -> str:
    """NaN: the plain comparisons are false, those ending in u true."""
    if name in ("num", "nan"):
        found = f"(np.isnan({a}) | np.isnan({b}))"
        return f"~{found}" if name == "num" else found
    if name in _COMPARISONS:
        found = f"({a} {_COMPARISONS[name]} {b})"
        return f"({found} & ~np.isnan({a}) & ~np.isnan({b}))" if floating and name == "ne" else found
    return f"(({a} {_COMPARISONS[name[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"


@_emits("setp")
def _setp(e: _Emitter, i: Instruction) -> None:
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


@_emits("selp")
def _selp(e: _Emitter, i: Instruction) -> None:
    kind = i.parts[1]
    d, a, b, p = i.operands
    e.write(d, f"np.where({e.read(p, 'pred')}, {e.read(a, kind)}, {e.read(b, kind)})", kind)


@_emits("mov")
def _mov(e: _Emitter, i: Instruction) -> None:
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


@_emits("cvt")
def _cvt(e: _Emitter, i: Instruction) -> None:
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


@_emits("ex2", "rcp", "sqrt", "rsqrt", "tanh")
def _approximate(e: _Emitter, i: Instruction) -> None:
    if i.parts[1] != "approx" or i.parts[-1] != "f32":
        raise ValueError(i.parts)
    found = f"{i.parts[0]}({e.read(i.operands[1], 'f32')}, w.block.launch.adversary.rounding)"
    e.write(i.operands[0], found, "f32")


@_emits("div")
def _div(e: _Emitter, i: Instruction) -> None:
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


@_emits("rem")
def _rem(e: _Emitter, i: Instruction) -> None:
    kind, (d, a, b) = i.parts[1], i.operands
    if kind not in ("s32", "u32", "s64", "u64"):
        raise ValueError(kind)
    e.write(d, f"np.fmod({e.read(a, kind)}, {e.read(b, kind)})", kind)


# Between lanes


@_emits("shfl")
def _shfl(e: _Emitter, i: Instruction) -> None:
    _, _, mode, _ = i.parts
    d, a, by, clamp, members = i.operands
    value, predicate = (d.value, d.predicate) if isinstance(d, Pair) else (d, None)
    e.line(f"w.members({e.site}, {e.read(members, 'b32')})")
    e.line(f"t, u = shuffled({e.read(a, 'b32')}, {e.read(by, 'b32')}, {e.read(clamp, 'b32')}, {mode!r})")
    e.write(value, "t", "b32")
    e.write(predicate, "u", "pred")


@_emits("redux")
def _redux(e: _Emitter, i: Instruction) -> None:
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


@_emits("vote")
def _vote(e: _Emitter, i: Instruction) -> None:
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


# Memory


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


@_emits("ld")
def _ld(e: _Emitter, i: Instruction) -> None:
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


@_emits("st")
def _st(e: _Emitter, i: Instruction) -> None:
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
        e.line(f"w.store_global({e.site}, {e.address(target, 'u64')}, {e.mask}, {width}, {listed})")
    else:
        _only_hints(i, "shared", "volatile")
        e.line(f"w.store_shared({e.site}, {e.address(target, 'u32')}, {e.mask}, {width}, {listed})")


@_emits("atom")
def _atom(e: _Emitter, i: Instruction) -> None:
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


@_emits("bar", "barrier")
def _bar(e: _Emitter, i: Instruction) -> None:
    if i.parts[1] == "warp":
        e.line(f"w.whole({e.site})")
        return
    if i.opcode not in ("bar.sync", "barrier.sync") or [getattr(one, "text", "") for one in i.operands] != ["0"]:
        raise ValueError(i.opcode)
    if i.guard is not None:
        raise ValueError("a barrier under a condition")
    e.line(f"w.barrier({e.site})")


@_emits("fence")
def _fence(e: _Emitter, i: Instruction) -> None:
    if i.opcode != "fence.proxy.async.shared::cta":
        raise ValueError(i.opcode)
    e.line("w.block.shared.fence_proxy(w)")


@_emits("cvta")
def _cvta(e: _Emitter, i: Instruction) -> None:
    if i.opcode != "cvta.to.global.u64":
        raise ValueError(i.opcode)
    e.write(i.operands[0], e.read(i.operands[1], "u64"), "u64")


@_emits("prefetch")
def _prefetch(e: _Emitter, i: Instruction) -> None:
    pass  # a hint


# Asynchronous copies


@_emits("cp")
def _cp(e: _Emitter, i: Instruction) -> None:
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


def _registers(e: _Emitter, operand: Operand | None, kind: str) -> str:
    return f"[{', '.join(e.read(one, kind) for one in e.elements(operand))}]"


def _unguarded(e: _Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise ValueError("under a condition")
    e.line(f"w.whole({e.site})")


@_emits("mma")
def _mma(e: _Emitter, i: Instruction) -> None:
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


@_emits("ldmatrix")
def _ldmatrix(e: _Emitter, i: Instruction) -> None:
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


@_emits("stmatrix")
def _stmatrix(e: _Emitter, i: Instruction) -> None:
    if i.guard is not None or i.parts[1:4] != ("sync", "aligned", "m8n8") or i.parts[-1] != "b16":
        raise ValueError(i.opcode)
    target, source = i.operands
    rows = f"matrix.to_rows({_registers(e, source, 'b32')}, {'trans' in i.parts})"
    e.line(f"w.store_rows({e.site}, {e.address(target, 'u32')}, {rows})")


@_emits("wgmma")
def _wgmma(e: _Emitter, i: Instruction) -> None:
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


def _wgmma_product(e: _Emitter, i: Instruction) -> None:
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
