"""The one base class of every fault that is the user's to mend: its message is one line that says how."""


class FastresError(ValueError):
    """Bad input: an option, a folder, data or a checkpoint. The command line prints the message and exits with 2."""
