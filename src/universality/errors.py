"""The one exception that users see as a single line."""


class StudyError(Exception):
    """Bad input or an unusable environment. The message names the file or key, the value and what is allowed."""
