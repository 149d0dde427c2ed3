"""Recompute every checksum of a shard."""

from pathlib import Path

from universality.activations.format import Manifest, check_block, map_values, read_manifest
from universality.errors import StudyError
from universality.storage import sha256


def verify_shard(shard: Path) -> Manifest:
    """Read all of a shard. Raises StudyError naming the first file, and the rows, that are not what was written."""
    manifest = read_manifest(shard)
    values = map_values(shard, manifest)
    for block in range(len(manifest.block_crc32)):
        check_block(shard, manifest, values, block)
    for name, expected in sorted(manifest.sha256.items()):
        path = shard / name
        try:
            found = sha256(path)
        except OSError as error:
            raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
        if found != expected:
            raise StudyError(f"{path}: is not the file that its manifest describes; remake the shard")
    return manifest
