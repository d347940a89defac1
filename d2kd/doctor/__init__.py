"""A look at a run before the days are spent on it: what is right, what is odd, what is wrong, and what to do.

``d2kd doctor`` builds everything and looks at all of it; ``d2kd train`` looks at what costs nothing.
"""

from .examination import diagnose
from .findings import Finding, exit_code, table
from .first_look import FirstLook, first_look

__all__ = ["Finding", "FirstLook", "diagnose", "exit_code", "first_look", "table"]
