"""Averaging policies of the loss: the weight of each supervised token, from their number in the sample.

The trainer divides the weighted sum by the global sum of weights, so only ratios matter.
"""


def per_token(num_targets: int) -> float:
    """Returns 1: every supervised token counts the same (LLaVA, Eagle 1)."""
    del num_targets
    return 1.0


def per_sample(num_targets: int) -> float:
    """Returns 1 / n: every sample counts the same."""
    return 1.0 / num_targets


def square_root(num_targets: int) -> float:
    """Returns n^-1/2, between the two (Eagle 2, arXiv 2501.14818; InternVL 2.5)."""
    return num_targets**-0.5
