"""A model of the barriers by which the roles of one block of the chunk loop (src/cuda/forward) follow one another.

Roles are generators that give way wherever they could be held up; they, and the copies that they start, go on in random order. What a
stage or a tile holds is a tag: whoever reads one must find what he came for, a copy under way shows as BUSY. It knows nothing of memory
models, products or other blocks: what a block waits for from outside is always there. Change it with producers.cuh, factors.cuh and
consume().
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

Steps = Generator[None, None, None]

BUSY = "a copy under way"
STAGES, TILES, RING, WARPS = 3, 4, 4, 8  # warps of both consumers


class Barrier:
    """A transaction barrier: a phase ends when all arrivals and all announced copies are in."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.copies = self.phase = 0

    def _end(self) -> None:
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0 and self.copies == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def arrive(self) -> None:
        self.pending -= 1
        self._end()

    def arrive_expect(self, copies: int) -> None:
        self.copies += copies
        self.arrive()

    def copied(self) -> None:
        self.copies -= 1
        self._end()

    def wait(self, parity: int) -> Steps:
        """As the hardware has it: one bit, so that a phase two behind looks like the one waited for."""
        while self.phase & 1 == parity:
            yield


class Place:
    """A ring's place: index and phase parity."""

    def __init__(self, size: int, at: int = 0) -> None:
        self.size, self.at, self.parity = size, at, 0

    def next(self) -> None:
        self.at = (self.at + 1) % self.size
        self.parity ^= self.at == 0


@dataclass
class Item:
    """One item of work; scan: its steps, instead of chunks."""

    number: int
    chunks: int = 0
    warm: int = 0
    staged: bool = False
    values: bool = True
    scan: int = 0
    consumers: int = 3
    rehearsal: bool = False

    @property
    def stages_before(self) -> int:
        return 1 if self.staged else 2 * self.scan

    def tiles(self, i: int) -> int:
        """Tiles of v that come beside its i-th stage."""
        return int(self.values) if i >= self.stages_before else 2 * self.staged

    def takes_part(self, half: int) -> bool:
        return bool(self.consumers >> half & 1)


@dataclass
class Block:
    """What the roles share."""

    items: list[Item]
    random: random.Random
    rehearsals: int  # 0 or 1; another one, of the thread that loads keys, is an item without values like others
    copies: list[Steps] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loaded, self.normed, self.made, self.p_made = ([Barrier(1) for _ in range(STAGES)] for _ in range(4))
        self.released = [Barrier(WARPS) for _ in range(STAGES)]
        self.v_loaded, self.v_replaced = [Barrier(1) for _ in range(TILES)], [Barrier(WARPS) for _ in range(TILES)]
        self.item_full, self.item_empty = [Barrier(1) for _ in range(RING)], [Barrier(WARPS + 3) for _ in range(RING)]
        self.work: list[Item | None] = [None] * RING
        self.stage: list[object] = [None] * STAGES
        self.tile: list[list[object]] = [[None, None] for _ in range(TILES)]
        self.output: list[tuple[Item, int] | None] = [None] * TILES
        self.written: dict[tuple[int, int], int] = {}  # warps that have put their part of an output into a tile
        self.scan_barrier = Barrier(WARPS)
        self.scanned = self.announced = 0
        self.scan_warps: dict[tuple[int, int], int] = {}  # that have written a step's state
        for i in range(self.rehearsals):
            self.work[i] = Item(-1, chunks=1, rehearsal=True)
            self.item_full[i].arrive()
            self.loaded[i].arrive()

    def pause(self, most: int) -> Steps:
        for _ in range(self.random.randrange(most)):
            yield

    def copy(self, into: list, index: int, content: object, barrier: Barrier) -> None:
        def steps() -> Steps:
            yield from self.pause(6)
            into[index] = BUSY
            yield from self.pause(12)
            into[index] = content
            barrier.copied()

        self.copies.append(steps())

    def read_work(self, place: Place) -> Generator[None, None, Item | None]:
        yield from self.item_full[place.at].wait(place.parity)
        return self.work[place.at]

    def done(self, place: Place) -> None:
        self.item_empty[place.at].arrive()
        place.next()

    # --- the producer threads

    def produce_keys(self) -> Steps:
        ring, stage = Place(RING, self.rehearsals), Place(STAGES, self.rehearsals)
        at, given, claimed, item, c, stop = self.rehearsals, 0, False, Item(-1), 0, 0
        while True:
            while c < stop:
                yield from self.released[stage.at].wait(stage.parity ^ 1)
                self.loaded[stage.at].arrive_expect(1)
                self.copy(self.stage, stage.at, (item.number, "chunk", c), self.loaded[stage.at])
                c += 1
                stage.next()
                yield
            if not claimed:
                yield from self.item_empty[ring.at].wait(ring.parity ^ 1)
                self.work[ring.at] = self.items[given] if given < len(self.items) else None
                self.item_full[ring.at].arrive()
                ring.next()
                given, claimed, stop = given + 1, True, item.chunks
                yield
                continue
            following = self.work[at]
            at = (at + 1) % RING
            if following is None:
                return
            item = following
            for step in range(item.scan):
                for part in ("low", "high"):
                    yield from self.released[stage.at].wait(stage.parity ^ 1)
                    self.loaded[stage.at].arrive_expect(1)
                    self.copy(self.stage, stage.at, (item.number, part, step), self.loaded[stage.at])
                    stage.next()
                    yield
            if item.staged:
                yield from self.released[stage.at].wait(stage.parity ^ 1)
                wanted = item.takes_part(0)
                self.loaded[stage.at].arrive_expect(int(wanted))
                if wanted:
                    self.copy(self.stage, stage.at, (item.number, "pieces"), self.loaded[stage.at])
                stage.next()
                yield
            c, stop, claimed = 0, item.chunks - 4 if item.chunks > 4 else min(item.chunks, 1), False

    def produce_values(self) -> Steps:
        works, stage = Place(RING), Place(TILES)

        def store_output() -> Steps:
            yield from self.v_replaced[stage.at].wait(stage.parity ^ 1)
            if self.output[stage.at] is not None:
                item, c = self.output[stage.at]
                for half in range(2):
                    assert not item.takes_part(half) or self.tile[stage.at][half] == (item.number, "o", c)
                self.output[stage.at] = None
            yield

        def load(item: Item, content: object) -> None:
            whole = content[1] == "piece"  # of a state's second half, which fills the tile
            halves = [half for half in range(2) if item.takes_part(1 if whole else half)]
            self.v_loaded[stage.at].arrive_expect(len(halves))
            for half in halves:
                self.copy(self.tile[stage.at], half, content, self.v_loaded[stage.at])
            stage.next()

        while (item := (yield from self.read_work(works))) is not None:
            step = 0
            while step < item.scan:
                while (written := min(self.scanned - self.announced, item.scan - step)) == 0:
                    yield
                assert all(self.scan_warps[item.number, step + i] == WARPS for i in range(written))
                self.announced += written
                step += written
                yield from self.pause(8)
            if item.rehearsal:
                for _ in range(item.chunks):
                    self.v_loaded[stage.at].arrive()
                    stage.next()
            elif item.values:
                for piece in (2, 3) if item.staged else ():
                    yield from store_output()
                    load(item, (item.number, "piece", piece))
                for c in range(item.chunks):
                    yield from store_output()
                    self.output[stage.at] = (item, c) if c >= item.warm else None
                    load(item, (item.number, "v", c))
            self.done(works)
            yield
        for _ in range(TILES):
            yield from store_output()
            stage.next()

    # --- factors and P

    def make_factors(self) -> Steps:
        works, stage, v_stage = Place(RING), Place(STAGES), Place(TILES)
        while (item := (yield from self.read_work(works))) is not None:
            for i in range(item.stages_before + item.chunks):
                chunk = i - item.stages_before
                yield from self.released[stage.at].wait(stage.parity ^ 1)
                yield from self.loaded[stage.at].wait(stage.parity)
                if chunk >= 0:
                    assert item.rehearsal or self.stage[stage.at] == (item.number, "chunk", chunk)
                    self.normed[stage.at].arrive()
                    yield
                for _ in range(item.tiles(i)):
                    yield from self.v_loaded[v_stage.at].wait(v_stage.parity)
                    v_stage.next()
                if chunk < 0:
                    self.normed[stage.at].arrive()
                self.made[stage.at].arrive()
                stage.next()
                yield
            self.done(works)

    def assist(self) -> Steps:
        works, stage = Place(RING), Place(STAGES)
        while (item := (yield from self.read_work(works))) is not None:
            for _ in range(item.stages_before + item.chunks):
                yield from self.loaded[stage.at].wait(stage.parity)
                yield from self.normed[stage.at].wait(stage.parity)
                self.p_made[stage.at].arrive()
                stage.next()
                yield
            self.done(works)

    # --- a consumer's warp

    def consume(self, warp: int) -> Steps:
        half, works, stage, v_stage = warp // 4, Place(RING), Place(STAGES), Place(TILES)
        while (item := (yield from self.read_work(works))) is not None:
            if item.scan:
                yield from self._scan(item, warp, stage)
            elif not item.takes_part(half):
                yield from self._let_pass(item, stage, v_stage)
            else:
                if item.staged:
                    yield from self._read_pieces(item, half, stage, v_stage)
                yield from self._chunks(item, half, stage, v_stage)
            self.done(works)
            yield

    def _wait_for(self, stage: Place) -> Steps:
        yield from self.made[stage.at].wait(stage.parity)
        yield from self.p_made[stage.at].wait(stage.parity)

    def _release(self, stage: Place) -> Steps:
        self.released[stage.at].arrive()
        stage.next()
        yield

    def _scan(self, item: Item, warp: int, stage: Place) -> Steps:
        def load_part(part: str, step: int) -> Steps:
            yield from self._wait_for(stage)
            yield from self.pause(3)
            assert self.stage[stage.at] == (item.number, part, step)
            yield from self._release(stage)

        def meet() -> Steps:
            phase = self.scan_barrier.phase
            self.scan_barrier.arrive()
            while self.scan_barrier.phase == phase:
                yield

        yield from load_part("low", 0)
        yield from meet()
        for step in range(item.scan):
            yield from load_part("high", step)
            if step < item.scan - 1:
                yield from load_part("low", step + 1)
            self.scan_warps[item.number, step] = self.scan_warps.get((item.number, step), 0) + 1
            yield from meet()
            self.scanned += warp == 0
            yield

    def _let_pass(self, item: Item, stage: Place, v_stage: Place) -> Steps:
        for i in range(item.stages_before + item.chunks):
            yield from self.made[stage.at].wait(stage.parity)
            for _ in range(item.tiles(i)):
                yield from self.v_loaded[v_stage.at].wait(v_stage.parity)
                self.v_replaced[v_stage.at].arrive()
                v_stage.next()
                yield
            yield from self._release(stage)

    def _read_pieces(self, item: Item, half: int, stage: Place, v_stage: Place) -> Steps:
        tiles = []
        yield from self._wait_for(stage)
        for _ in range(2):
            yield from self.v_loaded[v_stage.at].wait(v_stage.parity)
            tiles.append(v_stage.at)
            v_stage.next()
        for _ in range(3):
            if half == 0:
                assert self.stage[stage.at] == (item.number, "pieces")
            else:
                assert [self.tile[at][0] for at in tiles] == [(item.number, "piece", piece) for piece in (2, 3)]
            yield
        for at in tiles:
            self.v_replaced[at].arrive()
            yield
        yield from self._release(stage)

    def _chunks(self, item: Item, half: int, stage: Place, v_stage: Place) -> Steps:
        for c in range(item.chunks):
            yield from self.made[stage.at].wait(stage.parity)
            if item.values and not item.rehearsal:
                assert self.tile[v_stage.at][half] == (item.number, "v", c)
            yield from self.p_made[stage.at].wait(stage.parity)
            yield from self.pause(3)
            assert item.rehearsal or self.stage[stage.at] == (item.number, "chunk", c)
            yield from self._release(stage)
            if not item.values:
                continue
            if c >= item.warm:  # the last of the half's warps makes it an output
                key = (v_stage.at, half)
                self.written[key] = (self.written.get(key, 0) + 1) % (WARPS // 2)
                if self.written[key] == 0:
                    self.tile[v_stage.at][half] = (item.number, "o", c)
                yield
            self.v_replaced[v_stage.at].arrive()
            v_stage.next()
            yield

    def run(self) -> None:
        """All roles and copies to their end, in random order; some roles are slow."""
        roles = [self.produce_keys(), self.produce_values(), self.make_factors(), self.assist()]
        roles += [self.consume(warp) for warp in range(WARPS)]
        speed = {id(role): self.random.choice([1, 1, 1, 5, 20]) for role in roles}
        for _ in range(2_000_000):
            going = self.copies if self.copies and self.random.random() < len(self.copies) / (len(self.copies) + 4) else roles
            if not going:
                return
            one = self.random.choices(going, [speed.get(id(x), 1) for x in going])[0]
            try:
                next(one)
            except StopIteration:
                going.remove(one)
        raise AssertionError("the roles wait for one another")


def random_items(source: random.Random) -> list[Item]:
    """Items of all kinds, most of them short: then the rings are what keeps them apart."""
    items = []
    for number in range(source.randrange(6, 14)):
        item = Item(number, chunks=source.choice([0, 1, 1, 1, 2, 3, 5, 7]))
        kind = source.choice(["state", "half", "warm", "transition", "scan"])
        if kind in ("state", "half"):
            item.staged = True
        if kind == "half":
            item.consumers = source.choice([1, 2])
        if kind == "warm":
            item.warm = min(item.chunks, source.randrange(3))
        if kind == "transition":
            item.warm, item.values = item.chunks, False
        if kind == "scan":
            item.chunks, item.scan = 0, source.choice([1, 2, 3, 6])
        items.append(item)
    return items


@pytest.mark.parametrize("seed", range(40))
def test_everyone_finds_what_he_came_for(seed: int) -> None:
    source = random.Random(seed)
    Block(random_items(source), source, rehearsals=source.randrange(2)).run()
