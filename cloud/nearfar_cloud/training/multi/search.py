"""Which matrix gets which width: single swaps, greedy by loss per byte, local exchanges.  No training; pure functions.

    8888 --swap each matrix to each width, measure-->  sensitivities
    8888 -> 88t8 -> 38t8 -> ... -> tttt                the chain: always the step that adds least loss per byte saved
    points of the chain, evenly spread over the bytes, each improved by exchanges that are measured and kept if better

`loss(assignment)` is a measurement on held-out rows, dear and repeatable; everything else is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from nearfar.master import Matrix, Point, bits

Loss = Callable[[str], float]
Sensitivities = Mapping[tuple[int, str], float]  # (matrix, width) -> loss above that of the widest assignment


def widest(of: Sequence[Matrix]) -> str:
    return "".join(max(m.widths, key=bits) for m in of)


def narrowest(of: Sequence[Matrix]) -> str:
    return "".join(min(m.widths, key=bits) for m in of)


def n_bytes(assignment: str, of: Sequence[Matrix]) -> int:
    """Bytes of the matrices."""
    return sum(m.n_bytes(width) for m, width in zip(of, assignment, strict=True))


def swapped(assignment: str, *changes: tuple[int, str]) -> str:
    """With matrix i at another width, for each (i, width)."""
    letters = list(assignment)
    for i, width in changes:
        letters[i] = width
    return "".join(letters)


def sensitivities(loss: Loss, of: Sequence[Matrix]) -> Sensitivities:
    """What each matrix alone at each width adds to the loss of the widest assignment."""
    top = widest(of)
    base = loss(top)
    return {
        (i, width): 0.0 if top[i] == width else loss(swapped(top, (i, width))) - base
        for i, m in enumerate(of)
        for width in m.widths
    }


def chain(added: Sensitivities, of: Sequence[Matrix]) -> list[str]:
    """From the widest assignment to the narrowest, one matrix a step: the least loss per byte saved comes first."""
    now = widest(of)
    steps = [now]
    while now != narrowest(of):
        moves = [(i, w) for i, m in enumerate(of) for w in m.widths if bits(w) < bits(now[i])]

        def price(move: tuple[int, str], now: str = now) -> float:
            i, width = move
            return (added[move] - added[i, now[i]]) / (of[i].n_bytes(now[i]) - of[i].n_bytes(width))

        now = swapped(now, min(moves, key=price))
        steps.append(now)
    return steps


def spread(steps: Sequence[str], of: Sequence[Matrix], n: int) -> list[str]:
    """About `n` of the steps, both ends among them, evenly over the bytes."""
    sizes = [n_bytes(s, of) for s in steps]
    low, high = min(sizes), max(sizes)
    wanted = [low + (high - low) * i / max(n - 1, 1) for i in range(n)]
    chosen = {min(range(len(steps)), key=lambda k: (abs(sizes[k] - w), k)) for w in wanted}
    return [steps[k] for k in sorted(chosen | {0, len(steps) - 1})]


def exchanges(assignment: str, added: Sensitivities, of: Sequence[Matrix]) -> Iterator[str]:
    """Assignments of no more bytes, two matrices changed: one wider, one narrower; the most promising first."""
    room = n_bytes(assignment, of)
    found = []
    for i, m in enumerate(of):
        for up in m.widths:
            for j, other in enumerate(of):
                for down in other.widths:
                    if i == j or bits(up) <= bits(assignment[i]) or bits(down) >= bits(assignment[j]):
                        continue
                    new = swapped(assignment, (i, up), (j, down))
                    if n_bytes(new, of) <= room:
                        gain = added[i, up] - added[i, assignment[i]] + added[j, down] - added[j, assignment[j]]
                        found.append((gain, new))
    yield from (new for _, new in sorted(found))


def improved(start: Point, loss: Loss, added: Sensitivities, of: Sequence[Matrix], tries: int) -> Point:
    """`start` after up to `tries` measured exchanges; never worse, never larger."""
    best, seen = start, {start.assignment}
    while tries > 0:
        for new in exchanges(best.assignment, added, of):
            if new not in seen:
                break
        else:
            return best
        seen.add(new)
        tries -= 1
        if (found := loss(new)) < best.loss:
            best = Point(new, found)
    return best


def search(loss: Loss, of: Sequence[Matrix], *, points: int = 24, tries: int = 6) -> list[Point]:
    """The frontier, small to large: no point is both smaller and better than another.

    The smallest and the widest assignment are always among those that were looked at.
    """
    added = sensitivities(loss, of)
    found = [improved(Point(a, loss(a)), loss, added, of, tries) for a in spread(chain(added, of), of, points)]
    return pareto(found, of)


def pareto(points: Sequence[Point], of: Sequence[Matrix]) -> list[Point]:
    """Without those that another beats in bytes and loss; small to large."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: (n_bytes(p.assignment, of), p.loss)):
        if not kept or p.loss < kept[-1].loss:
            kept.append(p)
    return kept
