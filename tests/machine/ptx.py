"""PTX text -> a program: registers, parameters, instructions in order, labels, lines of source.

Only what is written is read here; what an instruction means stands in `translate.py`. The grammar is that of the PTX
ISA manual, chapters 4 (syntax), 5 (state spaces) and 6 (operands), as far as Triton's compiler writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .faults import MachineError

SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}

# NumPy's type of the bits, and bytes, of PTX's types; of packed ones that of an element.
DTYPES = {"b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2"}
DTYPES |= {"b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8"}
DTYPES |= {"f32x2": "f4", "u16x2": "u2", "s16x2": "i2", "f16x2": "f2", "bf16x2": "u2", "pred": "?"}
WIDTHS = SIZES | {"f32x2": 8, "u16x2": 4, "s16x2": 4, "f16x2": 4, "bf16x2": 4, "bf16": 2, "tf32": 4}


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """A number as it is written: "-1", "0x3F80", "0f3FB8AA3B"."""

    text: str


@dataclass(frozen=True)
class Symbol:
    """A label, a variable in shared memory, a parameter or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}; None where an element is not wanted (_)."""

    elements: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Pair:
    """value|predicate, the two destinations of shfl.sync."""

    value: Operand
    predicate: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Guard:
    """@%p or @!%p before an instruction."""

    register: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction: `parts` are the words of its opcode, `mma`, `sync`, `aligned`, ..."""

    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand | None, ...]
    guard: Guard | None
    line: str  # of the source, as "exchange.py:105"

    def __str__(self) -> str:
        return f"{self.opcode} ({self.line})"


@dataclass
class Program:
    """One kernel."""

    name: str
    version: tuple[int, int]
    parameters: dict[str, str] = field(default_factory=dict)  # name -> type, in order
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    shared: dict[str, int] = field(default_factory=dict)  # static variables: name -> bytes, in order
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the instruction behind it
    threads: int | None = None


_REGISTER = re.compile(r"%[a-zA-Z_]\w*$|%p\d+$")
_NUMBER = re.compile(r"[-+]?(0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}|0[xX][0-9A-Fa-f]+|\d+)U?$")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)


def parse(text: str) -> Program:
    """The first kernel in a PTX file; MachineError where the text is not understood."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    version = re.search(r"\.version\s+(\d+)\.(\d+)", text)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.DOTALL)
    if version is None or entry is None:
        raise MachineError("this is no PTX: a .version and an .entry are missing")
    program = Program(entry[1], (int(version[1]), int(version[2])))
    for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?\s([\w$]+)\s*(?:,|$)", entry[2].strip() + ","):
        program.parameters[name] = kind
    threads = re.search(r"\.reqntid\s+([\d,\s]+)", entry[3])
    if threads is not None:
        sizes = [int(size) for size in threads[1].split(",")]
        if any(size != 1 for size in sizes[1:]):
            raise MachineError("blocks of one dimension only")
        program.threads = sizes[0]
    for name, size in re.findall(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", text):
        program.shared[name] = int(size or 0)
    body = text[entry.end() : _closing(text, entry.end() - 1)]
    _Body(program, files).read(body)
    return program


def _closing(text: str, at: int) -> int:
    """The index of the brace that closes the one at `at`."""
    depth = 0
    for index in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise MachineError("a brace is not closed")


class _Body:
    """Reads statements into a program. Inline assembly may open a scope with registers of its own."""

    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self.program, self.files = program, files
        self.line = "?"
        self.scopes: list[dict[str, str]] = []  # of inline assembly: local name -> ours
        self.opened = 0

    def read(self, body: str) -> None:
        at = 0
        while at < len(body):
            if body[at].isspace() or body[at] == ";":
                at += 1
            elif body[at] == "{":
                self.opened += 1
                self.scopes.append({})
                at += 1
            elif body[at] == "}":
                self.scopes.pop()
                at += 1
            elif label := re.compile(r"([\w$%]+)\s*:(?!:)").match(body, at):
                self.program.labels[label[1]] = len(self.program.instructions)
                at = label.end()
            elif located := re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*").match(body, at):
                path = self.files.get(located[1], "?")
                self.line = f"{path.rpartition('/')[2]}:{located[2]}"
                at = located.end()
            else:
                end = body.index(";", at)
                self._statement(" ".join(body[at:end].split()))
                at = end + 1

    def _statement(self, text: str) -> None:
        if text.startswith("."):
            self._directive(text)
            return
        found = _STATEMENT.match(text)
        if found is None:
            raise MachineError(f"not understood: {text!r}")
        negated, guard, opcode, rest = found.groups()
        operands = tuple(self._operand(part) for part in _split(rest))
        condition = None if guard is None else Guard(self._local(guard), negated == "!")
        instruction = Instruction(opcode, tuple(opcode.split(".")), operands, condition, self.line)
        self.program.instructions.append(instruction)

    def _directive(self, text: str) -> None:
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text):
            kind = declared[1]
            for name in _split(declared[2]):
                many = re.match(r"(%?[\w$]+)<(\d+)>$", name)
                names = [name] if many is None else [f"{many[1]}{index}" for index in range(int(many[2]))]
                for one in names:
                    self._declare(one, kind)
        elif not text.startswith((".pragma", ".loc", ".file")):
            raise MachineError(f"a directive that is not known: {text!r}")

    def _declare(self, name: str, kind: str) -> None:
        if self.scopes:
            own = f"%scope{self.opened}_{name.lstrip('%')}"
            self.scopes[-1][name] = own
            name = own
        self.program.registers[name] = kind

    def _local(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _operand(self, text: str) -> Operand | None:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text:
            value, predicate = (self._operand(part) for part in text.split("|"))
            assert value is not None
            assert predicate is not None
            return Pair(value, predicate)
        if _NUMBER.match(text):
            return Immediate(text.rstrip("U"))
        name = self._local(text)
        if name in self.program.registers:
            return Register(name)
        if text.startswith("!") and self._local(text[1:]) in self.program.registers:
            raise MachineError(f"a negated operand is not known: {text}")
        if re.match(r"[%\w$.]+$", text):
            return Symbol(text)
        raise MachineError(f"an operand that is not understood: {text!r}")

    def _address(self, text: str) -> Address:
        base, offset = text, 0
        if added := re.match(r"(.*?)\s*\+\s*(-?\w+)$", text):
            base, offset = added[1], int(added[2], 0)
        operand = self._operand(base)
        if not isinstance(operand, Register | Symbol | Immediate):
            raise MachineError(f"an address that is not understood: [{text}]")
        return Address(operand, offset)


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no bracket."""
    parts, depth, begin = [], 0, 0
    for index, sign in enumerate(text):
        if sign in "{[(":
            depth += 1
        elif sign in "}])":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[begin:index].strip())
            begin = index + 1
    if text[begin:].strip():
        parts.append(text[begin:].strip())
    return parts
