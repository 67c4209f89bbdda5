"""The arguments of an op, written once: a frozen dataclass, whose fields are the schema of its torch.library ops."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypeVar

import torch

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
    fields = [field for field in dataclasses.fields(arguments) if field.name not in without]
    names, absent = [field.name for field in fields], dict.fromkeys(without)
    types = typing.get_type_hints(arguments)

    @functools.wraps(implementation)
    def run(*values: Any, **named: Any) -> Any:
        if absent:  # they lie between the others
            return implementation(arguments(**dict(zip(names, values, strict=False)), **named, **absent))
        return implementation(arguments(*values, **named))

    def parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(field.name, kind, default=default, annotation=types[field.name])

    returns = typing.get_type_hints(arguments.empty)["return"]
    returns = None if returns is type(None) else returns  # as torch's schemas have it
    signature = inspect.Signature([parameter(field) for field in fields], return_annotation=returns)
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def custom_op(name: str, arguments: type[A], *, without: Collection[str] = ()) -> Callable[[Callable[[A], Any]], Any]:
    """Decorator: an implementation as the op ``happyhorse_fast::name``, which torch traces without a look inside.

    So a reference, which walks its tables on the host, can be compiled and exported, and counts as one launch, like the
    kernel that it stands in for.

    Args:
        name: The op's, with its backend: ``"fp8_linear_reference"``.
        arguments: The op's.
        without: Fields that this op does not take.
    """

    def decorate(implementation: Callable[[A], Any]) -> Any:
        run = flat(implementation, arguments, without)
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=arguments.MUTATES)(run)
        op.register_fake(flat(arguments.empty, arguments, without))
        return op

    return decorate
