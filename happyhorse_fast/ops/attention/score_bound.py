"""How large the scores of an attention can be, and so whether its softmax needs a running maximum.

softmax(s) = exp2(s - m) / sum(exp2(s - m)) for any m. The maximum of a row keeps exp2 in range; where a bound on every
score does that too, m = 0 will do, and no maximum is found, compared or corrected for. In powers of two, with B the
bound: a row's largest term is at least 2^-B, a sum of up to 2^19 terms at most 2^(B + 19), and of terms times v at most
2^(B + 19) max|v|. float32 holds normal numbers down to 2^-126 and sums below 2^128. B <= 100 leaves a row's largest
term 2^26 above what is lost, its sums at most 2^119 and, with max|v| <= 2^8, at most 2^127. A larger v, and more keys,
take their powers of two from B. So does a v whose largest element is below 2^-17: its products with P would come within
2^9 of what float32 rounds to 0. (Elements of v 2^32 times smaller than the largest of their head may become 0.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 100.0
"""Largest bound, in powers of two, under which the softmax goes without a maximum."""
KEYS = 2**19
"""Keys that :data:`LIMIT` leaves room for."""
FREE_V = 256.0
"""max|v| that :data:`LIMIT` leaves room for."""
SMALL_V = 2.0**-17
"""max|v| of a head from which on products with P keep their bits."""
SMALLEST_NORM = 2.0**-50
"""A shorter row of q or k counts as this long: from here on float32 holds the squares that matter."""
MARGIN = 1.07
"""Factor that rounding adds to a product of norms: k in int8, with a scale per 128 keys, passes its norm by up to
sqrt(D) / 254 = 4.4 % at D = 128, q with a scale of its own by 2.3 %; in bf16 both stay within 0.4 %."""


def score_limit(keys: int) -> float:
    """:data:`LIMIT`, less what more keys than :data:`KEYS` take of it."""
    return LIMIT - math.log2(keys / KEYS) if keys > KEYS else LIMIT


def effective_bound(scores: float, v_max: float) -> float:
    """The number that is held against :data:`LIMIT`: a bound on the scores, and what v adds to it.

    Args:
        scores: |scale * q.k| * log2(e) is at most this, for every query and key.
        v_max: max|v|.

    Returns:
        In powers of two; inf where one of the two is not finite.
    """
    if not (math.isfinite(scores) and math.isfinite(v_max)):
        return math.inf
    return scores + max(0.0, math.log2(max(v_max, FREE_V) / FREE_V))


def norm_scores(q_norm: Tensor, k_norm: Tensor) -> float:
    """Bound on the scores of a layer whose q and k are RMS-normalised per head, from its weights alone.

    A row of x / rms(x) has the norm sqrt(D), rotation keeps it, and the softmax scale is D^-0.5:
    |s| <= sqrt(D) max|1 + w_q| max|1 + w_k|, times :data:`MARGIN` for rounding.

    Args:
        q_norm: Weights w_q of the QK-norm, [..., D]; all experts', since any may meet any.
        k_norm: Weights w_k, [..., D].

    Returns:
        In powers of two; NaN or inf where a weight is not finite.
    """
    widest = float((1 + q_norm.double()).abs().max()) * float((1 + k_norm.double()).abs().max())
    return MARGIN * math.log2(math.e) * math.sqrt(q_norm.shape[-1]) * widest


def norm_bound(q_norm: Tensor, k_norm: Tensor, v_max: float = FREE_V) -> float:
    """:func:`effective_bound` of such a layer.

    Args:
        q_norm: As for :func:`norm_scores`.
        k_norm: As for :func:`norm_scores`.
        v_max: Bound on |v|.
    """
    return effective_bound(norm_scores(q_norm, k_norm), v_max)


def value_bound(norm: Tensor, weight: Tensor) -> float:
    """Bound on |v| of a layer, from its weights alone: |x.w| <= |x| |w| with x RMS-normalised.

    Args:
        norm: float, [E, C]: weights of the norm before QKV, which multiplies by (1 + norm).
        weight: [E, F, C]: rows of the QKV product that make v.

    Returns:
        :data:`MARGIN` * sqrt(C) * max over experts and rows of |(1 + norm) weight|.
    """
    rows = torch.linalg.vector_norm(weight.float() * (1 + norm.float())[:, None], dim=2)
    return MARGIN * math.sqrt(norm.shape[-1]) * float(rows.max())


def scores_fit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Whether tensors of any model stay within :data:`LIMIT`, by |q.k| <= |q| |k|; found on the device, no wait for it.

    Reads q, k and v once: at 64,256 tokens and 40:8 heads of 128 0.9 GB in bf16, predicted 0.25 ms of an H200.

    Args:
        q: [N, Hq, D].
        k: [M, Hkv, D]; query head h reads key head h // (Hq / Hkv).
        v: [M, Hkv, D].
        scale: Softmax scale.

    Returns:
        int32 [1]: 1 where :func:`effective_bound`, with what a small v adds, is at most :func:`score_limit`; 0 also
        where a tensor holds inf or NaN, or v of a head nothing but 0.
    """
    if q.shape[0] == 0 or k.shape[0] == 0:  # no scores; the largest of none is an error
        return torch.ones(1, dtype=torch.int32, device=q.device)
    norm, f32 = torch.linalg.vector_norm, torch.float32
    q_norm = norm(q, dim=2, dtype=f32).unflatten(1, (k.shape[1], -1)).amax(dim=(0, 2)).clamp(min=SMALLEST_NORM)
    k_norm = norm(k, dim=2, dtype=f32).amax(dim=0).clamp(min=SMALLEST_NORM)
    smallest, largest = norm(v, ord=math.inf, dim=(0, 2), dtype=f32).aminmax()  # of a head's largest elements
    v_part = torch.maximum(largest / FREE_V, SMALL_V / smallest).clamp(min=1).log2()
    scores = (q_norm * k_norm).amax()
    bound = v_part.add(scores, alpha=scale * math.log2(math.e) * (1 + 2**-10))
    return (bound <= score_limit(k.shape[0])).int().reshape(1)
