"""llama.cpp's memory as a cache of the pool, over a stand-in for that memory that counts cells."""

import random

import numpy as np
import pytest

from backends.api import Row, StepFailed
from backends.llamacpp.cells import SCRATCH, Cells, Held
from backends.llamacpp.state import Form, State

FORM = Form(layers=2, numbers=2, dtype="float16", transposed=False)
SIZE = 4
BLOCKS = 24


class Room:
    """Cells that sequences share; a new one is wherever there is room, in no order."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.of: dict[int, dict[int, bytes]] = {}
        self.loads = self.loaded = 0

    @property
    def used(self) -> int:
        return len({id(kv) for sequence in self.of.values() for kv in sequence.values()})

    def share(self, source: int, target: int, first: int, end: int) -> None:
        mine = self.of.setdefault(target, {})
        for position, kv in self.of.get(source, {}).items():
            if first <= position < end:
                mine[position] = kv

    def drop(self, sequence: int) -> None:
        self.of.pop(sequence, None)

    def clear(self) -> None:
        self.of.clear()

    def compute(self, sequence: int, position: int, kv: bytes) -> bool:
        assert set(self.of.get(sequence, {})) == set(range(position)), "a gap, or a token too much"
        if self.used == self.cells:
            return False
        self.of.setdefault(sequence, {})[position] = kv
        return True

    def read(self, sequence: int, state: State) -> None:
        held = self.of[sequence]
        assert len(held) == state.cells
        state.begin(0)
        order = list(held)
        random.Random(len(order)).shuffle(order)
        state._cells["position"] = order
        for cell, position in enumerate(order):
            state.keys[:, cell], state.values[:, cell] = numbers(held[position])

    def write(self, sequence: int, state: State) -> bool:
        assert not self.of.get(sequence)
        if self.used + state.cells > self.cells:
            return False
        self.loads += 1
        self.loaded += state.cells
        self.of[sequence] = {
            at: np.stack([state.keys[:, cell], state.values[:, cell]]).tobytes()
            for cell, at in enumerate(state._cells["position"].tolist())
        }
        return True


def numbers(kv: bytes) -> np.ndarray:
    """One token's KV: [K|V, layer, number]."""
    return np.frombuffer(kv, FORM.item).reshape(2, FORM.layers, FORM.numbers)


class Desk:
    """Steps rows through `Cells`; each token's KV says which token it is, and where."""

    def __init__(self, cells: int = BLOCKS * SIZE, sequences: int = 8) -> None:
        self.room = Room(cells)
        self.pool = np.zeros((2, FORM.layers, BLOCKS, SIZE, FORM.numbers), FORM.item)
        self.cells = Cells(self.room, FORM, self.pool, sequences)

    def kv(self, token: int, position: int) -> bytes:
        return b"".join(bytes([token, position, plane, 1]) for plane in range(4))

    def in_pool(self, blocks: list[int], position: int) -> bytes:
        return self.pool[:, :, blocks[position // SIZE], position % SIZE].tobytes()

    def write(self, blocks: list[int], tokens: list[int]) -> None:
        """Another worker writes a prefix into the pool."""
        for position, token in enumerate(tokens):
            kv = numbers(self.kv(token, position))
            self.pool[:, :, blocks[position // SIZE], position % SIZE] = kv
        self.cells.written(blocks)

    def step(self, rows: list[Row], lines: list[list[int]]) -> list[Held]:
        """Compute rows of these lines; what comes before them must be there, in both memories."""
        helds = self.cells.prepare(rows)
        assert not self.room.of.get(SCRATCH)
        assert len({held.sequence for held in helds}) == len(rows)
        for row, line, held in zip(rows, lines, helds, strict=True):
            there = self.room.of.get(held.sequence, {})
            expected = {at: self.kv(line[at], at) for at in range(row.start)}
            assert there == expected
        for row, held in zip(rows, helds, strict=True):
            for at, token in enumerate(row.tokens, row.start):
                while not self.room.compute(held.sequence, at, self.kv(token, at)):
                    assert self.cells.shrink(), "no room, though the pool has some"
        self.cells.store(rows, helds)
        for row, line in zip(rows, lines, strict=True):
            for at in range(row.start + len(row.tokens)):
                assert self.in_pool(row.blocks, at) == self.kv(line[at], at)
        return helds


def row(line: list[int], blocks: list[int], start: int, end: int | None = None) -> Row:
    return Row(tokens=line[start:end], start=start, blocks=list(blocks))


def test_a_sequence_that_goes_on_is_loaded_once() -> None:
    desk, line = Desk(), list(range(10))
    desk.write([3, 1, 7], line[:9])
    (first,) = desk.step([row(line, [3, 1, 7], 9)], [line])
    line.append(10)
    (second,) = desk.step([row(line, [3, 1, 7], 10)], [line])
    assert first is second
    assert (desk.room.loads, desk.room.loaded) == (1, 9)


def test_chunks_of_a_prompt_follow_each_other_without_the_pool() -> None:
    desk, line = Desk(), list(range(20))
    for start in range(0, 20, 7):
        desk.step([row(line, [5, 4, 3, 2, 1], start, start + 7)], [line])
    assert desk.room.loads == 0


def test_sequences_of_one_prefix_share_its_cells_and_load_only_their_own_tail() -> None:
    desk, prompt = Desk(), list(range(10))
    desk.step([row(prompt, [0, 1, 2], 0)], [prompt])
    desk.pool[:, :, 3] = desk.pool[:, :, 2]
    desk.cells.written([3])
    lines = [[*prompt, 50], [*prompt, 60]]
    desk.step([row(lines[0], [0, 1, 2], 10), row(lines[1], [0, 1, 3], 10)], lines)
    assert (desk.room.loads, desk.room.loaded) == (1, 2)
    assert desk.room.used == 8 + 2 * 3


def test_blocks_that_others_have_written_are_loaded_again() -> None:
    desk, line = Desk(), list(range(9))
    desk.step([row(line, [0, 1, 2], 0, 8)], [line])
    other = [100 + it for it in line]
    desk.write([0, 1], other[:8])
    desk.step([row(other, [0, 1, 2], 8)], [other])
    assert desk.room.loaded == 8


def test_a_block_that_another_row_has_taken_over_is_no_longer_the_old_ones() -> None:
    """The new one shares the beginning, so that both end in the same block at the same place."""
    desk, old = Desk(), list(range(8))
    desk.step([row(old, [0, 1], 0)], [old])
    new = [*old[:4], 90, 91, 92, 93]
    desk.step([row(new, [0, 1], 4)], [new])
    desk.step([row([*new, 94], [0, 1, 2], 8)], [[*new, 94]])


def test_what_holds_less_of_a_block_than_is_needed_is_completed_from_the_pool() -> None:
    desk, line = Desk(), list(range(8))
    desk.write([0, 1], line)
    desk.cells.prepare([row(line, [0, 1], 6)])
    desk.step([row([*line, 8], [0, 1, 2], 8)], [[*line, 8]])


def test_what_has_had_no_row_for_a_while_is_given_up_and_found_again_in_the_pool() -> None:
    desk, idle, busy = Desk(), list(range(9)), list(range(100, 105))
    desk.step([row(idle, [0, 1, 2], 0)], [idle])
    for token in range(20):
        desk.step([row(busy, [3, 4, 5, 6, 7, 8, 9], len(busy) - 1 if token else 0)], [busy])
        busy.append(110 + token)
    assert desk.room.used == 24
    idle.append(9)
    desk.step([row(idle, [0, 1, 2], 9)], [idle])
    assert desk.room.loaded == 9


def test_more_sequences_than_there_are_take_turns() -> None:
    desk = Desk(sequences=4)
    lines = [[10 * it, 10 * it + 1] for it in range(6)]
    for turn in range(12):
        chosen = [turn % 6, (turn + 1) % 6, (turn + 3) % 6]
        batch = []
        for it in chosen:
            start = len(lines[it]) - 1 if turn > 5 or len(lines[it]) > 2 else 0
            batch.append(row(lines[it], [it, 6 + it, 12 + it], start))
        desk.step(batch, [lines[it] for it in chosen])
        for it in chosen:
            lines[it].append(200 + turn)


def test_without_room_the_step_fails_and_nothing_is_held_afterwards() -> None:
    desk, line = Desk(cells=8), list(range(12))
    desk.write([0, 1, 2], line)
    with pytest.raises(StepFailed, match="no room for 11 tokens"):
        desk.cells.prepare([row(line, [0, 1, 2], 11)])
    for _ in range(20):
        desk.cells.forget()
        assert desk.room.used == 0
        desk.step([row(line[:5], [0, 1], 0)], [line])


class Play:
    """A host at random: lines come, share beginnings, grow, pause and go; blocks go round."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.desk = Desk(sequences=6)
        self.free = list(range(BLOCKS))
        self.lines: list[tuple[list[int], list[int], set[int]]] = []

    def take(self, count: int) -> list[int]:
        self.dice.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def arrive(self) -> None:
        """A prefix that another worker has computed, or that is computed here in two chunks."""
        length = self.dice.randint(5, 14)
        if len(self.free) < 5:
            return
        blocks = self.take(-(-length // SIZE))
        line = [self.dice.randrange(250) for _ in range(length)]
        if self.dice.random() < 0.5:
            self.desk.write(blocks, line[:-1])
        else:
            self.desk.step([row(line, blocks, 0, 2)], [line])
            self.desk.step([row(line, blocks, 2, length - 1)], [line])
        self.lines.append((line, blocks, set(blocks)))

    def begin_alike(self) -> None:
        """A prompt whose first block is there; the rest is computed in blocks of others gone."""
        if not self.lines or len(self.free) < 2:
            return
        line, blocks, _ = self.dice.choice(self.lines)
        mine = [blocks[0], *self.take(1)]
        alike = [*line[:SIZE], *(self.dice.randrange(250) for _ in range(4))]
        self.desk.step([row(alike, mine, SIZE, 7)], [alike])
        self.lines.append((alike, mine, set(mine)))

    def fork(self) -> None:
        """Another sequence of the same prefix: full blocks are shared, the last one is copied."""
        if not self.lines or len(self.free) < 4:
            return
        line, blocks, _ = self.dice.choice(self.lines)
        computed = len(line) - 1
        full, rest = divmod(computed, SIZE)
        mine = list(blocks[:full])
        if rest:
            mine += self.take(1)
            self.desk.pool[:, :, mine[-1]] = self.desk.pool[:, :, blocks[full]]
            self.desk.cells.written([mine[-1]])
        twin = [*line[:computed], self.dice.randrange(250)]
        self.lines.append((twin, mine, set(mine)))

    def leave(self) -> None:
        if self.lines:
            gone = self.lines.pop(self.dice.randrange(len(self.lines)))
            held = set().union(*(it[2] for it in self.lines)) if self.lines else set()
            self.free += [it for it in gone[1] if it not in held]

    def step(self) -> None:
        chosen = self.dice.sample(self.lines, min(len(self.lines), self.dice.randint(1, 5)))
        batch = []
        for line, blocks, mine in chosen:
            if len(line) > len(blocks) * SIZE:
                if not self.free:
                    return
                new = self.take(1)
                blocks += new
                mine |= set(new)
            batch.append(row(line, blocks, len(line) - 1))
        if batch:
            self.desk.step(batch, [it[0] for it in chosen])
            for line, _, _ in chosen:
                line.append(self.dice.randrange(250))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_goes_and_is_shared_each_row_finds_its_own_past(seed: int) -> None:
    play = Play(seed)
    actions = [play.arrive, play.begin_alike, play.fork, play.leave, *[play.step] * 3]
    for _ in range(150):
        play.dice.choice(actions)()
    assert play.desk.room.loads
