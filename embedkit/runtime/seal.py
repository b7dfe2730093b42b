"""A checksum at the end of a model file, so that no damaged weight can give a wrong vector quietly.

The last bytes of a sealed ONNX file are one more entry of its metadata, ``embedkit.seal``, with the
CRC-32 of all that stands before. Appending a field to a protobuf message is adding it, so any
program reads the file as before. It meets damage, not malice: who forges a file can seal it.
"""

from __future__ import annotations

import zlib

from embedkit.errors import MismatchError

__all__ = ["SEAL_KEY", "check_seal", "sealed"]

SEAL_KEY = "embedkit.seal"

_KEY = SEAL_KEY.encode()
# metadata_props is field 14 of a model; of an entry, field 1 is the key and field 2 the value.
_ENTRY = b"\x0a" + bytes([len(_KEY)]) + _KEY + b"\x12\x08"
_START = b"\x72" + bytes([len(_ENTRY) + 8]) + _ENTRY


def sealed(model: bytes) -> bytes:
    """A serialized ONNX model without a seal, and its seal."""
    return model + _START + _crc(model)


def check_seal(name: str, data: bytes) -> None:
    """Compare a file's bytes with its seal; a file that has none passes.

    Raises:
        MismatchError: They differ, or the seal is not where it was put: the file was damaged, or
            written again by another program.

    Cost: about 0.7 ms a megabyte.
    """
    at = len(data) - len(_START) - 8
    if data.startswith(_START, max(at, 0)):
        if _crc(memoryview(data)[:at]) == data[-8:]:
            return
        facts = "its bytes do not give the checksum it was written with"
    elif _KEY in data:
        facts = "it was written again by another program since it was exported"
    else:
        return
    raise MismatchError(
        f"the model {name!r} is damaged or was changed",
        facts=facts,
        hint="copy it again, or export it again with: embedkit export",
    )


def _crc(data: bytes | memoryview) -> bytes:
    return b"%08x" % zlib.crc32(data)
