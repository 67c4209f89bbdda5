"""From a prompt to a file: the parts around the Transformer that turn inputs into latents and latents into frames."""

from happyhorse_fast.pipeline.turbo import TurboDecoder, to_uint8

__all__ = ["TurboDecoder", "to_uint8"]
