"""A program -> Python functions over NumPy vectors, one for every segment.

A segment is a run of instructions that a warp executes at a stretch: it begins at a label, behind a branch, or at an
instruction that other warps and programs can notice (an access to global memory, an atomic, a barrier, a wait), so that
the scheduler may let somebody else go first. Interpreting one instruction at a time would cost ten times as much.

Every segment exists twice: for warps whose lanes are all active, and for the rest, where only active lanes take part.
Both are made when they are first needed. A register holds a vector of 32 numbers in the type in which it is used most;
an instruction that wants its bits as another type takes a view.

`instructions.py` and `accesses.py` have the instructions that the machine knows. Any other is a MachineError that names
it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic, matrix, wgmma
from .accesses import EMITTERS
from .faults import MachineError
from .ptx import DTYPES, WIDTHS, Address, Immediate, Instruction, Operand, Program, Register, Symbol, Vector, parse
from .shared import BASE
from .warp import END, Warp

if TYPE_CHECKING:
    from .scheduler import Adversary

Segment = Callable[[Warp, list[np.ndarray]], int]

# Where others may notice that this instruction comes before or after one of theirs.
_NOTICED = (
    "ld.global", "ld.volatile", "ld.relaxed", "st.global", "st.volatile", "st.relaxed", "atom.", "cp.async.wait",
    "wgmma.wait", "fence",
)  # fmt: skip


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
            emitter = Emitter(self, masked)
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


class Emitter:
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
        emit = EMITTERS.get(instruction.parts[0])
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
