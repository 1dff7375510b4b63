"""The devices of a fleet, and how many requests per second they can keep up with."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from backends.protocol import Role
from tests.bench.placement.hardware import Device, Wire
from tests.bench.placement.orders import GAP_SECONDS
from tests.bench.placement.shapes import Shape

PREFILL_SPEEDS, DECODE_SPEEDS = (1.0, 0.7, 1.0, 0.7), (1.0, 0.8)


@dataclass(frozen=True)
class Fleet:
    """Devices by role."""

    workers: tuple[tuple[str, Role, Device], ...]
    wire: Wire = field(default_factory=Wire)

    def capacity(self, shape: Shape, rng: random.Random) -> float:
        """Requests per second that keep the busier of the two phases busy, targets kept."""
        drawn = [shape.lengths(rng) for _ in range(4000)]
        prompt, answer = (sum(it) / len(drawn) for it in zip(*drawn, strict=True))
        prefill = decode = 0.0
        for _, role, device in self.workers:
            if role != "decode":
                prefill += len(drawn) / sum(device.whole_prefill(it) for it, _ in drawn)
            if role != "prefill":
                rows = batch(device, prompt + answer / 2)
                decode += rows / device.decode_seconds(rows, int(rows * prompt)) / answer
        return min(prefill, decode)


def batch(device: Device, context: float) -> int:
    """The largest batch whose steps keep the gap and whose KV fits."""
    rows = int(device.pool_tokens / context)
    while rows > 1 and device.decode_seconds(rows, int(rows * context)) > GAP_SECONDS * 0.85:
        rows -= 1
    return rows


def fleet_for(shape: Shape) -> Fleet:
    """The fleet, with the largest batches that keep the gap at this shape's mean context.

    An operator would set them so, and every policy has them.
    """
    prompt, answer = shape.means()
    workers: list[tuple[str, Role, Device]] = []
    for number, speed in enumerate(PREFILL_SPEEDS):
        workers.append((f"prefill-{number}", "prefill", Device(speed=speed)))
    for number, speed in enumerate(DECODE_SPEEDS):
        rows = batch(Device(speed=speed), prompt + answer / 2)
        workers.append((f"decode-{number}", "decode", Device(speed=speed, max_batch=rows)))
    return Fleet(tuple(workers))
