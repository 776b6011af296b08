"""Which parameters to compute for: names, globs, modules, parameters, a predicate, or a mix of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from bncurv.slow import listed

Predicate: TypeAlias = Callable[[str, nn.Parameter], bool]
Choice: TypeAlias = "str | nn.Module | Tensor | Predicate"

_EXPECTED = "names, globs such as 'layer1.*', modules, parameters, a predicate f(name, p) -> bool, or a list of these"


def select_parameters(model: nn.Module, params: Choice | Iterable[Choice] | None) -> dict[str, Tensor]:
    """Parameters by name: those chosen by ``params``, in its order, or all that require grad.

    Args:
        model: whose.
        params: names, globs, modules, parameters, predicates ``f(name, p) -> bool``, one or an iterable of them.

    Raises:
        TypeError: for what is none of these.
        ValueError: for one that chooses nothing: unknown, of another model, or frozen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    named: dict[str, Tensor] = dict(model.named_parameters())
    if params is None:
        found = {name: p for name, p in named.items() if p.requires_grad}
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no parameter that requires grad; there is nothing to compute curvature "
                "for."
            )
        return found
    names = [name for choice in _choices(params) for name in _chosen(model, named, choice)]
    if not names:
        raise ValueError("params is empty; expected at least one choice, or None for all that require grad.")
    return {name: named[name] for name in names}


def _choices(params: Any) -> Iterator[Any]:
    if isinstance(params, str | nn.Module | Tensor) or (callable(params) and not isinstance(params, Iterable)):
        yield params
    elif isinstance(params, Iterable) and not isinstance(params, bytes):
        yield from params
    else:
        raise TypeError(f"params={params!r}; expected {_EXPECTED}.")


def _chosen(model: nn.Module, named: Mapping[str, Tensor], choice: Any) -> list[str]:
    """The names that one choice stands for, at least one."""
    if isinstance(choice, str):
        return _by_name(model, named, choice)
    if isinstance(choice, Tensor):
        return _by_identity(model, named, choice)
    if isinstance(choice, nn.Module):
        return _of_module(model, named, choice)
    if callable(choice):
        return _by_predicate(named, choice)
    raise TypeError(f"params holds {choice!r}; expected {_EXPECTED}.")


def _by_name(model: nn.Module, named: Mapping[str, Tensor], name: str) -> list[str]:
    if name in named:
        return _not_frozen(named, name)
    if any(sign in name for sign in "*?["):
        return _trainable(named, [n for n in named if fnmatchcase(n, name)], f"the glob '{name}'", list(named))
    if name in dict(model.named_modules()):
        raise ValueError(f"params names '{name}', a module; for its parameters write '{name}.*', or pass the module.")
    close = difflib.get_close_matches(name, named, n=3) or list(named)[:3]
    raise ValueError(f"params names '{name}', which {type(model).__name__} does not have; did you mean {close}?")


def _by_identity(model: nn.Module, named: Mapping[str, Tensor], p: Tensor) -> list[str]:
    for name, own in named.items():
        if own is p:
            return _not_frozen(named, name)
    raise ValueError(
        f"params holds a tensor of shape {tuple(p.shape)} that is no parameter of {type(model).__name__} (of another "
        "model, a copy, or computed from one?). Take it from model.parameters(), or pass its name."
    )


def _not_frozen(named: Mapping[str, Tensor], name: str) -> list[str]:
    if not named[name].requires_grad:
        raise ValueError(f"params names '{name}', which has requires_grad=False; set it to True, or leave it out.")
    return [name]


def _of_module(model: nn.Module, named: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
    what = f"the module {type(module).__name__}"
    if not names:
        raise ValueError(f"params holds {what}, which is no part of {type(model).__name__} (a copy, another model?).")
    inside = {id(p) for p in module.parameters()}
    return _trainable(named, [n for n, p in named.items() if id(p) in inside], f"{what} '{names[0]}'", [])


def _trainable(named: Mapping[str, Tensor], names: list[str], what: str, all_names: list[str]) -> list[str]:
    """Those that require grad."""
    found = [name for name in names if named[name].requires_grad]
    if not names:
        known = f"; the model's are {listed(all_names)}" if all_names else ""
        raise ValueError(f"params: {what} holds no parameter{known}.")
    if not found:
        raise ValueError(f"params: {what} holds {listed(names)} only, with requires_grad=False; set it to True.")
    return found


def _by_predicate(named: Mapping[str, Tensor], predicate: Callable[..., Any]) -> list[str]:
    label, found = getattr(predicate, "__name__", type(predicate).__name__), []
    for name, p in named.items():
        if not p.requires_grad:
            continue
        verdict = predicate(name, p)
        if not isinstance(verdict, bool):
            raise TypeError(
                f"params: the predicate {label} returned {type(verdict).__name__} for '{name}'; expected True or False."
            )
        if verdict:
            found.append(name)
    if not found:
        raise ValueError(f"params: the predicate {label} is False for every parameter that requires grad.")
    return found
