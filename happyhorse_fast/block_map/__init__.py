"""Which blocks of 128 keys every block of 128 queries attends to: one type, and what it is made from."""

from happyhorse_fast.block_map.bits import BLOCK
from happyhorse_fast.block_map.layout import Layout
from happyhorse_fast.block_map.map import BlockMap
from happyhorse_fast.block_map.selector import BlockSelector
from happyhorse_fast.block_map.tiles import tile_order

__all__ = ["BLOCK", "BlockMap", "BlockSelector", "Layout", "tile_order"]
