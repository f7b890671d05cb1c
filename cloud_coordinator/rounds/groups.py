"""Which devices are summed together: drawn once for a run, and fixed. Pure.

Groups that were drawn anew in each round would overlap, and whoever knows enough overlapping sums
can solve for each device. Fixed groups give as many independent sums as there are groups, however
many rounds there are. Devices that come later wait until there are enough of them for a new group.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from shared.privacy_plan import Layout

Groups = tuple[tuple[str, ...], ...]  # device ids of each group, sorted; the index is its number


def draw_groups(
    devices: Collection[str], layout: Layout, *, rng: np.random.Generator, drawn: Groups = ()
) -> Groups:
    """Part devices into groups at random; those that are drawn already stay as they are.

    Args:
        devices: ids of all that joined so far; their order does not matter.
        layout: how large a group may be, and how many a round wants.
        rng: decides who is with whom.
        drawn: groups of this run so far.

    Returns:
        ``drawn``, and new groups of at most ``layout.max_roster`` devices. Whoever is left over,
        too few for one more group, is in none.
    """
    taken = {device for group in drawn for device in group}
    order = [str(device) for device in rng.permutation(sorted(set(devices) - taken))]
    count = len(order) // layout.max_roster
    if len(drawn) + count < layout.groups:  # smaller ones, so that a round has all it wants
        count = min(layout.groups - len(drawn), len(order) // layout.wanted)
    new = (tuple(sorted(order[i : count * layout.max_roster : count])) for i in range(count))
    return drawn + tuple(new)


def present_groups(
    groups: Groups, present: Collection[str], layout: Layout
) -> Mapping[int, tuple[str, ...]]:
    """Return the groups that can take part now, by number, with those of their devices here."""
    here = frozenset(present)
    members = {
        number: tuple(device for device in group if device in here)
        for number, group in enumerate(groups)
    }
    return {number: ids for number, ids in members.items() if len(ids) >= layout.min_survivors}


def select_groups(
    groups: Mapping[int, tuple[str, ...]],
    layout: Layout,
    *,
    rng: np.random.Generator,
    times_selected: Mapping[int, int],
) -> Mapping[int, tuple[str, ...]]:
    """Choose the groups of one round: at random, first among those that were asked least.

    Args:
        groups: those that can take part, by number.
        layout: how many a round wants.
        rng: the round's own.
        times_selected: how often each was asked so far in this run; absent means never.
    """
    drawn: Sequence[int] = [int(number) for number in rng.permutation(sorted(groups))]
    by_turn = sorted(drawn, key=lambda number: times_selected.get(number, 0))
    return {number: groups[number] for number in sorted(by_turn[: layout.groups])}
