"""unpack_vmlinuz.py VMLINUZ VMLINUX: the ELF kernel inside an x86 bzImage (xz or gzip payload)."""

import lzma
import struct
import sys
import zlib
from pathlib import Path

image = Path(sys.argv[1]).read_bytes()
setup_sectors = image[0x1F1] or 4
offset, size = struct.unpack_from("<II", image, 0x248)
payload = image[(setup_sectors + 1) * 512 + offset :][:size]
if payload[:6] == b"\xfd7zXZ\0":
    kernel = lzma.LZMADecompressor().decompress(payload)
elif payload[:2] == b"\x1f\x8b":
    kernel = zlib.decompressobj(31).decompress(payload)
else:
    sys.exit("payload is neither xz nor gzip")
if kernel[:4] != b"\x7fELF":
    sys.exit("payload is no ELF file")
Path(sys.argv[2]).write_bytes(kernel)
