"""The one exception of this package for mistakes a user can mend."""


class UserError(Exception):
    """One line: the rule, the offending value, what to do. The command line prints it and exits with code 2."""
