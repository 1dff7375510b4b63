"""Plug-ins that write where or when they must not."""

from __future__ import annotations

import itertools
import threading
import time

from backends.emulation.synthetic import SyntheticBackend
from tests.conformance.mutants.sound import Apart, Sound, breaks


@breaks("it_writes_only_where_its_rows_lie")
class WritesBesideItsBlocks(Sound):
    def step(self, batch, ready):
        outputs = super().step(batch, ready)
        free = next(it for it in range(100) if all(it not in row.blocks for row in batch))
        self.bytes_of(free)[5] ^= 1
        return outputs


@breaks("nothing_is_written_after_a_step")
class WritesLate(Sound):
    def step(self, batch, ready):
        outputs = super().step(batch, ready)
        threading.Thread(target=self._write, args=(batch[0].blocks[0],), daemon=True).start()
        return outputs

    def _write(self, block):
        late = self.bytes_of(block)
        for value in range(100):
            late[:64] = value
            time.sleep(0.002)


@breaks("a_layer_that_is_ready_is_final")
class ReadyTooEarly(Sound):
    def step(self, batch, ready):
        for row, layer in itertools.product(range(len(batch)), range(self.info.layout.layers)):
            ready(row, layer)
        return super().step(batch, ready)


@breaks("a_layer_that_is_ready_is_final")
class ReadyFromAnotherThread(Sound):
    def step(self, batch, ready):
        outputs = super().step(batch, lambda *_: None)
        caller = threading.Thread(target=ready, args=(0, 0))
        caller.start()
        caller.join()
        return outputs


@breaks("copied_blocks_are_equal")
class CopiesTheFirstLayer(Sound):
    def copy_blocks(self, pairs):
        for source, target in pairs:
            size = len(self.bytes_of(0)) // self.info.layout.layers
            self.bytes_of(target)[:size] = self.bytes_of(source)[:size]


@breaks("copied_blocks_are_equal")
class CopiesInHostMemoryOnly(Apart):
    def copy_blocks(self, pairs):
        for source, target in pairs:
            self._outer[target] = self._outer[source]


@breaks("decode_after_handoff_equals_decode_in_place")
class DeafToIngest(Apart):
    def ingest(self, blocks):
        pass


@breaks("kv_survives_every_layout")
class IngestsTheFirstBlock(Apart):
    def ingest(self, blocks):
        super().ingest(list(blocks)[:1])


@breaks("decode_after_handoff_equals_decode_in_place")
class ClearsWhatItIngests(SyntheticBackend):
    def ingest(self, blocks):
        size = self.info.layout.block_bytes
        for block in blocks:
            self.pool[block * size : (block + 1) * size] = 0
