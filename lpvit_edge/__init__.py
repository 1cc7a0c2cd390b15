"""Measure an edge device, prune a Vision Transformer for it, build an engine and prove the gain.

Importing this package costs nothing: it loads neither numpy nor any vendor library.
"""

from lpvit_edge.errors import LpvitEdgeError

__all__ = ["LpvitEdgeError"]
__version__ = "0.1.0"
