"""The memory hierarchy and the resources that work on it, and which device each of them belongs to.

A **tier** is a level of the hierarchy, and a kind of lane is what a lane does: a policy speaks of these. A **site** is
a tier of one device, a **lane** a resource of one device: plans and schedules speak of these. The first accelerator,
and the host it hangs on, are device 0 and need no mention: ``Lane.GPU``, ``Site.GPU``, ``str(lane) == "gpu"``; those of
another one are ``Lane(LaneKind.GPU, 1)`` and ``gpu:1``.
"""

from __future__ import annotations

from enum import StrEnum
from functools import total_ordering
from typing import Any, ClassVar, Generic, NoReturn, Self, TypeVar

from flexgen_bench.core.errors import UserError


class Tier(StrEnum):
    """A level of the memory hierarchy, fastest first."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


class LaneKind(StrEnum):
    """What a lane does."""

    DISK_READ = "disk_read"  # disk -> cpu
    DISK_WRITE = "disk_write"  # cpu -> disk
    H2D = "h2d"  # cpu -> gpu: all but weights
    H2D_WEIGHTS = "h2d_weights"  # cpu -> gpu: weights, over the link of h2d
    D2H = "d2h"  # gpu -> cpu
    GPU = "gpu"
    CPU = "cpu"
    NET_OUT = "net_out"  # this rank -> another one
    NET_IN = "net_in"  # another rank -> this one: hidden states
    NET_TOKENS = "net_tokens"  # another rank -> this one: tokens, over the link of net_in


# The kinds of lanes that move bytes, and between which tiers: a link is a directed pair of tiers.
LINKS: dict[LaneKind, tuple[Tier, Tier]] = {
    LaneKind.DISK_READ: (Tier.DISK, Tier.CPU),
    LaneKind.DISK_WRITE: (Tier.CPU, Tier.DISK),
    LaneKind.H2D: (Tier.CPU, Tier.GPU),
    LaneKind.H2D_WEIGHTS: (Tier.CPU, Tier.GPU),
    LaneKind.D2H: (Tier.GPU, Tier.CPU),
}
# Lanes between ranks: from and to the memory of another host, or of another process of this one.
NETWORK = (LaneKind.NET_OUT, LaneKind.NET_IN, LaneKind.NET_TOKENS)
# Lanes that work on a link that is named after another one.
_SHARES = {LaneKind.H2D_WEIGHTS: LaneKind.H2D, LaneKind.NET_TOKENS: LaneKind.NET_IN}
# What bandwidths are stated for: one kind of lane of each link.
PHYSICAL_LINKS = tuple(kind for kind in LINKS if kind not in _SHARES)
# What they may be stated for beside that: only ranks have a network.
STATED_LINKS = (*PHYSICAL_LINKS, LaneKind.NET_OUT, LaneKind.NET_IN)
_OF_ACCELERATOR = (LaneKind.GPU, *(kind for kind, ends in LINKS.items() if Tier.GPU in ends))

Kind = TypeVar("Kind", bound=StrEnum)


@total_ordering
class OfDevice(Generic[Kind]):
    """A kind of thing, of one device. Ordered by device, then as the kinds are listed.

    There is one object of each value, made once. So equal ones are identical, and looking one up costs what it costs
    for any object: hundreds of thousands of steps are, by their lane, several times each.
    """

    __slots__ = ("_place", "device", "kind", "name")
    kind: Kind
    device: int
    name: str
    _place: tuple[int, int]
    _kinds: ClassVar[type[StrEnum]]
    _made: ClassVar[dict[tuple[str, int], Any]]

    def __new__(cls, kind: Kind, device: int = 0) -> Self:
        made: Self | None = cls._made.get((kind, device))
        if made is None:
            if device < 0:
                raise ValueError(f"device = {device}: must be 0 or more")
            made = super().__new__(cls)
            made._fill(cls._kinds(kind), device)
            made = cls._made.setdefault((kind, device), made)  # another thread may have been faster
        return made

    @classmethod
    def parse(cls, text: str) -> Self:
        """What ``str`` made a text of. UserError for any other text."""
        name, colon, number = text.partition(":")
        written = not colon or (number.isdecimal() and number == str(int(number)) != "0")
        if name not in list(cls._kinds) or not written:
            kinds = ", ".join(cls._kinds)
            raise UserError(
                cls.__name__.lower(), text, f"one of {kinds}; of device 1, 2, ... with :1, :2, ... after it"
            )
        return cls(cls._kinds(name), int(number or 0))  # type: ignore[arg-type]

    def _fill(self, kind: Any, device: int) -> None:
        name = str(kind) if device == 0 else f"{kind}:{device}"
        self._set(kind=kind, device=device, name=name, _place=(device, list(self._kinds).index(kind)))

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} does not change")

    def __lt__(self, other: Self) -> bool:
        return self._place < other._place

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.device)  # copies, and what another process sends, are the same object


class Lane(OfDevice[LaneKind]):
    """A resource that does one thing at a time, in order.

    is_link: it moves bytes; computes: it runs a unit's steps. of_accelerator: it is the accelerator's own, not its
    host's. link: the lane after which the link that it works on is named, itself unless two share it (of a lane that
    computes, itself).
    """

    __slots__ = ("computes", "is_link", "link", "of_accelerator")
    computes: bool
    of_accelerator: bool
    is_link: bool
    link: Lane
    _kinds = LaneKind
    _made: ClassVar[dict[tuple[str, int], Any]] = {}

    DISK_READ: ClassVar[Lane]
    DISK_WRITE: ClassVar[Lane]
    H2D: ClassVar[Lane]
    H2D_WEIGHTS: ClassVar[Lane]
    D2H: ClassVar[Lane]
    GPU: ClassVar[Lane]
    CPU: ClassVar[Lane]

    def _fill(self, kind: Any, device: int) -> None:
        super()._fill(kind, device)
        shared = _SHARES.get(kind)
        link = self if shared is None else Lane(shared, device)
        is_link = kind in LINKS or kind in NETWORK
        self._set(is_link=is_link, computes=not is_link, of_accelerator=kind in _OF_ACCELERATOR, link=link)

    @property
    def ends(self) -> tuple[Tier, ...]:
        """The tiers that a link moves bytes from and to; none of a lane that computes."""
        return LINKS.get(self.kind, ())


class Site(OfDevice[Tier]):
    """A tier of one device: a memory, the lane that computes on what lies in it, and the lanes that serve it.

    host: the host's memory. lane: what computes here; cpu, disk_read, disk_write: of the host; h2d, h2d_weights, d2h:
    an accelerator's links; lanes: all of these; net_out, net_in, net_tokens: between this rank and others. The
    accelerators of a machine share its host, which is device 0; another host has sites and lanes of its own number.
    """

    __slots__ = (
        "cpu",
        "d2h",
        "disk_read",
        "disk_write",
        "h2d",
        "h2d_weights",
        "host",
        "is_accelerator",
        "lane",
        "lanes",
        "net_in",
        "net_out",
        "net_tokens",
        "tier",
    )
    tier: Tier
    is_accelerator: bool
    host: Site
    lane: Lane
    cpu: Lane
    disk_read: Lane
    disk_write: Lane
    h2d: Lane
    h2d_weights: Lane
    d2h: Lane
    net_out: Lane
    net_in: Lane
    net_tokens: Lane
    lanes: tuple[Lane, ...]
    _kinds = Tier
    _made: ClassVar[dict[tuple[str, int], Any]] = {}

    GPU: ClassVar[Site]
    CPU: ClassVar[Site]
    DISK: ClassVar[Site]

    def _fill(self, kind: Any, device: int) -> None:
        super()._fill(kind, device)
        is_accelerator = kind is Tier.GPU
        number = 0 if is_accelerator else device
        host = self if kind is Tier.CPU else Site(Tier.CPU, number)
        lanes = {
            one: Lane(one, device if one in _OF_ACCELERATOR else number)
            for one in LaneKind
            if is_accelerator or one not in _OF_ACCELERATOR
        }
        lane = lanes[LaneKind.GPU if is_accelerator else LaneKind.CPU]
        own = tuple(one for name, one in lanes.items() if name not in NETWORK)
        self._set(tier=kind, is_accelerator=is_accelerator, host=host, lane=lane, lanes=own)
        self._set(**{one: each for one, each in lanes.items() if one is not LaneKind.GPU})


for _kind in LaneKind:
    setattr(Lane, _kind.name, Lane(_kind))
for _tier in Tier:
    setattr(Site, _tier.name, Site(_tier))
