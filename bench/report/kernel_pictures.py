"""Draw the pictures of docs/kernels, one per kernel: tiles, warps, rings, who waits for whom; and docs/layer.svg.

python -m bench.report.kernel_pictures

But for attention's, lengths are not to scale: only the order is true. Sizes are those of the launch tables for sm_90.
"""

from __future__ import annotations

from bench.report import attention_turns, dataflow
from bench.report.lanes import BLUE, FOLDER, GREEN, GREY, ORANGE, VIOLET, Arrow, Bar, Picture
from happyhorse_fast.config import ModelConfig
from happyhorse_fast.kernels.launch import HOPPER_ARCH, LaunchConfig, config_for

CONFIG = ModelConfig.preset("happyhorse-1.0-15b")
LATENCY, PRODUCT, PIECE = 1.9, 1.0, 1.3
"""Lengths of a load, of a step's product, of a piece of an epilogue; not to scale."""
DRAWN = 6
"""Steps of the reduction that are drawn of all."""
FINISH = "epilogue"


def ring(slots: int, pieces: tuple[str, ...], *, flattened: bool) -> tuple[list[Bar], list[Arrow], float]:
    """Two tiles of a product whose operands come through a ring; the end of the second.

    Args:
        slots: Of the ring: tiles of both operands.
        pieces: What the epilogue does, one after another.
        flattened: Whether the next tile's first loads are issued before the epilogue.
    """
    bars: list[Bar] = []
    arrows: list[Arrow] = []
    freed, starts, done = [0.0] * slots, list[float](), 0.0
    for tile in range(2):
        for step in range(DRAWN):
            slot = (tile * DRAWN + step) % slots
            name, label = f"slot {slot}", f"k {step}" if step < DRAWN - 1 else "last k"
            # A load is issued with the product so many steps before its own.
            issued = max(freed[slot], starts[1 - slots] if len(starts) >= slots - 1 else 0.0)
            full = issued + LATENCY
            starts.append(start := max(done, full))
            bars.append(Bar(name, issued, full, f"loads {label}", name, faint=True))
            bars.append(Bar(name, full, start + PRODUCT, f"holds {label}", name))
            bars.append(Bar("tensor cores", start, start + PRODUCT, label, "tensor cores"))
            done = freed[slot] = start + PRODUCT
            if tile == 0 and step == 0:
                arrows.append(Arrow(start, name, "tensor cores", "full"))
            if tile == 0 and step == 1:
                arrows.append(Arrow(done, "tensor cores", name, "free"))
        arrows.append(Arrow(done, "tensor cores", FINISH, "the accumulator, in registers"))
        for piece in pieces:
            bars.append(Bar(FINISH, done, done + PIECE, piece, FINISH))
            done += PIECE
        if not flattened:
            freed, starts = [done] * slots, []
    return bars, arrows, done


def operands(config: LaunchConfig) -> str:
    """A product's tile and ring in words."""
    kib = (config.block_m + config.block_n) * config.block_k / 1024
    return (
        f"With 8 bits on sm_{HOPPER_ARCH} a program of {config.num_warps} warps, one per multiprocessor, computes "
        f"tiles of {config.block_m} rows x {config.block_n} columns; TMA fills a ring of {config.num_stages} slots of "
        f"{kib:.0f} KiB, {config.block_k} of K each. A product waits until its slot is full, a load until it is free. "
    )


def walk(config: LaunchConfig, columns: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Number tiles in the order they are computed: ``group_m`` row tiles of a column tile, then the next."""
    group = config.group_m

    def row(name: str, place: int | None) -> tuple[str, ...]:
        return name, *("…" if place is None else f"{n * group + place}" for n in range(len(columns)))

    rows = (row("rows 0-127", 0), row("128-255", 1), row("…", None), row(f"tile {group - 1}", group - 1))
    return ("", *columns), rows


def product_lanes(slots: int) -> dict[str, str]:
    """Lanes of a product: its ring, the tensor cores, the epilogue."""
    return {f"slot {i}": GREY for i in range(slots)} | {"tensor cores": GREEN, FINISH: BLUE}


def qkv() -> Picture:
    """`qkv_linear`: two heads a tile, the epilogue between two tiles' products."""
    config = config_for("qkv", "qkv_fp8", HOPPER_ARCH)
    heads_q, heads_kv = CONFIG.num_heads_q, CONFIG.num_heads_kv
    bars, arrows, end = ring(config.num_stages, ("head a", "head b"), flattened=False)
    pairs = ("q 0, 1", "q 2, 3", "…", f"q {heads_q - 2}, {heads_q - 1}", "k 0, 1")
    return Picture(
        "qkv_linear: the same warps load, multiply and finish; a tile's epilogue ends before the next one's loads",
        product_lanes(config.num_stages), bars, arrows, 0.0, end,
        below=f"{operands(config)}Epilogue of a head: scales; QK-norm, rotation and quantisation of q and k; v by its "
        f"own maximum; sigmoid of gates. {heads_q} heads of q, {heads_kv} of k, {heads_kv} of v, one of gates. Which "
        "tile comes when, rows by pairs of heads:",
        tiles=walk(config, pairs),
    )  # fmt: skip


def linear() -> Picture:
    """`fp8_linear` with a residual: the memory adds while the next tile's operands come."""
    config = config_for("linear", "fp8_residual", HOPPER_ARCH)
    pieces = config.block_n // 64
    bars, arrows, end = ring(config.num_stages, tuple(f"piece {i}" for i in range(pieces)), flattened=True)
    lanes = product_lanes(config.num_stages) | {"L2 adds": ORANGE}
    for bar in [bar for bar in bars if bar.lane == FINISH]:
        bars.append(Bar("L2 adds", bar.end, bar.end + PIECE, bar.label, "L2 adds"))
        if bar.label == "piece 0":
            arrows.append(Arrow(bar.end, FINISH, "L2 adds", "TMA reduce"))
    return Picture(
        "fp8_linear_residual: the next tile's loads are under way during the epilogue, and nobody waits for the sum",
        lanes, bars, arrows, 0.0, end + PIECE,
        below=f"{operands(config)}Epilogue in {pieces} pieces of 64 columns: scales, then through shared memory to L2, "
        "which adds to the residual stream. With an activation instead, gate and linear are neighbouring columns of "
        "one thread, and the result is stored. Which tile comes when:",
        tiles=walk(config, ("columns 0-255", "256-511", "512-767", "…")),
    )  # fmt: skip


def row_quantization() -> Picture:
    """`quantize_rows`: a row stays in registers, the next is on its way."""
    config = config_for("row_quantization", "columns_16384", HOPPER_ARCH)
    threads = 32 * config.num_warps
    lanes = {"memory reads": GREY, "tensor cores": GREEN, "all warps": BLUE, "memory writes": ORANGE}
    bars: list[Bar] = []
    arrows: list[Arrow] = []
    for i in range(4):
        row, read = ("row r", "row r + g", "row r + 2 g", "row r + 3 g")[i], 2.2 * i
        there = read + 2.2
        steps = (("tensor cores", 0.6, "Hadamard"), ("all warps", 0.7, "maximum"), ("all warps", 0.7, "codes"))
        bars.append(Bar("memory reads", read, there, row, "memory reads"))
        arrows.append(Arrow(there, "memory reads", "tensor cores", "the whole row is there"))
        for lane, taken, label in steps:
            bars.append(Bar(lane, there, there + taken, label, lane))
            there += taken
            if label == "Hadamard":
                arrows.append(Arrow(there, "tensor cores", "all warps", "float32"))
        arrows.append(Arrow(there, "all warps", "memory writes", "no one waits"))
        bars.append(Bar("memory writes", there, there + 1.1, row, "memory writes"))
    return Picture(
        "quantize_rows: one row after another, the next read while this one is in registers",
        lanes, bars, arrows, 0.0, 12.6,
        below=f"Rows of up to {config.block_k:,} channels: a program of {config.num_warps} warps holds a row in "
        f"{threads} threads, {config.block_k // threads} values each; the g programs of the GPU walk rows r, r + g, "
        "r + 2 g, ... The maximum is the one place where all threads meet: no code is written before the whole row was "
        "read.",
    )  # fmt: skip


def block_selection() -> Picture:
    """`select_blocks`: three launches, each of which waits for all of the one before."""
    select = config_for("block_selection", "select", HOPPER_ARCH)
    pool = config_for("block_selection", "pool_bf16", HOPPER_ARCH)
    order = config_for("block_selection", "order", HOPPER_ARCH)
    lanes = {"pool_blocks": BLUE, "select_blocks": GREEN, "order_rows": ORANGE, "attention": VIOLET}
    spans = (
        ("pool_blocks", 0.0, 2.0, "sum 128 tokens"),
        ("select_blocks", 2.0, 3.4, "scores of a row"),
        ("select_blocks", 3.4, 5.2, "threshold, bit by bit"),
        ("select_blocks", 5.2, 7.0, "full, then partial"),
        ("order_rows", 7.0, 8.4, "count longer rows"),
        ("attention", 8.4, 11.0, "rows, longest first"),
    )
    arrows = [
        Arrow(2.0, "pool_blocks", "select_blocks", "pooled q [Hq, R, D], pooled k [Hkv, D, S], float32"),
        Arrow(7.0, "select_blocks", "order_rows", "counts [Hkv, R, 2]"),
        Arrow(8.4, "order_rows", "attention", "order, with columns and mask_ids"),
    ]
    return Picture(
        "select_blocks: three launches on one stream; a launch waits for all programs of the one before it",
        lanes, [Bar(lane, start, end, label, lane) for lane, start, end, label in spans], arrows, 0.0, 11.0,
        below=f"Programs: pool_blocks one per block of 128 tokens and head, {pool.block_m} rows at a time; "
        f"select_blocks one per key/value head and block of queries, {select.num_warps} warps with up to "
        f"{select.block_n:,} scores in registers; order_rows one per {order.block_m} rows. Inside a launch no program "
        "waits for another, and the host waits for none: the map stays on the device.",
    )  # fmt: skip


PICTURES = {
    "attention_turns": attention_turns.picture,
    "qkv": qkv,
    "linear": linear,
    "row_quantization": row_quantization,
    "block_selection": block_selection,
}


def main() -> None:
    """Write the pictures."""
    for name, made in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(made().svg())
    dataflow.FIGURE.write_text(dataflow.svg())


if __name__ == "__main__":
    main()
