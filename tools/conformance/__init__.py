"""Recorded cases and how our stages, or a real image, answer them: what ``unaccepted conform`` runs.

A module named as a family (``v9``, ``e820``, ``mainline``, ``memblock``, ``stub``, ``decompressor``, ``boot``) has
``run_case(case)``; ``record_FAMILY`` has ``record(case, image)``, which writes such a case.
"""
