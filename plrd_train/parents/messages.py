"""Other libraries' exceptions as one line for the user."""


def first_line(error: Exception) -> str:
    """The first line of the error's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
