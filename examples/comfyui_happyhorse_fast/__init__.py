"""Custom nodes of ComfyUI: happyhorse_fast's attention in any model, and HappyHorse models with their sampler.

Copy or link this folder into ComfyUI's ``custom_nodes``, with this package in its environment.
"""

from __future__ import annotations

from .nodes import Attention, Load, Sample, Text

NODE_CLASS_MAPPINGS = {
    "HappyHorseFastAttention": Attention,
    "HappyHorseFastLoad": Load,
    "HappyHorseFastText": Text,
    "HappyHorseFastSample": Sample,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HappyHorseFastAttention": "Attention by happyhorse_fast",
    "HappyHorseFastLoad": "Load HappyHorse",
    "HappyHorseFastText": "Load text embedding",
    "HappyHorseFastSample": "Sample HappyHorse",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
