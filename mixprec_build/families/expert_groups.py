"""Groups the experts of one layer by format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["GroupMembers", "expert_groups"]


class GroupMembers(NamedTuple):
    """Experts of one layer on one rank whose gate and up (``ups``), and whose down (``downs``), are in one format."""

    ups: list[int]
    downs: list[int]


def expert_groups(formats: Mapping[int, tuple[object, object]], here: Iterable[int]) -> list[GroupMembers]:
    """Groups the experts ``here``, those of one layer on one rank, by format, in the order of first use.

    ``formats``: expert -> the format of gate and up, and that of down. Where different experts have a format in gate
    and up than in down, these are two groups, since SGLang's layers have as many of the one as of the other.
    """
    ups: dict[object, list[int]] = {}
    downs: dict[object, list[int]] = {}
    for expert in here:
        for kind, of_kind, others in zip(formats[expert], (ups, downs), (downs, ups), strict=True):
            of_kind.setdefault(kind, []).append(expert)
            others.setdefault(kind, [])
    groups = []
    for kind, members in ups.items():
        if members == downs[kind]:
            groups.append(GroupMembers(members, members))
        else:
            groups += [group for group in (GroupMembers(members, []), GroupMembers([], downs[kind])) if any(group)]
    return groups
