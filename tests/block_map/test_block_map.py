"""Block maps against brute force: every source, and every question a map answers."""

import dataclasses
import itertools
import time

import pytest
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.block_map import BLOCK, BlockMap, BlockSelector, Layout, tile_order
from happyhorse_fast.block_map.dynamic import choose
from happyhorse_fast.eager.sequence import Clip, local_ranges


def brute_force(q_ranges, k_ranges, queries, keys):
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(q_ranges, k_ranges, strict=True):
        mask[q0:q1, k0:k1] = True
    return mask


def held(block_map, mask):
    """Validate a map of one head and hold it against a dense mask."""
    block_map.validate()
    assert torch.equal(block_map.to_dense()[0], mask)
    assert block_map.pairs() == int(mask.sum())
    full, partial = block_map.blocks()
    tiles = torch.nn.functional.pad(mask, (0, -mask.shape[1] % BLOCK, 0, -mask.shape[0] % BLOCK))
    tiles = tiles.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum(dim=(1, 3))
    assert full + partial == int((tiles > 0).sum())


@st.composite
def ranges(draw):
    queries, keys = draw(st.integers(0, 400)), draw(st.integers(0, 400))
    span = lambda n: st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)  # noqa: E731
    rows = draw(st.lists(st.tuples(span(queries), span(keys)), max_size=8))
    return [q for q, _ in rows], [k for _, k in rows], queries, keys


@examples(60)
@given(ranges())
def test_from_ranges_is_the_union(case):
    held(BlockMap.from_ranges(*case), brute_force(*case))


def test_maps_are_compared_by_identity():
    a = BlockMap.dense(130, 130)
    assert a == a and a != BlockMap.dense(130, 130)


def test_overlapping_unsorted_and_touching_ranges_count_once():
    q = torch.tensor([[100, 300], [0, 300], [0, 128], [0, 128], [5, 5]])
    k = torch.tensor([[0, 200], [128, 256], [0, 64], [64, 128], [0, 300]])
    block_map = BlockMap.from_ranges(q, k, 300, 300)
    held(block_map, brute_force(q.tolist(), k.tolist(), 300, 300))
    assert block_map.counts[0, 0].tolist() == [2, 2], "two ranges that touch make one full block"


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ([(0, 10), (9, 3)], [(0, 1), (0, 1)], r"q_ranges\[1\].*got \[9, 3\]"),
        ([(0, 10)], [(0, 301)], r"k_ranges\[0\].*<= 300, got \[0, 301\]"),
        ([(-1, 10)], [(0, 1)], r"q_ranges\[0\].*got \[-1, 10\]"),
        ([(0, 10)], [(0, 1), (0, 2)], "as many rows, got 1 and 2"),
        ([(0.0, 10.0)], [(0, 1)], r"q_ranges must be integers of shape \[rows, 2\]"),
        ([0, 10], [(0, 1)], r"q_ranges must be integers of shape \[rows, 2\]"),
    ],
)
def test_bad_ranges_name_the_row(q, k, message):
    with pytest.raises(ValueError, match=message):
        BlockMap.from_ranges(q, k, 200, 300)


def test_186641_tokens_take_less_than_a_second():
    layout = Layout(91, 2040, 361, 640)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        block_map = BlockMap.frame_window(layout, 11)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
    assert block_map.queries == 186_641
    video = 91 * 2040
    windows = sum(min(f + 11, 90) - max(f - 11, 0) + 1 for f in range(91)) * 2040**2
    assert block_map.pairs() == windows + 2 * video * 1001 + 1001**2
    assert len(block_map.mask_bits) < 200, "masks are kept once"


@pytest.mark.parametrize("queries", [0, 1, 127, 128, 129, 255])
def test_dense_tails(queries):
    for keys in (0, 1, 128, 257):
        held(BlockMap.dense(queries, keys), torch.ones(queries, keys, dtype=torch.bool))


@pytest.mark.parametrize(
    ("frames", "rows", "columns", "audio", "text"),
    [(4, 7, 11, 29, 40), (3, 16, 16, 0, 1), (1, 5, 5, 130, 1), (5, 8, 16, 1, 0)],
)
@pytest.mark.parametrize("radius", [0, 1, 9])
def test_frame_window_is_the_public_one(frames, rows, columns, audio, text, radius):
    clip = Clip(frames, rows, columns, audio, text)
    public = local_ranges(clip, radius)
    mask = brute_force([r[:2] for r in public], [r[2:] for r in public], clip.total, clip.total)
    held(BlockMap.frame_window(Layout(frames, rows * columns, audio, text), radius), mask)

    aligned = Layout(frames, rows * columns, audio, text, align_frames=True, align_modalities=True)
    slots = torch.cat([torch.arange(*s) for s in aligned.frame_spans() + aligned.prefix_spans()])
    block_map = BlockMap.frame_window(aligned, radius)
    block_map.validate()
    dense = block_map.to_dense()[0]
    assert torch.equal(dense[slots][:, slots], mask)
    padding = torch.ones(aligned.slots, dtype=torch.bool)
    padding[slots] = False
    assert not dense[:, padding].any(), "padding is never a key"
    assert aligned.slots % BLOCK == 0


def test_frame_alignment_leaves_few_partial_blocks_and_two_masks():
    aligned = BlockMap.frame_window(Layout(31, 2040, 121, 640, align_frames=True, align_modalities=True), 11)
    packed = BlockMap.frame_window(Layout(31, 2040, 121, 640), 11)
    assert sum(aligned.blocks()) < sum(packed.blocks())
    assert len(aligned.mask_bits) == 2
    assert aligned.pairs() >= packed.pairs()
    assert aligned.density() == pytest.approx(0.612, abs=1e-3)


def test_several_clips_do_not_see_each_other():
    first, second = Layout(2, 77, 5, 9), Layout(3, 50, 0, 30)
    block_map = BlockMap.frame_window([first, second], 0)
    alone = [BlockMap.frame_window(layout, 0).to_dense()[0] for layout in (first, second)]
    held(block_map, torch.block_diag(*alone).bool())


def test_no_window_is_dense_over_the_tokens():
    held(BlockMap.frame_window(Layout(2, 77, 5, 9), None), torch.ones(168, 168, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockMap.frame_window([], 1), "at least one clip"),
        (lambda: BlockMap.frame_window(Layout(1, 1, 1, 1), -1), "receptive_field must be at least 0"),
        (lambda: Layout(1, -1, 1, 1), "frame_tokens must be at least 0, got -1"),
        (lambda: BlockMap.tile_window(Layout(1, 10, 0, 0), 3, (1, 1, 1), (1, 1, 1)), "columns must divide"),
        (lambda: BlockMap.tile_window(Layout(1, 10, 0, 0), 5, (1, 1, 1), (1, -1, 1)), "window must be at least 0"),
        (lambda: tile_order(1, 1, 1, (0, 1, 1)), "tile must be at least 1"),
        (lambda: BlockMap.dense(300, 300).to_flex() and dynamic_map().to_flex(3), "num_heads_q must be a multiple"),
        (lambda: BlockSelector(Layout(1, 10, 0, 0), BlockMap.dense(3, 3), "cpu"), "the layout's 10 slots, got 3 x 3"),
        (lambda: BlockMap.top_k(*torch.zeros(2, 9, 2, 8), LAYOUT, 1), r"q must be \[\d+, heads, D\]"),
        (lambda: BlockMap.top_k(*pooled_inputs(), LAYOUT, 0), "keep must be at least 1"),
        (lambda: BlockMap.top_p(*pooled_inputs(), LAYOUT, 0.0), "0 < mass <= 1, got 0.0"),
        (lambda: BlockMap.top_p(*pooled_inputs(), LAYOUT, 0.5, pool="min"), 'pool must be "max" or "mean"'),
    ],
)
def test_bad_arguments_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockMap.frame_window((4, 60), 1), r"layouts must be a Layout .*, got \(4, 60\)"),
        (lambda: BlockMap.tile_window("1080p", 5, (1, 1, 1), (1, 1, 1)), "layout must be a Layout, got '1080p'"),
        (lambda: BlockMap.tile_window(Layout(1, 10, 0, 0), 5, (1, 1), (1, 1, 1)), r"tile must be three .*\(1, 1\)"),
        (lambda: BlockMap.tile_window(Layout(1, 10, 0, 0), 5, (1, 1, 1), 3), "window must be three .* got 3"),
    ],
)
def test_arguments_of_another_type_say_what_is_allowed(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_tile_order_is_a_permutation_and_stays_within_frames():
    order = tile_order(3, 10, 14, (1, 4, 8))
    assert torch.equal(order.sort().values, torch.arange(420))
    assert torch.equal(order // 140, torch.arange(420) // 140)
    first = order[:32]
    assert (first // 14 < 4).all() and (first % 14 < 8).all()


@pytest.mark.parametrize("align", [False, True])
def test_tile_window_keeps_every_pair_of_the_token_window(align):
    frames, rows, columns, tile, window = 3, 16, 24, (1, 8, 8), (1, 1, 1)
    layout = Layout(frames, rows * columns, 20, 30, align_frames=align, align_modalities=align)
    block_map = BlockMap.tile_window(layout, columns, tile, window)
    block_map.validate()
    dense = block_map.to_dense()[0]
    order = tile_order(frames, rows, columns, tile)
    slots = torch.cat([torch.arange(*s) for s in layout.frame_spans()])
    place = torch.stack([order // (rows * columns), order // columns % rows // 8, order % columns // 8], dim=1)
    near = ((place[:, None] - place[None]).abs() <= torch.tensor(window)).all(dim=-1)
    assert (dense[slots][:, slots] | ~near).all()
    prefix = torch.cat([torch.arange(*s) for s in layout.prefix_spans()])
    assert dense[slots][:, prefix].all() and dense[prefix][:, slots].all()
    assert block_map.density() < 0.95
    base = BlockMap.frame_window(layout, 0)
    within = BlockMap.tile_window(layout, columns, tile, window, base).to_dense()[0]
    assert torch.equal(within, dense & base.to_dense()[0])


def test_a_window_within_a_base_on_a_gpu_is_made_there(monkeypatch):
    layout = Layout(3, 256, 20, 30, align_modalities=True)
    base = BlockMap.frame_window(layout, 1)
    shapes = [t.shape for t in base.to_blocks()]
    made = []

    def assembled(full, ids, *_):
        made.extend((full, ids))
        return *base.tensors(), base.queries, base.keys

    monkeypatch.setattr("happyhorse_fast.block_map.map.assemble", assembled)
    with FakeTensorMode():
        counts = torch.empty(base.counts.shape, dtype=torch.int32, device="cuda")
        full, ids = (torch.empty(s, device="cuda") for s in shapes)
        monkeypatch.setattr(BlockMap, "to_blocks", lambda self: (full.bool(), ids.int()))
        BlockMap.tile_window(layout, 16, (1, 1, 1), (1, 1, 1), dataclasses.replace(base, counts=counts))
    assert [t.device.type for t in made] == ["cuda", "cuda"]


def pooled_inputs(heads_q=4, heads_kv=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = LAYOUT.slots
    return (torch.randn(n, h, 32, generator=generator).bfloat16() for h in (heads_q, heads_kv))


LAYOUT = Layout(6, 250, 40, 60, align_frames=True, align_modalities=True)


def dynamic_map():
    return BlockMap.top_k(*pooled_inputs(), LAYOUT, 3)


def block_means(x, layout):
    held_slots = torch.zeros(layout.slots, dtype=torch.bool)
    for a, b in layout.frame_spans() + layout.prefix_spans():
        held_slots[a:b] = True
    parts = zip(x.double().split(BLOCK), held_slots.split(BLOCK), strict=True)
    return torch.stack([p[u].mean(dim=0) for p, u in parts])


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("radius", [None, 1])
def test_top_k_keeps_the_best_blocks_and_the_prefix(pool, radius):
    q, k = pooled_inputs()
    keep = 3
    exact = BlockMap.frame_window(LAYOUT, radius)
    block_map = BlockMap.top_k(q, k, LAYOUT, keep, base=exact, pool=pool)
    block_map.validate()
    full, ids = block_map.to_blocks()
    kept = full | (ids >= 0)
    base_full, base_ids = exact.to_blocks()
    base = (base_full | (base_ids >= 0))[0]
    video = LAYOUT.audio_start // BLOCK
    assert torch.equal(kept[:, video:], base[None, video:].expand(2, -1, -1)), "audio and text are dense as queries"
    assert kept[:, :, video:].all(), "and kept as keys"
    means_q, means_k = block_means(q, LAYOUT), block_means(k, LAYOUT)
    for head in range(2):
        scores = torch.stack([means_q[:, h] @ means_k[:, head].T for h in (2 * head, 2 * head + 1)])
        scores = scores.amax(dim=0) if pool == "max" else scores.mean(dim=0)
        for row in range(video):
            allowed = base[row, :video].nonzero().flatten()
            best = allowed[scores[row, allowed].argsort(descending=True)[:keep]]
            assert kept[head, row, :video].nonzero().flatten().tolist() == sorted(best.tolist())
    assert not (full & ~base_full).any(), "a block stays partial"


def test_top_p_holds_its_mass_with_the_fewest_blocks():
    q, k = pooled_inputs()
    q = q * 8
    block_map = BlockMap.top_p(q, k, LAYOUT, 0.7)
    block_map.validate()
    full, ids = block_map.to_blocks()
    video = LAYOUT.audio_start // BLOCK
    means_q, means_k = block_means(q, LAYOUT), block_means(k, LAYOUT)
    for head, row in itertools.product(range(2), range(video)):
        score = torch.stack([means_q[row, h] @ means_k[:video, head].T for h in (2 * head, 2 * head + 1)]).amax(dim=0)
        share = (score * 32**-0.5).softmax(dim=-1)
        chosen = share[(full | (ids >= 0))[head, row, :video]].sort().values
        assert chosen.sum() >= 0.7 - 1e-2
        assert chosen[1:].sum() < 0.7 + 1e-2
    everything = BlockMap.frame_window(LAYOUT, None).to_dense().expand(2, -1, -1)
    assert torch.equal(BlockMap.top_p(q, k, LAYOUT, 1.0).to_dense(), everything)


def test_dynamic_maps_are_made_without_waiting_for_the_device():
    chooser, (q, k) = BlockSelector(LAYOUT, BlockMap.frame_window(LAYOUT, None), "cpu"), pooled_inputs()

    def chosen(keep, mass):
        return chooser.base.within(choose(q, k, *chooser.tensors(), None, None, keep, mass, False))

    class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
            return func(*args, **(kwargs or {}))

    with NoSync():
        chosen(3, 0)
        chosen(0, 2**19)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        chosen(3, 0).pairs()


def test_scales_of_codes_count_in_the_pooled_scores():
    q, k = pooled_inputs()
    blocks = LAYOUT.slots // BLOCK
    scale = torch.linspace(0.01, 0.02, blocks)
    each = scale.repeat_interleave(BLOCK).view(-1, 1, 1)
    codes = [(x.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn) for x in (q, k)]
    back = [(c.float() * each).bfloat16() for c in codes]
    from_codes = BlockMap.top_k(*codes, LAYOUT, 2, q_scale=scale, k_scale=scale).to_dense()
    assert (from_codes == BlockMap.top_k(*back, LAYOUT, 2).to_dense()).float().mean() > 0.99


def test_dynamic_maps_go_to_flex_per_query_head():
    block_map = dynamic_map()
    back = BlockMap.from_flex(block_map.to_flex(num_heads_q=4))
    assert torch.equal(back.to_dense(), block_map.to_dense().repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("columns", lambda t: t + 3, "columns must lie in 0..2"),
        ("columns", lambda t: torch.zeros_like(t), "at most once per row"),
        ("order", lambda t: torch.zeros_like(t), "order must be a permutation"),
        ("counts", lambda t: t.flip(-1), "0 <= full <= all"),
        ("starts", lambda t: t.flip(-1), "one after another"),
        ("mask_ids", lambda t: torch.full_like(t, -1), "mask_ids must be -1 for full"),
        ("mask_bits", lambda t: torch.full_like(t, -1), "must be 0 past key"),
        ("mask_bits", lambda t: t.long(), "contiguous int32"),
        ("order", lambda t: t[1:], r"order must be of shape \(3,\)"),
    ],
)
def test_validate_finds_a_broken_map(field, change, message):
    good = BlockMap.from_ranges([(0, 300), (0, 100)], [(0, 200), (200, 300)], 300, 300)
    good.validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **{field: change(getattr(good, field))}).validate()


def test_a_full_last_block_that_lacks_keys_is_refused():
    whole = BlockMap.dense(128, 256)
    with pytest.raises(ValueError, match="so it must be partial"):
        dataclasses.replace(whole, keys=200).validate()


def test_rows_come_longest_first_and_equal_ones_in_order():
    block_map = BlockMap.frame_window(Layout(6, 256, 10, 20), 1)
    lengths = block_map.counts[0, :, 1][block_map.order.long()]
    assert (lengths[:-1] >= lengths[1:]).all()
    same = block_map.order[lengths == lengths.mode().values]
    assert (same[:-1] < same[1:]).all()


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    layout = Layout(5, 300, 30, 60)
    path = tmp_path / "map.png"
    axis = BlockMap.frame_window(layout, 1).plot(path, layout=layout)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "useful" in axis.get_title()
    dynamic_map().plot(head=1)
    with pytest.raises(ValueError, match=r"head must be in 0\.\.1, got 2"):
        dynamic_map().plot(head=2)
