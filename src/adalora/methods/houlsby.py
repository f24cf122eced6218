"""Houlsby adapters: two in each layer, behind attention and behind the feed-forward part (arXiv 1902.00751)."""

from __future__ import annotations

from torch import nn

from .bottleneck import BottleneckMethod


class Houlsby(BottleneckMethod):
    """Options: see BottleneckMethod. The nonlinearity is swish, as in the runs of arXiv 2303.10512.

    The norms of the base model stay frozen, as there.
    """

    name = "houlsby"
    in_attention = True
    activation = nn.SiLU
