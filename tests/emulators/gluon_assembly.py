"""The few lines of PTX that the Gluon kernel has, for `gluon_emulator`: what each does to whole tensors."""

from __future__ import annotations

import re
from typing import Any

import torch
from gluon_machine import EmulationError, Program, Value, value

BAR = re.compile(r"bar\.(sync|arrive) \$1, (\d+); mov\.b32 \$0, \$1;")
OWN = "shfl.sync.bfly.b32 $0, $1, 0, 0x1f, 0xffffffff;"
COPY = "mov.b32 $0, $1;"
E4M3 = (
    "{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
    "mov.b32 $0, {l, h};}"
)
SCALARS = {"lg2.approx.ftz.f32 $0, $1;": torch.log2, "rcp.approx.ftz.f32 $0, $1;": torch.reciprocal}


def assembly(program: Program, asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int) -> Any:
    """`gl.inline_asm_elementwise`. What writes is not pure: the compiler would drop it."""
    if (found := BAR.fullmatch(asm)) is not None:
        if is_pure:
            raise EmulationError("a barrier that the compiler may drop")
        program.come(int(args[0]), int(found[2]), wait=found[1] == "sync")
        return value(0)
    if asm == OWN:  # a thread's own number: of use for where it stands alone
        if is_pure:
            raise EmulationError("a shuffle that the compiler may move")
        return args[0]
    given = [torch.as_tensor(x).as_subclass(torch.Tensor) for x in args]
    if asm in SCALARS:
        made = SCALARS[asm](given[0])
    elif asm == "cvt.rn.bf16x2.f32 $0, $2, $1;":  # the first operand goes to the upper half
        made = _words([x.bfloat16() for x in given])
    elif asm == E4M3:
        made = _words([x.clamp(-448, 448).to(torch.float8_e4m3fn) for x in given])
    elif asm == COPY:
        words = given[0].unflatten(-1, (-1, pack))
        if not (words == words[..., :1]).all():
            raise EmulationError(f"{pack} elements of one word that are not the same")
        made = words[..., 0].contiguous().view(dtype)
    else:
        raise EmulationError(f"unknown assembly {asm!r}")
    return made.as_subclass(Value)


def _words(parts: list[torch.Tensor]) -> torch.Tensor:
    """32-bit words of elements, the first of them lowest."""
    return torch.stack(parts, dim=-1).contiguous().view(torch.int32)[..., 0]
