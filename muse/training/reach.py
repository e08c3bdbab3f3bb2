"""Which tensors a loss reaches, read off its graph before the run begins."""

from collections.abc import Iterable

from torch import Tensor, nn


def reached(loss: Tensor) -> set[int]:
    """The ids of the leaf tensors that get a gradient from `loss`."""
    found, seen, open_nodes = set(), set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a leaf's gradient is accumulated
            found.add(id(node.variable))
        open_nodes += [following for following, _ in node.next_functions]
    return found


def unreached(loss: Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters that learn and get no gradient from `loss`."""
    ids = reached(loss)
    return [name for name, p in named if p.requires_grad and id(p) not in ids]
