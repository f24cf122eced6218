"""Pfeiffer adapters: one in each layer, behind the feed-forward part (arXiv 2005.00247)."""

from __future__ import annotations

from torch import nn

from .bottleneck import BottleneckMethod


class Pfeiffer(BottleneckMethod):
    """Options: see BottleneckMethod. The nonlinearity is ReLU.

    The original also passes the adapter's input through the layer's norm; here it stands where Houlsby's second one
    does, which every architecture has.
    """

    name = "pfeiffer"
    in_attention = False
    activation = nn.ReLU
