"""Files of every dtype read to the bit, and damaged ones are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backends.checkpoint.safetensors_file import SafetensorsFile
from backends.errors import BackendMisconfigured

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_those_that_were_saved(tmp_path, dtype):
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"first": numbers, "second": numbers[0].clone()}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert sorted(file.names()) == ["first", "second"]
    np.testing.assert_array_equal(file.tensor("first"), numbers.float().numpy())
    np.testing.assert_array_equal(file.tensor("second"), numbers[0].float().numpy())
    assert file.raw("second").tobytes() == numbers[0].view(torch.uint8).numpy().tobytes()
    file.close()


def packed(header: bytes, tail: bytes = bytes(16)) -> bytes:
    return len(header).to_bytes(8, "little") + header + tail


def described(**changes) -> bytes:
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return packed(json.dumps({"t": tensor}).encode())


DAMAGED = [
    (b"", "no header"),
    (b"1234567", "no header"),
    (b"\xff" * 8, "inside its header"),
    (packed(b"{}", b"")[:-1], "inside its header"),
    (packed(b"{"), "damaged"),
    (packed(b"\xff\xfe"), "damaged"),
    (packed(b"[]"), "damaged"),
    (packed(b'{"t":' + b"[" * 100_000), "damaged"),
    (packed(b'{"t": {"dtype": "F32"}}'), "damaged"),
    (described(data_offsets=[0, 17]), "inside tensor t"),
    (described(data_offsets=[8, 4]), "inside tensor t"),
    (described(data_offsets=[-8, 8]), "inside tensor t"),
    (described(shape=[2, 3]), "bytes of its shape"),
    (described(shape=[-2, -2]), "bytes of its shape"),
    (described(dtype="I64"), "dtype I64"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BackendMisconfigured, match=message):
        SafetensorsFile(path).tensor("t")
