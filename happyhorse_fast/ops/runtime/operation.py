"""The arguments of an op, written once: a frozen dataclass, whose fields are the schema of its torch.library ops."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypeVar

import torch

from happyhorse_fast import ambient
from happyhorse_fast.ops.runtime.ranges import ranged

NAMESPACE = "happyhorse_fast"
Implementation = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Base of an op's arguments: a field each, in the op's order.

    Attributes:
        MUTATES: Names of the tensors that the op writes to.
    """

    MUTATES: ClassVar[tuple[str, ...]] = ()

    def values(self, *, without: Collection[str] = ()) -> tuple[Any, ...]:
        """The arguments in the op's order, but for those that an op is registered ``without``."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in without)

    def empty(self) -> Any:
        """The op's results, not yet written: each implementation fills them, and torch traces with them."""
        raise NotImplementedError


A = TypeVar("A", bound=Arguments)


def flat(implementation: Callable[[A], Any], arguments: type[A], without: Collection[str] = ()) -> Implementation:
    """A function of an op's arguments as one of the fields, with their names, types and defaults.

    Args:
        implementation: Takes the dataclass.
        arguments: The dataclass.
        without: Fields that the function does not take; they are None.
    """
    whole = inspect.signature(arguments, eval_str=True)
    parameters = [parameter for name, parameter in whole.parameters.items() if name not in without]
    names, absent = [parameter.name for parameter in parameters], dict.fromkeys(without)

    @functools.wraps(implementation)
    def run(*values: Any, **named: Any) -> Any:
        if absent:  # they lie between the others
            return implementation(arguments(**dict(zip(names, values, strict=False)), **named, **absent))
        return implementation(arguments(*values, **named))

    returns = inspect.signature(arguments.empty, eval_str=True).return_annotation
    run.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return run


def custom_op(name: str, arguments: type[A], *, without: Collection[str] = ()) -> Callable[[Callable[[A], Any]], Any]:
    """Decorator: an implementation as the op ``happyhorse_fast::name``, which torch traces without a look inside.

    Args:
        name: The op's, with its backend: ``"rmsnorm_quantize_cuda"``.
        arguments: The op's.
        without: Fields that this op does not take.
    """

    def decorate(implementation: Callable[[A], Any]) -> Any:
        run = ranged(flat(implementation, arguments, without))
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=arguments.MUTATES)(run)
        op.register_fake(flat(arguments.empty, arguments, without))
        return op

    return decorate


def reference_op(arguments: type[A]) -> Callable[[Callable[[A], Any]], Any]:
    """Decorator: an op in plain torch, whatever the caller has set there, as ``happyhorse_fast::<its name>_reference``.

    A reference walks its tables on the host. As an op it can be compiled and exported all the same, and counts as one
    launch, like the kernel that it stands in for.
    """

    def decorate(implementation: Callable[[A], Any]) -> Any:
        return custom_op(f"{implementation.__name__}_reference", arguments)(ambient.independent(implementation))

    return decorate
