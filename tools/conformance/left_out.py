"""A recorded case that says nothing about us."""

from __future__ import annotations


class LeftOut(Exception):
    """The case's set-up is not reproduced here; the text says why. Such a case neither agrees nor differs."""
