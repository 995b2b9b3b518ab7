"""What a file of weights is, decided by its first bytes: never by its name, never by trying to read it."""

import struct
from pathlib import Path

from utils.errors import UserError
from utils.files import read_bytes

DARKNET, CHECKPOINT, TORCH = "Darknet weights", "safetensors", "PyTorch archive"
MAX_VERSION = 10_000  # of major, minor and revision; real files say 0..2, above 1000 the connected matrices are turned

_OTHERS = (  # first bytes -> what the file is instead
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
    (b"\x1f\x8b", "gzip archive"),
    (b"\xfd7zXZ", "xz archive"),
    (b"7z\xbc\xaf", "7-zip archive"),
    (b"Rar!", "RAR archive"),
    (b"\xff\xd8\xff", "JPEG picture"),
    (b"\x89PNG", "PNG picture"),
    (b"%PDF", "PDF document"),
    (b"version https://git-lfs", "Git LFS pointer"),
    (b"<", "web page (HTML)"),
    (b"[net", "Darknet cfg"),
    (b"\x89HDF", "HDF5 file"),
)
_CURES = {
    "pickle": "a pickle can run code when it is read; convert it in an isolated environment: torch.save(state_dict)",
    "gzip archive": "unpack it first",
    "xz archive": "unpack it first",
    "7-zip archive": "unpack it first",
    "RAR archive": "unpack it first",
    "Git LFS pointer": "fetch the file itself with git lfs pull",
    "web page (HTML)": "the download failed; fetch the file again",
    "Darknet cfg": "a cfg belongs to --cfg",
}


def file_kind(path: str | Path) -> str:
    """`DARKNET`, `CHECKPOINT` (safetensors) or `TORCH` (the zip archive of ``torch.save``).

    Raises:
        UserError: missing, unreadable, empty, or anything else; says what it looks like and what to do.
    """
    start = read_bytes(path, "a weights file", 64)
    if start[:4] == b"PK\x03\x04":
        return TORCH
    if start[8:9] == b"{":
        return CHECKPOINT
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, name in _OTHERS:
        if start.startswith(magic) or text.startswith(magic):
            raise UserError(path, f"a {name}, expected weights", _CURES.get(name, ""))
    if len(start) < 16:
        raise UserError(path, f"{len(start)} bytes, too short for the header of Darknet weights (16 or 20 bytes)")
    version = struct.unpack("<3i", start[:12])
    if any(not 0 <= number <= MAX_VERSION for number in version):
        raise UserError(path, f"not Darknet weights: its version reads {'.'.join(map(str, version))}", "fetch it again")
    return DARKNET
