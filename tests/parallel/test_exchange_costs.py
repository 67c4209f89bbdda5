"""Bytes on paper against bytes that a model's ranks send, and the memory that planned ranks take."""

import weakref

import pytest
import torch
from rank_work import config_of, model_of
from small_models import clip

from happyhorse_fast.fast import layer
from happyhorse_fast.fast.attention_over_ranks import attention_over_ranks
from happyhorse_fast.fast.config import FastConfig
from happyhorse_fast.fast.memory import StorageMeter, peak_memory
from happyhorse_fast.parallel.costs import LINKS, Exchange, layer_exchange
from happyhorse_fast.parallel.group import Planned
from happyhorse_fast.parallel.rows import RowShare
from happyhorse_fast.parallel.ulysses import Ulysses
from happyhorse_fast.tokens import ClipTokens
from happyhorse_fast.verify.forms import FORMS

SIZES = (7, 64, 128, 128)
"""Whole tiles, nine of them: eight frames' worth and no padding, so that paper and rows agree."""


class Counting(Planned):
    """Counts what is sent to other ranks."""

    def __init__(self, size, rank):
        super().__init__(size, rank)
        self.bytes = 0

    def exchange(self, x, sent, received, finish):
        self.bytes += x.nbytes - x[: sent[self.rank]].nbytes
        return super().exchange(x, sent, received, finish)


@pytest.mark.parametrize("ranks", [3, 9])
@pytest.mark.parametrize(
    ("precision", "attention"),
    [("bf16", "bf16"), ("int8", "int8_qk"), ("fp8", "fp8"), ("fp8", "bf16"), ("bf16", "fp8"), ("fp8", "int8_qk_fp8_v")],
)
def test_a_layer_sends_what_paper_says(ranks, precision, attention):
    config = config_of(9, num_heads_q=18)
    model = model_of(config, FastConfig(precision=precision, attention=attention, backend="reference"))
    model.fast.ranks = counted = Counting(ranks, 1)
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.bfloat16

    def attend(x, state, exact, out_scale):
        return torch.zeros(len(x.q), x.q.shape[1] * 32, dtype=dtype), out_scale

    for each in model.block.layers:  # what planned ranks receive is nothing to attend to
        each.attend = attend
    with torch.no_grad():
        model(*clip(*SIZES))
    size = ClipTokens(T=7, H=4, W=128, audio=128)
    paper = layer_exchange(config, size, ranks, text=128, precision=precision, attention=attention)
    assert counted.bytes == pytest.approx(2 * paper.bytes)
    assert paper.groups == 9 // ranks


def test_what_goes_beside_attention_takes_no_time():
    first, later, last = 1e9, 6e9, 2e9
    link = LINKS[0]
    parts = Exchange(first, later, last, 4)
    assert parts.seconds(link, 1.0) == pytest.approx((9 / 450, 3 / 450))
    assert parts.seconds(link, 0.004) == pytest.approx((9 / 450, 9 / 450 - 0.003))
    assert Exchange(first, 0, last, 1).seconds(link, 1.0) == pytest.approx((3 / 450, 3 / 450))


def test_buffers_of_two_heads_are_there_at_a_time():
    rows, groups, d, meter = 256, 4, 64, StorageMeter()
    ulysses = Ulysses(Planned(2), RowShare(2 * rows, 128, 2, 0))

    def attend(x, out_scale):
        return torch.zeros_like(x.q).flatten(1), out_scale

    with meter:
        q, k, v = (torch.zeros(rows, n, d, dtype=torch.bfloat16) for n in (40, 8, 8))
        gate = torch.zeros(rows, 40)
        inputs, of_head = [q, k, v, None, None, None, gate], q.nbytes // groups
        whole = q.nbytes + gate.nbytes + k.nbytes + v.nbytes
        del q, k, v, gate
        attention_over_ranks(inputs, ulysses, attend, fp8_out=False)
    # A head's queries here; the next one's and the last one's output, each sent and arriving; the output that is made.
    assert whole + 5 * of_head < meter.peak_bytes < whole + 6.5 * of_head


def test_a_layer_holds_nothing_that_was_sent(monkeypatch):
    kept = []

    def emptied(inputs, ulysses, attend, *, fp8_out):
        queries = weakref.ref(inputs[0])
        zeros = torch.zeros_like(inputs[0]).flatten(1)
        inputs.clear()
        kept.append(queries())
        return zeros, None

    monkeypatch.setattr(layer, "attention_over_ranks", emptied)
    model = model_of(config_of(2), FastConfig(backend="reference"))
    model.fast.ranks = Planned(2)
    with torch.no_grad():
        model(*clip(*SIZES))
    assert kept == [None, None]


@pytest.mark.parametrize("form", [FORMS[1], FORMS[2]], ids=lambda form: form.name)
def test_a_planned_rank_takes_a_share_of_memory(form):
    model, size = form.without_weights(config_of(4, hidden_size=512)), ClipTokens(T=8, H=32, W=32, audio=32)
    alone, two, four = (peak_memory(model, size, gpus=p) for p in (1, 2, 4))
    assert alone.weight_bytes == two.weight_bytes == four.weight_bytes
    whole, half, quarter = (peak.peak_bytes - peak.weight_bytes for peak in (alone, two, four))
    assert quarter < half < whole
    assert half < 0.65 * whole  # inputs and results are whole on every rank
