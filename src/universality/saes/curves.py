"""What is known of a training as it goes: kept as columns, shown in a line, sent to TensorBoard."""

from pathlib import Path

from universality.errors import StudyError


class Curves:
    """Columns of equal length, a row a point."""

    def __init__(self, columns: dict[str, list] | None = None):
        self.columns: dict[str, list] = columns or {}

    def add(self, **point: float) -> None:
        for name, value in point.items():
            self.columns.setdefault(name, []).append(value)

    def last(self) -> str:
        """The last point in a few words; nothing before the first."""
        if not self.columns:
            return ""
        last = {name: values[-1] for name, values in self.columns.items()}
        return "loss {loss:.3g}, L0 {L0:.1f}, explained {explained_variance:.3f}, dead {dead:.3f}".format(**last)


class TensorBoard:
    """Event files below `folder`, one run a name; does nothing without a folder."""

    def __init__(self, folder: Path | None, names: list[str]):
        self._writers = []
        self._sent = [0] * len(names)
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise StudyError(
                "--tensorboard: needs the package tensorboard; pip install 'universality[tensorboard]'"
            ) from None
        self._writers = [SummaryWriter(str(folder / name)) for name in names]

    def add(self, curves: list[Curves]) -> None:
        """Send what was added to the curves since the last time."""
        for number, writer in enumerate(self._writers):
            columns = curves[number].columns
            steps = columns.get("step", [])
            for row in range(self._sent[number], len(steps)):
                for name in columns.keys() - {"step"}:
                    writer.add_scalar(name, columns[name][row], steps[row])
            self._sent[number] = len(steps)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
