"""What a ref was resolved to: which installed model answers it, so that no source is asked again.

One small file per ref, ``.refs/<name>.json`` on the volume. A branch that moves on at its source stays
where it was until somebody pulls it: the same request means the same weights from one day to the next.
"""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import msgspec

from api.models.refs import SourceRef


class Record(msgspec.Struct, frozen=True):
    """One answer.

    Attributes:
        key: the installed model.
        model_id: as it was asked for.
        revision: as it was asked for.
        precision: as it was asked for.
        source: where it was found, without credentials.
    """

    key: str
    model_id: str
    revision: str
    precision: str
    source: str


class Records:
    """The records of one volume.

    Args:
        root: the volume's folder.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / ".refs"

    def find(self, ref: SourceRef) -> str | None:
        """The key of the model that answered the ref, installed or not."""
        try:
            return msgspec.json.decode(self._path(ref).read_bytes(), type=Record).key
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def write(self, ref: SourceRef, key: str, source: str) -> None:
        """Remember the answer. A volume that cannot be written is asked again next time; that is no fault."""
        record = Record(key, ref.model_id, ref.revision, ref.precision, source)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh = self._folder / f".{uuid.uuid4().hex}"
            fresh.write_bytes(msgspec.json.encode(record))
            fresh.replace(self._path(ref))

    def list(self) -> list[Record]:
        """Every record that can be read."""
        found = []
        with contextlib.suppress(OSError):
            for path in sorted(self._folder.glob("*.json")):
                with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
                    found.append(msgspec.json.decode(path.read_bytes(), type=Record))
        return found

    def forget(self, key: str) -> None:
        """Drop every record that leads to a key."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob("*.json"):
                with contextlib.suppress(OSError, msgspec.DecodeError):
                    if msgspec.json.decode(path.read_bytes(), type=Record).key == key:
                        path.unlink()

    def _path(self, ref: SourceRef) -> Path:
        return self._folder / f"{ref.name}.json"
