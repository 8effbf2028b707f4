"""What a compiled program sends between devices: reads the text of optimized HLO.

    for collective in find_collectives(compiled.as_text(), mesh.shape):
        print(collective.kind, collective.axes, collective.sent_bytes * collective.times)

Source: the text form of XLA's HLO and its three notations of replica groups (openxla.org/xla, "HLO
Semantics" and xla/hlo/ir/collective_device_list.h). Reading it holds for the XLA of the jax that
setup.py names; tests/core/test_hlo.py compiles programs whose collectives are known.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Where a step would stop for the host, or the host would see its data.
HOST_OPCODES = ("infeed", "outfeed", "send", "recv")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    rest: str  # operands, attributes and metadata


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      type: of the array that all members make or share, such as `bf16[4096,10240]`: a gather's
        whole result, a scatter's whole operand. Several, joined, where XLA combined them.
      axes: of the mesh that a group spans; `("?",)` where a group is no product of axes.
      group_size: devices that take part in one.
      whole_bytes: of `type`.
      times: how often a step executes it; None inside a loop whose trip count is not known.
      op_name: what JAX operation it comes from.
    """

    kind: str
    type: str
    axes: tuple[str, ...]
    group_size: int
    whole_bytes: int
    times: int | None
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """What one device sends each time, by the ring algorithm.

        Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH":
        of n devices, (n - 1)/n of the array for a gather or a scatter, twice that for a reduction
        to all. A permutation sends all of it.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.whole_bytes)
        share = (self.group_size - 1) / self.group_size
        return self.whole_bytes * share * (2 if self.kind == "all-reduce" else 1)


def find_collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program between more than one device.

    Args:
      text: `compiled.as_text()`, of one device's program.
      mesh_shape: axis to size, as `mesh.shape`; devices are numbered as the mesh lays them out.
    """
    computations = parse_computations(text)
    times = count_executions(computations, _entry(text))
    found = []
    for name, instructions in computations.items():
        if name not in times:
            continue
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                collective = _collective(kind, name, instruction, mesh_shape, times[name])
                found += [collective] if collective.group_size > 1 else []
    return found


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory of one device at a program's peak, arguments included."""
    found = compiled.memory_analysis()
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if device.platform == "tpu":
        return found.peak_memory_in_bytes
    # Elsewhere temporaries are one allocation, which that peak may leave out.
    whole = found.argument_size_in_bytes + found.temp_size_in_bytes
    return whole + found.output_size_in_bytes - found.alias_size_in_bytes


def find_host_transfers(text: str) -> list[str]:
    """Instructions that talk to the host: infeed, outfeed, send, recv and Python callbacks."""
    found = []
    for instructions in parse_computations(text).values():
        for instruction in instructions:
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            is_callback = target and re.search("callback|host", target[1], re.I)
            # `send` and `recv` also name transfers between devices, on some backends
            if instruction.opcode.removesuffix("-done") in HOST_OPCODES or is_callback:
                found.append(f"{instruction.opcode} {target[1] if target else instruction.name}")
    return found


def parse_computations(text: str) -> dict[str, list[Instruction]]:
    """Computation to instructions, in the order of the text."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line[:1].strip():  # computations begin at the margin
            opened = _COMPUTATION.match(line)
            if opened:
                current = computations.setdefault(opened[1], [])
            continue
        found = _INSTRUCTION.match(line)
        if found:
            current.append(Instruction(*found.groups()))
    return computations


def count_executions(
    computations: Mapping[str, list[Instruction]], entry: str
) -> dict[str, int | None]:
    """How often each computation that is reached runs: loop bodies by their trip counts.

    Both branches of a conditional count as taken. None: a loop around it has no constant bound.
    """
    times: dict[str, int | None] = {}

    def visit(name: str, count: int | None) -> None:
        before = times.get(name, 0)
        times[name] = None if count is None or before is None else before + count
        for instruction in computations.get(name, ()):
            factor = 1
            if instruction.opcode == "while":
                factor = _trip_count(instruction, computations)
            inner = None if count is None or factor is None else count * factor
            for callee in _callees(instruction):
                visit(callee, inner)

    visit(entry, 1)
    return times


def _callees(instruction: Instruction) -> list[str]:
    found = re.findall(
        r"\b(?:body|condition|calls|to_apply|called_computations?)=\{?%?([\w.\-]+)",
        instruction.rest,
    )
    for branches in re.findall(r"branch_computations=\{(.*?)\}", instruction.rest):
        found += [name.strip().lstrip("%") for name in branches.split(",")]
    return found + re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)


def _trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    """XLA's own count where it says one, else the constant that the loop's counter stays below.

    JAX's scans count from 0 by 1. A `while_loop` that may end earlier is counted to its bound.
    """
    known = re.search(r'known_trip_count\\?"?:\{\\?"n\\?":\\?"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    names = [condition[1]] if condition else []
    bounds = []
    while names:
        instructions = computations.get(names.pop(), ())
        for instruction in instructions:
            names += _callees(instruction)
            if instruction.opcode == "constant" and instruction.type.startswith(("s32", "u32")):
                bounds += re.findall(r"^(\d+)\)", instruction.rest)
    return max(map(int, bounds)) if bounds else None


def _entry(text: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    return found[1] if found else ""


def _collective(kind, computation, instruction, mesh_shape, times) -> Collective:
    # TPU compilers fuse an all-reduce with the slice that each device keeps: a reduce-scatter.
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
        arrays = _arrays(instruction.type)
        whole = sum(size for _, size in arrays)
    else:
        arrays = _arrays(instruction.type)
        if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
            arrays = arrays[len(arrays) // 2 :]  # (operands, results) of what runs asynchronously
            arrays = [max(arrays, key=lambda array: array[1])] if kind[-7:] == "permute" else arrays
        whole = sum(size for _, size in arrays)
    groups = _groups(kind, instruction.rest, mesh_shape)
    group_size = len(groups[0]) if kind != "collective-permute" else 2 * bool(len(groups))
    if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
        whole *= group_size  # its result is one device's share
    op_name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(
        kind=kind,
        type=" + ".join(name for name, _ in arrays),
        axes=_axes(groups, mesh_shape),
        group_size=group_size,
        whole_bytes=int(whole),
        times=times,
        op_name=op_name[1] if op_name else "",
    )


def _arrays(type_text: str) -> list[tuple[str, float]]:
    """`(bf16[2,3]{1,0}, f32[])` to [("bf16[2,3]", 12), ("f32[]", 4)]."""
    arrays = []
    for dtype, dims in _ARRAY.findall(type_text):
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
        arrays.append((f"{dtype}[{dims}]", width * math.prod(_ints(dims))))
    return arrays


def _groups(kind: str, rest: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """[groups, members] device numbers; for a permutation [pairs, 2]."""
    everyone = np.arange(math.prod(mesh_shape.values()))
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        numbers = np.array(re.findall(r"\d+", pairs[1] if pairs else ""), int).reshape(-1, 2)
        return numbers[numbers[:, 0] != numbers[:, 1]]
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", rest)
    if listed:
        return np.array([group.split(",") for group in listed[1].split("},{")], int)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims, order = (_ints(part) for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(shape)
    named = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest)
    if named:
        sizes = [int(size) for size in re.findall(r"'=(\d+)", named[1])]
        names = re.findall(r"'(\w+)'=", named[1])
        grouped = [names.index(name) for name in re.findall(r"'(\w+)'", named[2])]
        others = [axis for axis in range(len(names)) if axis not in grouped]
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(*others, *grouped)
        return devices.reshape(-1, math.prod(sizes[axis] for axis in grouped))
    return everyone[None]


def _ints(text: str | None) -> list[int]:
    return [int(part) for part in text.split(",")] if text else []


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    if not len(groups):
        return ()
    places = np.stack(
        np.unravel_index(groups, tuple(mesh_shape.values())), -1
    )  # group, member, axis
    differs = (places != places[:, :1]).any((0, 1))
    axes = tuple(name for name, is_spanned in zip(mesh_shape, differs, strict=True) if is_spanned)
    is_pairs = groups.shape[1] == 2  # a permutation's pairs need not span their axis
    if not is_pairs and math.prod(mesh_shape[axis] for axis in axes) != groups.shape[1]:
        return ("?",)
    return axes
