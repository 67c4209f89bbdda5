"""Keys of a checkpoint that was saved from within a wrapper, as the model itself has them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from happyhorse_fast.arguments import CheckpointError

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_IN_MODEL = re.compile(
    r"^(?P<prefix>(?:.*?\.)??)(?:adapter\.(?:rope|\w+_embedder)|block\.layers|final_(?:norm|linear)_\w+)\."
)


def model_keys(keys: Iterable[str], path: Path) -> dict[str, str]:
    """The model's key of every key of a checkpoint.

    What torch.compile, FSDP and activation checkpointing put into keys is taken out anywhere; a prefix (``module.``,
    ``model.``, ``transformer.``, ...) where all keys share it.

    Args:
        keys: As the files have them.
        path: The checkpoint, for the messages.

    Raises:
        CheckpointError: Several prefixes, or keys beside one; or two keys that become the same.
    """
    bare = {key: _WRAPPERS.sub("", key) for key in keys}
    matches = {key: _IN_MODEL.match(name) for key, name in bare.items()}
    prefixes = Counter(match["prefix"] for match in matches.values() if match)
    others = [key for key, match in matches.items() if match is None]
    if prefixes and "" not in prefixes:
        if len(prefixes) > 1 or others:
            found = [f"{prefix!r} ({count})" for prefix, count in prefixes.most_common()]
            beside = f" and {len(others)} without, such as {others[0]}" if others else ""
            raise CheckpointError(
                f"{path}: holds more than a model: keys with the prefix {', '.join(found)}{beside}. Save the "
                "tensors of one model alone (load_file, choose, save_checkpoint)"
            )
        prefix = next(iter(prefixes))
        bare = {key: name.removeprefix(prefix) for key, name in bare.items()}
    twice = [name for name, count in Counter(bare.values()).items() if count > 1]
    if twice:
        both = [key for key, name in bare.items() if name == twice[0]]
        raise CheckpointError(f"{path}: {' and '.join(both)} are the same tensor of a model")
    return bare
