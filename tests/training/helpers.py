"""What tests of training share."""

import torch


def same_tree(left, right) -> bool:
    """Whether nested dicts and lists are equal in order, types and tensors, bit for bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and torch.equal(left, right)
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same_tree(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same_tree, left, right))
    return type(left) is type(right) and left == right
