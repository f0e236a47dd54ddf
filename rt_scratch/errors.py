"""Errors that the user can fix."""

GPU_PACKAGES = "pip install -e '.[cuda13]', for drivers before 580 '.[cuda12]'"


class UserError(Exception):
    """A mistake that the user can fix: scripts print its one line and exit with code 2."""
