"""Cycles of a step of the Hopper attention kernel, played through from its compiled code, without a GPU.

    python -m bench.aot --only "hopper.*D 128"      # which tells it of every kernel

ptxas encodes with every instruction how many cycles its warp stalls, which scoreboards it waits for and which one its
result sets. One of an SM's four schedulers is played with these: a warp of each computing group, issued in order, one
instruction a cycle, where both can by the warp that issued last; pipes at their rates; the tensor core, which takes
products in the order they are issued; the loading warp, which fills a slot some time after both groups released it;
named barriers that pass turns. A product whose left operand is in registers is not passed before the tensor core begins
it.

What no listing says are :class:`Rates`. docs/kernels/attention.md holds the result against 14 measured forms.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.aot.gates import GROUP_THREADS

STEPS = 32
"""Steps that are played; the second half counts."""
MOST_CYCLES = 8192
"""Of a step: more means that it waits for ever."""
SCOREBOARDS = 6
_ENCODED = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z]\S*)(?P<rest>[^;]*);"
    r"\s*/\* 0x[0-9a-f]{16} \*/ /\* (?P<high>0x[0-9a-f]{16})"
)
_PIPES = {
    "mufu": (8, "MUFU"),
    "alu": (2, "LOP3 FMNMX F2FP SHF ISETP FSETP PRMT SEL FSEL LEA IADD3 I2FP VIADD VIMNMX MOV"),
    "imad": (2, "IMAD"),
    "shared": (4, "SHFL LDS STS SYNCS LDG BAR"),
}
"""Pipe -> cycles of a scheduler that an instruction takes it for, and the instructions that go there."""
PIPE = {op: (pipe, cycles) for pipe, (cycles, ops) in _PIPES.items() for op in ops.split()}


@dataclass(frozen=True)
class Rates:
    """Times in cycles that no listing says; chosen so that measured forms come out, near published latencies.

    Attributes:
        exponent: From issue to result, of MUFU.
        shuffle: Of what goes through shared memory's pipe.
        load: Of a load that L2 has.
        other: Of what else sets a scoreboard.
        reads: Until an instruction's operands are read.
        meeting: Of a group's warps.
        turn: From passing a turn to having it.
        products: From the end of a product to the end of the wait for it.
        left: More for a product whose left operand is in registers.
        change: More for a product of another type than the one before.
        arrival: From a release to the loading warp's next load.
        between: Between two loads.
        l2: From a load to its first byte.
        bytes: A cycle, of an SM.
    """

    exponent: int = 24
    shuffle: int = 24
    load: int = 230
    other: int = 20
    reads: int = 10
    meeting: int = 22
    turn: int = 20
    products: int = 14
    left: int = 4
    change: int = 140
    arrival: int = 72
    between: int = 30
    l2: int = 650
    bytes: float = 50.0


@dataclass(frozen=True)
class Roles:
    """What the waits and arrivals of a loop's body are for, in the order of the listing.

    Attributes:
        waits: (tile, step after the body's first whose tile it is); no tile where the wait ends at once.
        releases: Steps after the body's first that an arrival ends.
        steps: In a body.
    """

    waits: Sequence[tuple[str, int]] = (("k", 0), ("v", -1), ("", 0))
    releases: Sequence[int] = (0,)
    steps: int = 1

    def loads(self, number: int) -> tuple[str, int]:
        """(tile, step) of the loading warp's ``number``-th load."""
        return "kv"[number % 2], number // 2

    def frees(self, tile: str, step: int, slots: int) -> int:
        """The step whose end frees the slot for a tile."""
        return step - slots + (tile == "v")


@dataclass(frozen=True)
class Instruction:
    """One instruction and what ptxas encoded with it."""

    text: str
    op: str
    stall: int
    sets: int
    reads: int
    waits: tuple[int, ...]

    @classmethod
    def parsed(cls, line: str) -> Instruction:
        """From a line of a listing.

        Raises:
            ValueError: It is none.
        """
        found = _ENCODED.search(line)
        if found is None:
            raise ValueError(f"no encoded instruction: {line!r}")
        control = int(found["high"], 16) >> 41
        waits = tuple(i for i in range(SCOREBOARDS) if control >> 11 + i & 1)
        return cls(found["op"] + found["rest"], found["op"], control & 15, control >> 5 & 7, control >> 8 & 7, waits)

    @property
    def product(self) -> tuple[float, bool] | None:
        """(cycles of a tensor core, whether the left operand is in registers) of a warp-group product."""
        found = re.match(r"\wGMMA\.64x(\d+)x\d+\S* R\d+, (R|gdesc)", self.text)
        return (int(found[1]) / 2, found[2] == "R") if found else None


@dataclass
class Warp:
    """A warp of a group, and where it is."""

    group: int
    body: Sequence[Instruction]
    at: int = 0
    step: int = 0
    ready: float = 0.0
    ends: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    scoreboards: list[deque[float]] = field(default_factory=lambda: [deque() for _ in range(SCOREBOARDS)])
    batches: list[float] = field(default_factory=list)

    def next_of(self, kind: str) -> int:
        """How many of a kind stood before in the body."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.counts[kind] - 1

    def advance(self, now: float, steps: int) -> None:
        """Go to the next instruction."""
        self.at += 1
        if self.at == len(self.body):
            self.at, self.step, self.counts = 0, self.step + steps, {}
            self.ends.append(now)


class Player:
    """Plays both groups' loops.

    Args:
        bodies: Of the groups' loops over full blocks.
        slots: Of k and of v.
        tile_bytes: Of ``"k"`` and ``"v"``.
        roles: Of the waits in the bodies.
        rates: What the listing does not say.
    """

    def __init__(
        self,
        bodies: Sequence[Sequence[Instruction]],
        slots: int,
        tile_bytes: Mapping[str, int],
        roles: Roles | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.warps = [Warp(group, body) for group, body in enumerate(bodies)]
        self.slots, self.tile_bytes = slots, tile_bytes
        self.roles, self.rates = roles or Roles(), rates or Rates()
        self.full: dict[tuple[str, int], float] = {}
        self.released: list[dict[int, float]] = [{} for _ in bodies]
        self.turns: list[float | None] = [0.0, None]
        self.pipes: dict[str, float] = {}
        self.tensor_core, self.kind = 0.0, ""
        self.loaded, self.loader, self.l2 = 0, 0.0, 0.0

    def cycles(self) -> float:
        """Cycles of a step, in which each group does its half of a tile; infinite where both wait for ever."""
        now, last = 0, self.warps[0]
        while any(warp.step < STEPS for warp in self.warps):
            self._load(now)
            for warp in (last, self.warps[1 - last.group]):
                if self._issue(warp, now):
                    last = warp
                    break
            now += 1
            if now > STEPS * MOST_CYCLES:
                return float("inf")
        ends = self.warps[0].ends
        half = len(ends) // 2
        return (ends[-1] - ends[half]) / (self.roles.steps * (len(ends) - 1 - half))

    def _load(self, now: float) -> None:
        while self.loaded < 2 * (STEPS + self.slots + 2 * self.roles.steps):
            tile, step = self.roles.loads(self.loaded)
            freed = self.roles.frees(tile, step, self.slots)
            ends = [released.get(freed, now) for released in self.released] if freed >= 0 else []
            if max([self.loader, *(end + self.rates.arrival for end in ends)]) > now:
                return
            self.loader = now + self.rates.between
            self.l2 = max(now, self.l2) + self.tile_bytes[tile] / self.rates.bytes
            self.full[tile, step] = self.l2 + self.rates.l2
            self.loaded += 1

    def _issue(self, warp: Warp, now: float) -> bool:
        """Issue a warp's next instruction, where it can be."""
        one = warp.body[warp.at]
        name, pipe, cycles = one.op.split(".")[0], *PIPE.get(one.op.split(".")[0], ("", 0))
        if warp.ready > now or self.pipes.get(pipe, 0.0) > now:
            return False
        for board in warp.scoreboards:
            while board and board[0] <= now:
                board.popleft()
        if any(warp.scoreboards[i] for i in one.waits):
            return False
        wait = self._special(warp, one, name, now)
        if wait is None:
            return False
        warp.ready = now + max(one.stall, 1, wait)
        if pipe:
            self.pipes[pipe] = now + cycles
        rates = self.rates
        latency = {"mufu": rates.exponent, "shared": rates.load if name == "LDG" else rates.shuffle}
        if one.sets < SCOREBOARDS:
            taken = rates.other if name == "SYNCS" else latency.get(pipe, rates.other)
            warp.scoreboards[one.sets].append(now + taken)
        if one.reads < SCOREBOARDS:
            warp.scoreboards[one.reads].append(now + rates.reads)
        warp.advance(now, self.roles.steps)
        return True

    def _special(self, warp: Warp, one: Instruction, name: str, now: float) -> float | None:
        """Cycles that the warp waits behind an instruction; None where it cannot be issued yet."""
        rates = self.rates
        if one.product is not None:
            return self._multiply(warp, one, now)
        if "TRYWAIT" in one.op:
            tile, later = self.roles.waits[warp.counts.get("wait", 0)]
            step = warp.step + later
            if tile and step >= 0 and self.full.get((tile, step), now + 1) > now:
                return None
            warp.next_of("wait")
        elif "SYNCS.ARRIVE" in one.op:
            self.released[warp.group][warp.step + self.roles.releases[warp.next_of("release")]] = now
        elif name == "BAR" and hex(GROUP_THREADS) in one.text:
            if "ARV" in one.op:
                self.turns[1 - warp.group] = now + rates.turn
            else:
                turn = self.turns[warp.group]
                if turn is None or turn > now:
                    return None
                self.turns[warp.group] = None
                return rates.turn
        elif name == "BAR":
            return rates.meeting
        elif "DEPBAR" in one.op:
            left = int(one.text.split("0x")[1])
            over = warp.batches[: len(warp.batches) - left]
            if over and over[-1] + rates.products > now:
                return None
            warp.batches = warp.batches[len(over) :]
        return 0.0

    def _multiply(self, warp: Warp, one: Instruction, now: float) -> float | None:
        assert one.product is not None
        cycles, left = one.product
        if left and self.tensor_core > now:
            return None
        cycles += self.rates.left * left + self.rates.change * (one.op[0] != self.kind)
        self.kind = one.op[0]
        self.tensor_core = max(now, self.tensor_core) + cycles
        if "gsb0" in one.text:
            warp.batches.append(self.tensor_core)
        return 0.0
