"""The digest tree over stored bytes: blocks, pieces, files, states.

- block = 4 MiB of a piece's bytes in C order, the last one shorter: `xxh3_128`
- piece (or whole tensor) = its only block's digest, else `xxh3_128` over its block digests in order
- file = `xxh3_128` over the header's digest and the piece digests in file order
- state (an entry, or one rank's copy of it) = `xxh3_128` over one record an item, in the order of their names

So every byte is hashed once, by any thread and in any order, any range can be verified by itself, and equal
content in another memory layout has an equal digest. `xxh3_128` (https://xxhash.com) finds damage: two different
inputs collide with probability 2^-128; it does not resist an adversary.
"""

from collections.abc import Iterable, Sequence

from xxhash import xxh3_128, xxh3_128_digest

ALGORITHM = "xxh3_128"
BLOCK_BYTES = 4 << 20
DIGEST_BYTES = 16

Buffer = bytes | bytearray | memoryview


def digest(data: Buffer) -> bytes:
    """The digest of one block, of a header, or of a small file: 16 bytes, big-endian as printed."""
    return xxh3_128_digest(data)


def digest_of_parts(parts: Iterable[Buffer]) -> bytes:
    """`digest` of the parts put together, for what is too large to be held at once."""
    hasher = xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def join(digests: Sequence[bytes]) -> bytes:
    """The digest of a piece from its blocks' digests (at least one: an empty piece has one empty block)."""
    return digests[0] if len(digests) == 1 else digest(b"".join(digests))


def file_digest(header: bytes, pieces: Iterable[bytes]) -> bytes:
    """The digest of a safetensors file from its header's digest and its pieces' digests in file order."""
    return digest(header + b"".join(pieces))


def num_blocks(num_bytes: int) -> int:
    return max(1, -(-num_bytes // BLOCK_BYTES))


def block_bounds(num_bytes: int) -> Iterable[tuple[int, int]]:
    """The start and stop of each block of a piece of `num_bytes`."""
    return ((i * BLOCK_BYTES, min(num_bytes, (i + 1) * BLOCK_BYTES)) for i in range(num_blocks(num_bytes)))


def buffer_digest(data: Buffer) -> bytes:
    """The piece digest of bytes in memory."""
    view = memoryview(data)
    return join([digest(view[start:stop]) for start, stop in block_bounds(len(view))])


def tensor_structure(dtype: str, shape: Sequence[int], box: Sequence[tuple[int, int]] | None = None) -> bytes:
    """What the record of a tensor, or of a box of one, in its state's digest says besides its bytes."""
    where = "" if box is None else f" {[list(bounds) for bounds in box]}"
    return f"tensor {dtype} {list(shape)}{where}".encode()


def state_digest(records: Iterable[tuple[str, bytes, bytes]]) -> bytes:
    """The digest of a state from `(name, structure, digest)` of its items.

    `structure` is whatever must be equal besides the bytes (kind, dtype, shape, box). Records are taken in the
    order of their names' UTF-8, so that the order in which a dict was filled does not matter here; lengths are
    hashed with the strings, so that no two lists of records look alike.
    """
    parts = []
    for text, structure, item in sorted(records):  # UTF-8 sorts as its text does
        name = text.encode("utf-8")
        parts.append(b"%d:%d:%b%b%b" % (len(name), len(structure), name, structure, item))
    return digest(b"".join(parts))
