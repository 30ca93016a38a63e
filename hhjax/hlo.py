"""What a compiled program does, read from its HLO text: products, bytes and collectives, each as often as the loops around it run.

XLA's own cost analysis takes the body of a loop once, so that a scan over 64 layers counts for one. Here a loop's body counts
as often as its condition says. Text as `Compiled.as_text()` gives it, or as `--xla_dump_hlo_as_text` writes it. numpy only.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
              "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Names for what others have made, or whose halves are counted elsewhere: no traffic of their own.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
        "replica-id", "optimization-barrier", "async-start", "async-update", "async-done", "iota", "domain"}  # fmt: skip

SLICED = ("dynamic-slice", "gather", "slice")  # what reads a part of its first operand
IN_PLACE = ("dynamic-update-slice", "scatter")  # what changes a part of its first operands


class Shape(NamedTuple):
    """dims: of an array on one device. space: 0 is HBM (or a CPU's memory); others are on-chip or a host's."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES.get(self.dtype, 1)


class Op(NamedTuple):
    """An instruction. shapes: of its result, or of a tuple's parts; attributes: the text after its operands."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool


class Collective(NamedTuple):
    """One kind of exchange. bytes: of the whole array over the group on one device, once (before a reduce-scatter, after an
    all-gather); times: runs in all; axes: mesh axes that it goes along, joined by +; group: devices that take part; looped: whether
    a loop runs it; shapes: of the whole."""

    kind: str
    bytes: int
    axes: str
    group: int
    times: int
    looped: bool
    shapes: tuple[Shape, ...]


class Use(NamedTuple):
    """A computation where it is run: how often in all, inside a loop or not, as part of a fusion or not, beside others or not."""

    computation: str
    times: int
    looped: bool
    fused: bool
    beside: bool


class Program:
    """An HLO module from its text. Raises ValueError where there is no entry computation in it."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry, self._known_users = "", {}
        current = None
        for line in re.sub(r"=\{\n.*\n\}", "={}", text).splitlines():  # what kernels of Pallas say of themselves is in lines of its own
            if header := HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (op := parse_op(line)):
                current[op.name] = op
        if not self.entry:
            raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO text; give the whole module")

    @cached_property
    def uses(self) -> list[Use]:
        """Every computation that is run, once for each place that runs it; reducers and comparators apart."""
        found = []

        def visit(name: str, times: int, looped: bool, fused: bool, beside: bool):
            found.append(Use(name, times, looped, fused, beside))
            for op in self.computations[name].values():
                if op.kind == "while":
                    body, condition = (re.search(rf"{part}=%?([\w.-]+)", op.attributes)[1] for part in ("body", "condition"))
                    visit(body, times * self.trips(op, condition), True, fused, beside)
                elif op.kind in ("fusion", "call", "async-start"):
                    for callee in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", op.attributes):
                        visit(callee, times, looped, fused or op.kind == "fusion", beside or op.kind == "async-start")
                elif op.kind == "conditional":  # the dearest branch is not known: every one counts
                    for callee in re.findall(r"%([\w.-]+)", op.attributes.partition("branch_computations")[2].partition("}")[0]):
                        visit(callee, times, looped, fused, beside)

        visit(self.entry, 1, False, False, False)
        return found

    def trips(self, op: Op, condition: str) -> int:
        """How often a loop's body runs, at most: what the compiler knows, else the bound that its condition compares with."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', op.attributes):
            return int(known[1])
        names = [condition, *(c for o in self.computations[condition].values() for c in re.findall(r"calls=%?([\w.-]+)", o.attributes))]
        ops = [o for name in names for o in self.computations[name].values()]
        bounds = [int(o.text) for o in ops if o.kind == "constant" and o.shapes[0].dtype in ("s32", "u32", "s64") and o.text.isdigit()]
        return max(bounds, default=1)

    # Counts ---------------------------------------------------------------------------------------------------------

    def flops(self, looped: bool = True) -> float:
        """FLOPs of matrix products on one device; with looped=False every loop's body once, as XLA's cost analysis counts."""
        times = defaultdict(int)
        for use in self.uses:
            times[use.computation] += use.times if looped else 1
        return float(sum(n * sum(product_flops(op, self.computations[name]) for op in self.computations[name].values())
                         for name, n in times.items()))  # fmt: skip

    def serial_seconds(self, flop_rate: float, byte_rate: float) -> float:
        """Seconds of one device that runs fusions and lone instructions one after another, each as long as its products take or its bytes in
        HBM, whichever is more. What goes on beside them (exchanges, copies that have a start and an end) is left out."""

        @cache
        def seconds(name: str) -> float:
            ops = self.computations[name]
            ran = (op for op in ops.values() if op.kind not in (*FREE, *COLLECTIVES) and not op.kind.endswith(("-start", "-done"))
                   and not (op.kind == "fusion" and "all-reduce-scatter" in called(op)))  # fmt: skip
            return sum(max(self._op_flops(op, ops) / flop_rate, self._op_traffic(op, ops) / byte_rate) for op in ran)

        return sum(use.times * seconds(use.computation) for use in self.uses if not use.fused and not use.beside)

    def _op_flops(self, op: Op, ops: Mapping[str, Op]) -> int:
        if op.kind != "fusion":
            return product_flops(op, ops)
        inside = self.computations[called(op)]
        return sum(self._op_flops(o, inside) for o in inside.values())

    def hbm_bytes(self) -> int:
        """Bytes that one device reads from and writes to HBM: operands and results of every fusion and lone instruction. What is
        sliced counts by its slice, what is updated in place by the update, what lies on the chip not at all."""
        traffic = cache(self._traffic)
        return sum(use.times * traffic(use.computation) for use in self.uses if not use.fused)

    def _traffic(self, name: str) -> int:
        ops = self.computations[name]
        return sum(self._op_traffic(op, ops) for op in ops.values() if op.kind not in FREE and not op.kind.endswith("-done"))

    def _op_traffic(self, op: Op, ops: Mapping[str, Op]) -> int:
        if op.kind == "fusion":
            return self._fusion_traffic(op, ops)
        if op.kind in SLICED:  # often into the chip's own memory
            source = ops[op.operands[0]].shapes if op.operands[0] in ops else op.shapes
            return in_hbm(op.shapes) + (sum(s.bytes for s in op.shapes) if in_hbm(source) else 0)
        if op.kind in IN_PLACE:
            return 2 * sum(in_hbm(ops[name].shapes) for name in changed_by(op))
        if op.kind.endswith("-start"):  # a pair of source and destination
            return in_hbm(op.shapes[:2])
        return in_hbm(op.shapes) + sum(in_hbm(ops[name].shapes) for name in op.operands if name in ops)

    def _fusion_traffic(self, op: Op, ops: Mapping[str, Op]) -> int:
        inside = self.computations[called(op)]
        read = sum(min(self._read(called(op), i), in_hbm(ops[name].shapes)) for i, name in enumerate(op.operands) if name in ops)
        root = next(o for o in inside.values() if o.root)
        results = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
        written = ([s for name in changed_by(r) for s in inside[name].shapes] if r.kind in IN_PLACE else (s,) for s, r in zip(op.shapes, results))
        return read + sum(sum(part.bytes for part in w) for s, w in zip(op.shapes, written) if s.space == 0)

    def _read(self, name: str, index: int) -> int:
        """Bytes that a fused computation reads of its parameter: of slices only those, of what is updated in place none."""
        users, parameter = self._users(name)
        return self._read_by(users, parameter[index]) if index in parameter else 0

    def _read_by(self, users: Mapping[str, list[tuple[Op, int]]], op: Op) -> int:
        total = op.shapes[0].bytes if op.root else 0  # a view that is handed on whole
        for user, at in users.get(op.name, ()):
            if user.kind in SLICED and at == 0:
                total += user.shapes[0].bytes
            elif user.kind == "fusion":
                total += self._read(called(user), at)
            elif user.kind == "bitcast":
                total += self._read_by(users, user)
            elif user.kind not in IN_PLACE or at >= first_change(user):
                total += op.shapes[0].bytes
        return min(total, op.shapes[0].bytes)

    def _users(self, name: str):
        """(instruction -> who takes it and as which operand, number -> parameter) of a computation."""
        if name not in self._known_users:
            users, ops = defaultdict(list), self.computations[name].values()
            for op in ops:
                for at, operand in enumerate(op.operands):
                    users[operand].append((op, at))
            self._known_users[name] = users, {int(op.text): op for op in ops if op.kind == "parameter"}
        return self._known_users[name]

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """Every exchange between devices, equal ones together. mesh: axis -> size, in the order of the program's devices.

        TPUs write a reduce-scatter as a fusion of an all-reduce and a slice: it is told as what it is. An exchange that goes on
        beside several products stands in the fusion of each, with one channel: it counts once.
        """
        found, channels = defaultdict(int), set()
        for use in self.uses:
            scattered = use.fused and "all-reduce-scatter" in use.computation
            for op in self.computations[use.computation].values():
                kind = op.kind.removesuffix("-start")
                channel = re.search(r"channel_id=(\d+)", op.attributes)
                if kind not in COLLECTIVES or (channel and use.fused and (channel[1], scattered) in channels):
                    continue
                channels.add((channel[1], scattered) if channel else None)
                shapes = op.shapes
                if kind == "reduce-scatter":  # the whole is what goes in
                    shapes = tuple(s for n in op.operands for s in self.computations[use.computation][n].shapes)
                elif op.kind != kind and len(shapes) > 1 and kind != "all-reduce":  # a start's source and destination
                    shapes = shapes[len(shapes) // 2 :][:1]
                axes, group = group_axes(op.attributes, mesh)
                one = Collective("reduce-scatter" if scattered else kind, sum(s.bytes for s in shapes), axes, group, 0, use.looped, shapes)
                found[one] += use.times
        return [one._replace(times=times) for one, times in found.items()]


# Reading --------------------------------------------------------------------------------------------------------------

HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
NAMED = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")


def parse_op(line: str) -> Op | None:
    """An instruction from its line; None where the line is none."""
    if not (named := NAMED.match(line)):
        return None
    rest = named[3]
    cut = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind = re.match(r" *([\w-]+)\(", rest[cut:])
    if not kind:
        return None
    start = cut + kind.end() - 1
    end = closing(rest, start)
    inside = rest[start + 1 : end]
    return Op(named[2], kind[1], parse_shapes(rest[:cut]), tuple(re.findall(r"%([\w.-]+)", inside)), inside, rest[end + 1 :],
              bool(named[1]))  # fmt: skip


def closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Every array in a type, in order."""
    found = re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", text)
    space = lambda layout: int(m[1]) if (m := re.search(r"S\((\d+)\)", layout)) else 0  # noqa: E731
    return tuple(Shape(t, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), space(layout)) for t, dims, layout in found)


def called(op: Op) -> str:
    """The computation of a fusion."""
    return re.search(r"calls=%?([\w.-]+)", op.attributes)[1]


def first_change(op: Op) -> int:
    """How many arrays an instruction of IN_PLACE changes, which are its first operands. One, but for a scatter of several."""
    return (len(op.operands) - 1) // 2 if op.kind == "scatter" else 1


def changed_by(op: Op) -> tuple[str, ...]:
    """The operands that are the parts: one a changed array; a scatter's come last, behind its indices."""
    return op.operands[-first_change(op) :] if op.kind == "scatter" else op.operands[1:2]


def in_hbm(shapes) -> int:
    return sum(s.bytes for s in shapes if s.space == 0)


def product_flops(op: Op, ops: Mapping[str, Op]) -> int:
    """FLOPs of a dot, a convolution or one of CUDA's products and fused attentions, 2 a multiply-add; 0 for all else."""
    if op.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)[1]
        left = ops[op.operands[0]].shapes[0].dims
        return 2 * op.shapes[0].size * math.prod(left[int(d)] for d in contracted.split(",") if d)
    if op.kind == "convolution":
        return convolution_flops(op, *(ops[name].shapes[0].dims for name in op.operands[:2]))
    if op.kind == "custom-call":
        return next((count(op, ops) for mark, count in CUSTOM.items() if mark in op.attributes), 0)
    return 0


def cublas_flops(op: Op, ops: Mapping[str, Op]) -> int:
    contracted = re.search(r'"lhs_contracting_dimensions":\["([\d",]*)"\]', op.attributes)[1]
    left = ops[op.operands[0]].shapes[0].dims
    return 2 * op.shapes[0].size * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))


def cudnn_flops(op: Op, ops: Mapping[str, Op]) -> int:
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([\d", ]*)\]', op.attributes)[1]
    size = math.prod(map(int, re.findall(r"\d+", scores))) * op.shapes[0].dims[-1]
    return attention_flops(size, "Backward" in op.attributes, "CAUSAL" in op.attributes)


def splash_flops(op: Op, ops: Mapping[str, Op]) -> int:
    """Where nothing later is seen, as everywhere here; other blocks that it leaves out are not known. 0 for other kernels."""
    if "splash_mha" not in op.attributes:
        return 0
    q, k, *_ = (s for name in op.operands for s in ops[name].shapes if len(s.dims) > 2 and s.dtype in ("bf16", "f32"))
    return attention_flops(q.size * k.dims[-2], "splash_mha_fwd" not in op.attributes, True)


def attention_flops(size: int, backward: bool, causal: bool) -> int:
    """Of a fused kernel: two products of `size` multiply-adds forward and five back, of which half are made where nothing later is seen."""
    return (5 if backward else 2) * 2 * size // (2 if causal else 1)


CUSTOM = {"__cublas": cublas_flops, "__cudnn$fmha": cudnn_flops, '"tpu_custom_call"': splash_flops}  # by what stands in the call


def convolution_flops(op: Op, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """A TPU's form of a matrix product: batch dimensions are windows whose padding and dilation leave one product each, so only
    positions where the window meets an element count."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", op.attributes) or ["", ""])[1]))
    spatial, result = sum(c.isdigit() for c in lhs), op.shapes[0].dims
    per = lambda name, default: window[name].split("x") if name in window else [default] * spatial  # noqa: E731
    positions = 1
    for d in range(spatial):
        size, stride, dilate, spread = (int(per(n, 1)[d]) for n in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        low = int(str(per("pad", "0_0")[d]).split("_")[0])
        at = np.arange(result[out.index(str(d))])[:, None] * stride + np.arange(size)[None] * spread - low
        length = (left[lhs.index(str(d))] - 1) * dilate + 1
        positions *= int(np.sum((at >= 0) & (at < length) & (at % dilate == 0)))
    groups = int((re.search(r"batch_group_count=(\d+)", op.attributes) or ["", 1])[1])
    return 2 * positions * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")] // groups


def group_axes(attributes: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """(mesh axes that a collective's groups go along, joined by +; devices a group)."""
    members = first_group(attributes, math.prod(mesh.values()))
    places = np.unravel_index(np.array(members), tuple(mesh.values()))
    return "+".join(axis for axis, at in zip(mesh, places) if len(set(at.tolist())) > 1) or "none", len(members)


def first_group(attributes: str, devices: int) -> list[int]:
    """The devices of a collective's first group, from any of the four ways that HLO writes groups."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        pairs = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", found[1])]
        return next(([a, b] for a, b in pairs if a != b), [pairs[0][0]])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        names = re.findall(r"'(\w+)'", found[2])
        grid = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        return grid[tuple(slice(None) if name in names else 0 for name in sizes)].ravel().tolist()
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        order = [int(n) for n in found[3].split(",")] if found[3] else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)[0].tolist()
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in found[1].split(",")]
    return list(range(devices))


def full_gathers(collectives: list[Collective], shapes: set[tuple[int, ...]]) -> Iterator[Collective]:
    """All-gathers outside every loop whose result has one of these dimensions: whole parameters brought together at once."""
    squeezed = {tuple(d for d in dims if d > 1) for dims in shapes}
    for one in collectives:
        if one.kind == "all-gather" and not one.looped:
            if any(tuple(d for d in s.dims if d > 1) in squeezed for s in one.shapes):
                yield one
