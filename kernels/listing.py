"""What the compiler's texts say of a kernel: machine instructions of a step by name, tiles that threads load twice,
operands that a matrix unit does not find where they lie."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "v_mfma", "v_wmma")


@dataclass(frozen=True)
class Loop:
    """Instructions of the time loop by name.

    own: outside of its inner loops, once a step. chunks: of the inner loops with matrix instructions, once for every
    chunk of the depth. waits: of the other inner loops, which run while other programs are waited for. What leads to a
    trap only is no part of a step.
    """

    own: dict[str, int]
    chunks: dict[str, int]
    waits: dict[str, int]

    @property
    def instructions(self) -> int:
        """Every loop counted once."""
        return sum(sum(part.values()) for part in (self.own, self.chunks, self.waits))

    def in_a_step(self, chunks: int) -> Counter[str]:
        """Of one step that waits for nobody, with so many chunks."""
        return Counter(self.own) + Counter({name: chunks * count for name, count in self.chunks.items()})


def name_of(line: str) -> str | None:
    """The instruction in a line of nvdisasm (without a predicate, with its modifiers) or of AMD's assembler."""
    found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line) or re.match(
        r"\s+([vs]_\w+|(?:global|flat|buffer|ds)_\w+)", line
    )
    return found[1] if found else None


def time_loop(listing: str) -> Loop:
    """The widest loop of a disassembly, which is the one over time."""
    lines = listing.splitlines()
    labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"\s*(\.L\w+):", line))}
    ends: dict[int, int] = {}  # of a loop that jumps back to its head from several places, the last
    for at, line in enumerate(lines):
        target = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)", line)
        if target and labels.get(target[1], at) < at:
            ends[labels[target[1]]] = at
    if not ends:
        return Loop({}, {}, {})
    loops = list(ends.items())
    widest = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = sorted((loop for loop in loops if loop != widest and widest[0] <= loop[0] and loop[1] <= widest[1]),
                   key=lambda loop: loop[1] - loop[0])  # fmt: skip
    multiplies = {
        loop: any((name_of(line) or "").startswith(MATRIX) for line in lines[loop[0] : loop[1] + 1]) for loop in inner
    }
    parts: tuple[Counter[str], Counter[str], Counter[str]] = (Counter(), Counter(), Counter())
    vain = _leads_to_traps(lines, labels, *widest)
    for at in range(widest[0], widest[1] + 1):
        name = name_of(lines[at])
        if name is not None and at not in vain:
            around = next((loop for loop in inner if loop[0] <= at <= loop[1]), None)  # the narrowest
            parts[0 if around is None else 1 if multiplies[around] else 2][name] += 1
    own, chunks, waits = map(dict, parts)
    return Loop(own, chunks, waits)


def _leads_to_traps(lines: list[str], labels: dict[str, int], begin: int, end: int) -> set[int]:
    """Lines of a loop from which no way leads on but through a trap."""
    before: dict[int, list[int]] = {}
    for at in range(begin, end + 1):
        name, line = name_of(lines[at]) or "", lines[at]
        if name == "BPT.TRAP":
            continue
        target = re.search(r"(\.L\w+)", line) if name.startswith(("BRA", "CALL")) else None
        if target and target[1] in labels:
            before.setdefault(labels[target[1]], []).append(at)
        if not target or re.search(r"@!?U?P\w+|BRA\S* !?U?P\d", line):
            before.setdefault(at + 1, []).append(at)
    goes_on, found = {end}, [end]
    while found:
        new = [one for one in before.get(found.pop(), ()) if one not in goes_on]
        goes_on.update(new)
        found += new
    return set(range(begin, end + 1)) - goes_on


def copied_tiles(ttgir: str) -> int:
    """How many volatile loads of a tile give some of its elements to more than one thread.

    Triton takes such copies for equal, tests one and uses any; see MOST_THREADS in exchange.py. (Flags, which are no
    tile but a vector, are read again by an acquire once they have been seen.)
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", ttgir, re.MULTILINE))
    found = 0
    for shape, layout in re.findall(r"tt\.load .*isVolatile = true.* : tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)>", ttgir):
        sizes = [int(size) for size in shape.split("x")]
        factors = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[([\d, ]+)\]", layouts.get(layout, ""))
        covered = [math.prod(axis) for axis in zip(*(map(int, one.split(",")) for one in factors))]
        found += len(sizes) > 1 and (not covered or any(c > s for c, s in zip(covered, sizes)))
    return found


def misread_operands(ttgir: str) -> int:
    """How many operands of dots the matrix unit would read wrongly; perf/NOTES.md has both ways in which it does.

    The rules are those of Triton's own layouts, which only newer versions give away; a test compares them. Of a layout
    that is not understood the worst is assumed.
    """
    layouts = {
        name: (kind, dict(re.findall(r"(\w+) = (\[[\d, ]*\]|\w+)", fields)))
        for name, kind, fields in re.findall(r"^(#\w+) = #ttg\.(\w+)<\{(.*?)\}>", ttgir, re.MULTILINE)
    }
    operand = r"tensor<([\dx]+)x\w+, #ttg\.dot_op<\{opIdx = (\d), parent = (#\w+), kWidth = (\d+)\}>>"
    memory = r"!ttg\.memdesc<([\dx]+)x\w+, (#\w+)"
    found = 0
    for line in ttgir.splitlines():
        if re.search(r"= (?:tt\.dot|ttng\.warp_group_dot) ", line):
            for shape, index, parent, width in re.findall(operand, line):
                depth = _numbers(shape)[-1 if index == "0" else -2]
                found += not _fits_depth(depth, int(width), *layouts.get(parent, ("", {})))
        elif joined := re.search(rf"= ttg\.memdesc_trans .*: {memory}.*-> {memory}", line):
            shape, before, _, after = joined.groups()
            found += not _transposes(_numbers(shape), layouts.get(before), layouts.get(after))
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _fits_depth(depth: int, width: int, kind: str, fields: dict[str, str]) -> bool:
    """Whether the threads that share a row of an operand, with `width` neighbours each, find that much depth.

    Else some hold copies of what others hold, in place of the rest of the depth.
    """
    shape = _numbers(fields.get("instrShape", ""))
    if kind == "nvidia_mma":
        return 4 * width <= depth
    if kind == "amd_mfma":
        return 64 // shape[0] * width <= depth
    return False


def _transposes(
    shape: list[int], before: tuple[str, dict[str, str]] | None, after: tuple[str, dict[str, str]] | None
) -> bool:
    """Whether shared memory that was written as `before` lies, its axes changed for each other, as `after` says."""
    if before is None or after is None or before[0] != after[0]:
        return False
    (kind, fields), (_, others) = before, after
    turned = {"nvmma_shared": "transposed", "swizzled_shared": "order"}.get(kind)
    if turned is None or {**fields, turned: ""} != {**others, turned: ""}:
        return False
    if kind == "swizzled_shared":  # one formula for every extent
        return True
    # Blocks of a swizzled row by 256 rows at most; what is left of the two axes follows in an order that does not turn.
    # Without swizzling blocks are so small that some always is.
    rows, columns = shape[::-1] if fields["transposed"] == "true" else shape
    swizzled = 8 * int(fields["swizzlingByteWidth"]) // int(fields["elementBitWidth"])
    return swizzled > 0 and (rows <= 256 or columns <= swizzled)
