"""Tensors inside of containers: found in order, changed without another kind or order of container."""

from collections import OrderedDict, UserDict, UserList, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bncurv.nested import held, mapped, moved, named, renewed, tensors

a, b, c = torch.arange(3.0), torch.ones(2, 2), torch.zeros(1, dtype=torch.long)
Pair = namedtuple("Pair", ["one", "two"])


class Named(dict):
    """As model libraries return it: entries are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        setattr(self, key, value)


@dataclass
class Holder:
    one: Any
    two: Any


STRUCTURES = {
    "tensor": (a, 1),
    "tuple": ((a, [b, None], 3), 2),
    "namedtuple": (Pair(a, Pair(b, [1])), 2),
    "dict": ({"u": a, 1: (b, c)}, 3),
    "OrderedDict": (OrderedDict(z=a, y=b), 2),
    "UserDict": (UserDict(u=[a]), 1),
    "read only": (MappingProxyType({"u": a, "v": 1}), 1),
    "named entries": (Named(u=a, v=b), 2),
    "size": (a.shape, 0),
    "object": (Holder(a, b), 0),
    "nothing": (None, 0),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_mapped(kind: str) -> None:
    value, count = STRUCTURES[kind]
    before = list(tensors(value))
    assert len(before) == count
    assert mapped(lambda t: t, value) is value
    doubled = mapped(lambda t: 2 * t, value)
    assert type(doubled) is type(value) and (count == 0) == (doubled is value)
    assert all(torch.equal(new, 2 * t) for new, t in zip(tensors(doubled), before, strict=True))
    assert [id(t) for t in tensors(value)] == [id(t) for t in before]


def test_unchanged_parts_stay() -> None:
    inner = [b]
    value = {"u": a, "inner": inner}
    changed = mapped(lambda t: t + 1 if t is a else t, value)
    assert changed is not value and changed["inner"] is inner and torch.equal(changed["u"], a + 1)
    assert moved(value, None) is value and moved(value, a.device) is value


def test_entries_that_are_attributes_too() -> None:
    changed = mapped(lambda t: t + 1, Named(u=a))
    assert changed.u is changed["u"]


@pytest.mark.parametrize("kind", STRUCTURES)
def test_renewed(kind: str) -> None:
    value = STRUCTURES[kind][0]
    anew = renewed([value])
    assert type(anew[0]) is type(value) and [id(t) for t in tensors(anew)] == [id(t) for t in tensors(value)]
    changeable = {"tuple", "namedtuple", "dict", "OrderedDict", "UserDict", "named entries"}
    assert (anew[0] is value) == (kind not in changeable)


def test_packed_sequences_keep_their_steps() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    changed = mapped(lambda t: t.to("meta"), packed)
    assert isinstance(changed, PackedSequence) and changed.data.is_meta and not changed.batch_sizes.is_meta


def test_named() -> None:
    found = dict(named("X", {"u": (a, [b])}))
    assert {name: eval(name, {"X": {"u": (a, [b])}}) is t for name, t in found.items()} == {
        "X['u'][0]": True,
        "X['u'][1][0]": True,
    }


def test_what_holds_itself() -> None:
    value: list[Any] = [a]
    value.append(value)
    assert all(t is a for t in tensors(value)) and mapped(lambda t: t, value) is value


def test_held() -> None:
    """Also in objects, sets and other sequences; an object within itself is looked at once."""
    ring = Holder(UserList([a]), {b})
    ring.self = ring  # type: ignore[attr-defined]
    found: list[Tensor] = list(held({"r": ring, "s": "text"}))
    assert [id(t) for t in found] == [id(a), id(b)]
