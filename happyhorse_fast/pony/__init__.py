"""The pony: a small joint audio-video model, trained on bouncing balls, that ships with the package.

It is of the published sandwich shape, so the same model code, token order, coordinates and samplers serve it. How it
was trained: ``examples/pony/``.
"""

from happyhorse_fast.pony.generate import PonyClip, encode_image, generate
from happyhorse_fast.pony.weights import load_codecs, load_model

__all__ = ["PonyClip", "encode_image", "generate", "load_codecs", "load_model"]
