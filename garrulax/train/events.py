"""Metrics as TensorBoard events: a copy of metrics.jsonl, which is written anew when a run is resumed."""

import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Events:
    """Writes events into a folder. Every record is in the file when `write` returns.

    The file begins with all earlier records, and older files are deleted: so the events are complete after a kill, and
    in order when the clock was set back. Records that the older files have keep their times.

    Args:
        folder: For the file.
        records: From metrics.jsonl, in order.

    Raises:
        ImportError: If tensorboardX is not installed.
        OSError: If the file cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, records: Iterable[Mapping[str, Any]]):
        import tensorboardX  # noqa: F401  the error names it
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        Path(folder).mkdir(parents=True, exist_ok=True)
        old = [path for path in Path(folder).glob("*tfevents*") if path.is_file()]
        times = {step: wall for path in old for step, wall in _times(path)}
        start = int(time.time())
        while (path := Path(folder, f"events.out.tfevents.{start}.{socket.gethostname()}")).exists():
            start += 1
        self._writer = RecordWriter(str(path))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for record in records:
            self._add(record["step"], record, times.get(record["step"], time.time()))
        self._writer.flush()
        for path in old:
            path.unlink()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values of a step, numbers or texts, by name. Raises OSError if the file cannot be written."""
        self._add(step, values, time.time())
        self._writer.flush()

    def close(self) -> None:
        """Closes the file. Raises OSError if the file cannot be written."""
        self._writer.close()

    def _add(self, step: int, values: Mapping[str, Any], wall: float) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        numbers = {k: v for k, v in values.items() if k != "step" and isinstance(v, int | float)}
        texts = [text(k, v).value[0] for k, v in values.items() if isinstance(v, str)]
        summary = Summary(value=[*(Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()), *texts])
        self._writer.write(Event(step=step, wall_time=wall, summary=summary).SerializeToString())


def _times(path: Path) -> Iterator[tuple[int, float]]:
    """Step and time of every event of a file, up to the first that is damaged."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content, at = path.read_bytes(), 0
    while at + 12 <= len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        try:
            event = Event.FromString(content[at + 12 : at + 12 + size])
        except (DecodeError, OverflowError):
            return
        yield event.step, event.wall_time
        at += size + 16
