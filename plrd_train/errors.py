"""The one exception that means "you can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a key, a value.

    Its message is one line that names the file or key and says how to mend it. The entry points print that line,
    without a traceback, and exit with status 2; anything else that is raised is a defect of this project and keeps its
    traceback.
    """
