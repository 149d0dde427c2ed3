"""Settings of the report stage."""

from universality.settings import Positive, Settings


class ReportSettings(Settings):
    threads: Positive
    title: str
