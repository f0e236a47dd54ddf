"""What goes wrong in a way the user can put right."""


class UserError(Exception):
    """A mistake that the user can fix: scripts print its one line and exit with code 2."""
