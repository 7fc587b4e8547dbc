"""From a layer's shape and mask to what the kernels read: tiles, and lists of active weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from sparselearning.execution.kernels import TASK
from sparselearning.execution.vectors import BLOCK, LANES

TILE_FLOATS = 8192  # 32 KiB, what first-level caches hold at least: of a tile's inputs
REGION_FLOATS = 262144  # 512 KiB, what second-level caches hold at least: of a region's
TILES_PER_FETCH = 4  # at most, where tiles share no inputs: long runs of memory are read faster
CROWDED = 256  # 1 KiB: channels that lie a multiple of it apart share a small part of the first-level cache,
PADDING = 16  # which so many zeros between them prevent
WEIGHTS_PER_SUM = 12  # fewer do not pay for fetching and storing the sums of a tile
OUTPUT_BLOCK = 512


@dataclass(frozen=True)
class Grid:
    """A plane of activations: rows, columns and images of one channel."""

    rows: int
    columns: int
    images: int


@dataclass(frozen=True)
class Tile:
    """Part of the target that is computed at a time, and how the registers cover it.

    Attributes:
        rows, columns, images: of the tile.
        reach: how many rows and columns more a phase of the source is read in.
        block: registers, as rows, columns and vectors. What lies in one line in the scratch buffer may share vectors.
        place: numbers from row to row and from column to column in a block.
        whole: whether the registers hold nothing but numbers of the target, in its order.
    """

    rows: int
    columns: int
    images: int
    reach: tuple[int, int]
    block: tuple[int, int, int]
    place: tuple[int, int]
    whole: bool

    @property
    def phase_rows(self) -> int:
        """Rows that it reads of every phase."""
        return self.rows + self.reach[0]

    @property
    def phase_columns(self) -> int:
        """Columns that it reads of every phase."""
        return self.columns + self.reach[1]

    @property
    def vectors(self) -> int:
        """Registers of a block."""
        return math.prod(self.block)

    def count(self, target: "Grid") -> int:
        """Tiles that cover the target."""
        pairs = ((target.rows, self.rows), (target.columns, self.columns), (target.images, self.images))
        return math.prod(math.ceil(whole / part) for whole, part in pairs)


@cache
def choose_tile(target: Grid, reach: tuple[int, int], is_contiguous: bool) -> Tile:
    """Choose the tile with the least work per number of the target.

    Args:
        target: the whole plane.
        reach: how many rows and columns more than the tile has a phase is read in.
        is_contiguous: whether the target's columns lie side by side in memory.
    """
    numbers = BLOCK * LANES

    def cost(tile: Tile) -> float:
        cells = tile.phase_rows * tile.phase_columns * tile.images / LANES
        return tile.count(target) * (tile.vectors + 2 - tile.whole + cells / 8)

    images = {math.ceil(target.images / math.ceil(target.images / run)) for run in (32, 64, 128)}
    tiles = (
        tile
        for n in sorted(images)
        for rows in range(1, min(target.rows, numbers) + 1)
        for columns in range(1, min(target.columns, max(1, numbers // (rows * n))) + 1)
        for tile in _layouts(rows, columns, n, reach, is_contiguous and n == target.images)
    )
    return min(tiles, key=cost)


def _layouts(rows: int, columns: int, images: int, reach: tuple[int, int], is_contiguous: bool) -> Iterator[Tile]:
    """How registers can cover a tile: every column has its own, every row, or all rows lie in one line."""
    line, run = (columns + reach[1]) * images, columns * images
    by_column, by_row, in_line = (math.ceil(n / LANES) for n in (images, run, (rows - 1) * line + run))
    for block, place, whole in (
        ((rows, columns, by_column), (columns * by_column * LANES, by_column * LANES), by_column * LANES == images),
        ((rows, 1, by_row), (by_row * LANES, images), is_contiguous and by_row * LANES == run),
        ((1, 1, in_line), (line, images), is_contiguous and rows == 1 and in_line * LANES == run),
    ):
        if math.prod(block) <= BLOCK:
            yield Tile(rows, columns, images, reach, block, place, whole)


@dataclass(frozen=True)
class Correlation:
    """A correlation of some source with some weights onto some target, but for which weights are active.

    ``target[o, r, c] = Σ w[o, i, t] · source[i, r · step_rows + taps[t].row, c · step_columns + taps[t].column]``

    Attributes:
        channels, outputs: of source and target.
        source, target: their planes.
        steps: rows and columns of the source for one of the target.
        taps: row and column of each tap, relative to the target's position times the step.
        target_strides: numbers from plane to plane, row to row, column to column of the target in memory.
        shares: into how many parts the work is to be cut.
        active: number of active weights, roughly.
    """

    channels: int
    outputs: int
    source: Grid
    target: Grid
    steps: tuple[int, int]
    taps: tuple[tuple[int, int], ...]
    target_strides: tuple[int, int, int]
    shares: int
    active: int

    @cached_property
    def first(self) -> tuple[int, int]:
        """Least row and column of the taps."""
        return tuple(min((tap[i] for tap in self.taps), default=0) for i in (0, 1))  # type: ignore[return-value]

    @cached_property
    def spans(self) -> tuple[int, int]:
        """By how much taps differ, at most, in rows and in columns."""
        return tuple(max((tap[i] for tap in self.taps), default=0) - self.first[i] for i in (0, 1))  # type: ignore[return-value]

    @cached_property
    def phases(self) -> tuple[int, int]:
        """Into how many rows and columns of phases the source is taken apart."""
        return tuple(min(step, span + 1) for step, span in zip(self.steps, self.spans, strict=True))  # type: ignore[return-value]

    @cached_property
    def tile(self) -> Tile:
        """The tile to compute by."""
        reach = tuple(span // step for span, step in zip(self.spans, self.steps, strict=True))
        return choose_tile(self.target, reach, self.target_strides[2] == self.target.images)

    @cached_property
    def channel_block(self) -> int:
        """Channels that are read at a time: what a tile reads of them fits the first-level cache, or few weights do."""
        tile = self.tile
        fit = TILE_FLOATS // (math.prod(self.phases) * tile.phase_rows * tile.phase_columns * tile.images)
        wanted = math.ceil(WEIGHTS_PER_SUM * self.outputs * self.channels / max(self.active, 1))
        block = min(max(fit, wanted, 1), self.channels)
        return math.ceil(self.channels / round(self.channels / block))

    @cached_property
    def region(self) -> tuple[int, int]:
        """Rows and columns of tiles whose inputs are fetched together: what more than one reads is fetched once, and
        where tiles share nothing, longer runs of memory are read.

        (0, 0): one tile, fetched block by block of channels, for all would not fit the second-level cache.
        """
        tile = self.tile
        across, along = math.ceil(self.target.rows / tile.rows), math.ceil(self.target.columns / tile.columns)
        if tile.block[0] == 1 and tile.rows > 1:  # registers go on from row to row
            across = along = 1
        elif sum(tile.reach) == 0:
            across, along = 1, min(along, max(1, tile.count(self.target) // (4 * self.shares)), TILES_PER_FETCH)

        def cells(rows: int, columns: int) -> int:
            return (rows * tile.rows + tile.reach[0]) * (columns * tile.columns + tile.reach[1])

        room = REGION_FLOATS / (self.channels * math.prod(self.phases) * tile.images)
        sizes = [(r, c) for r in range(1, across + 1) for c in range(1, along + 1) if cells(r, c) <= room]
        return min(
            sizes,
            key=lambda size: (
                cells(*size) * math.ceil(across / size[0]) * math.ceil(along / size[1]),
                -math.prod(size),
            ),
            default=(0, 0),
        )

    @cached_property
    def phase_size(self) -> tuple[int, int]:
        """Rows and columns that a region reads of every phase."""
        rows, columns = (max(size, 1) for size in self.region)
        return rows * self.tile.rows + self.tile.reach[0], columns * self.tile.columns + self.tile.reach[1]

    @cached_property
    def padding(self) -> int:
        """Zeros after what a region reads of one channel."""
        return 0 if self._fetched % CROWDED else PADDING

    @cached_property
    def channel_floats(self) -> int:
        """Numbers from one channel to the next in the scratch buffer."""
        return self._fetched + self.padding

    @property
    def _fetched(self) -> int:
        return math.prod(self.phases) * math.prod(self.phase_size) * self.tile.images

    @cached_property
    def channel_blocks(self) -> int:
        """Blocks of channels."""
        return math.ceil(self.channels / self.channel_block)

    @cached_property
    def output_block(self) -> int:
        """Outputs that are computed together; fewer where there would not be work for all shares."""
        blocks = math.ceil(self.outputs / OUTPUT_BLOCK)
        tiles = self.tile.count(self.target) // max(math.prod(self.region), 1)
        if tiles < 4 * self.shares:
            blocks = max(blocks, min(self.outputs, math.ceil(2 * self.shares / tiles)))
        return math.ceil(self.outputs / blocks)

    @cached_property
    def output_blocks(self) -> int:
        """Blocks of outputs."""
        return math.ceil(self.outputs / self.output_block)

    @cached_property
    def is_aligned(self) -> bool:
        """Whether registers of tiles inside the target go to multiples of their size, if the target begins at one."""
        tile, (plane, row, column) = self.tile, self.target_strides
        steps = [plane, tile.rows * row, tile.columns * column]
        steps += [step for step, registers in zip((row, column), tile.block, strict=False) if registers > 1]
        steps += [tile.images] if tile.images < self.target.images else []
        return all(step % LANES == 0 for step in steps)

    @cached_property
    def tap_offsets(self) -> np.ndarray:
        """Place of every tap in what a tile reads of a channel, in numbers."""
        tile = self.tile
        rows, columns = self.phase_size
        places = []
        for row, column in self.taps:
            row_reach, row_phase = divmod(row - self.first[0], self.steps[0])
            column_reach, column_phase = divmod(column - self.first[1], self.steps[1])
            phase = row_phase * self.phases[1] + column_phase
            places.append(((phase * rows + row_reach) * columns + column_reach) * tile.images)
        return np.array(places, dtype=np.int64)

    def task(self) -> np.ndarray:
        """What the kernels are told of it; memory addresses are still to be filled in."""
        task = np.zeros(1, TASK)
        tile = self.tile
        fetched = self.channels if self.region[0] else self.channel_block
        scratch = fetched * self.channel_floats + LANES
        task["shares"] = self.shares
        task["scratch_floats"] = -(-scratch // LANES) * LANES
        task["work_bytes"] = (
            -(-4 * (task["scratch_floats"][0] + (self.output_block + 1) * tile.vectors * LANES) // 4096) * 4096 + 128
        )
        for name, value in {
            "channels": self.channels, "rows": self.source.rows, "columns": self.source.columns,
            "images": self.source.images, "outputs": self.outputs,
            "target_rows": self.target.rows, "target_columns": self.target.columns,
            "target_plane": self.target_strides[0], "target_row": self.target_strides[1],
            "target_column": self.target_strides[2],
            "row_step": self.steps[0], "column_step": self.steps[1],
            "first_row": self.first[0], "first_column": self.first[1],
            "row_phases": self.phases[0], "column_phases": self.phases[1],
            "tile_rows": tile.rows, "tile_columns": tile.columns, "tile_images": tile.images,
            "region_rows": max(self.region[0], 1), "region_columns": max(self.region[1], 1),
            "phase_rows": self.phase_size[0], "phase_columns": self.phase_size[1], "block_row": tile.place[0],
            "block_column": tile.place[1], "whole": tile.whole,
            "channel_block": self.channel_block, "channel_blocks": self.channel_blocks,
            "channel_floats": self.channel_floats, "padding": self.padding, "fetches_all": self.region[0] > 0,
            "output_block": self.output_block, "output_blocks": self.output_blocks,
        }.items():  # fmt: skip
            task[name] = value
        return task


@dataclass(frozen=True)
class WeightList:
    """Active weights in the order in which a kernel reads them.

    Attributes:
        offsets: place of each weight's input in the scratch buffer, int32 [n].
        entries: int32 [m, 3] of output, first weight, last weight + 1.
        entry_starts: int64 [blocks + 1].
        order: which of the active weights, as they were given, each one is; int64 [n].
    """

    offsets: np.ndarray
    entries: np.ndarray
    entry_starts: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, correlation: Correlation, outputs: np.ndarray, channels: np.ndarray, taps: np.ndarray) -> "WeightList":
        """Sort active weights, given by output, channel and tap, int64 [n] each; of one output, by channel."""
        c = correlation
        # NumPy sorts numbers of 16 bits by radix.
        by_output = np.argsort(outputs.astype(np.uint16) if c.outputs <= 1 << 16 else outputs, kind="stable")
        outputs, channels, taps = outputs[by_output], channels[by_output], taps[by_output]
        # The weights of one output and one block of channels are a run of these; the runs are to be put in order.
        counts = np.zeros((c.output_blocks * c.output_block, c.channel_blocks), dtype=np.int64)
        run = outputs * c.channel_blocks + channels // c.channel_block
        counts.ravel()[: c.outputs * c.channel_blocks] = np.bincount(run, minlength=c.outputs * c.channel_blocks)
        begins = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
        # In a block, outputs with equally many weights follow each other: how often a loop runs is then foreseen.
        blocks = (c.output_blocks, c.output_block, c.channel_blocks)
        of_block = counts.reshape(blocks).transpose(0, 2, 1)  # [block of outputs, block of channels, output]
        by_count = np.argsort(of_block, axis=2, kind="stable")
        named = np.arange(c.output_blocks)[:, None, None] * c.output_block + by_count
        there = named < c.outputs
        output, length = named[there], np.take_along_axis(of_block, by_count, axis=2)[there]
        channel_block = np.broadcast_to(np.arange(c.channel_blocks)[None, :, None], named.shape)[there]
        ends = np.cumsum(length)
        order = np.repeat(begins[output, channel_block] - (ends - length), length) + np.arange(len(outputs))
        offsets = (channels % c.channel_block) * c.channel_floats + c.tap_offsets[taps]
        entries = np.stack([output, ends - length, ends], axis=1).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(there.sum(axis=2))]).astype(np.int64)
        return cls(offsets[order].astype(np.int32), entries, starts, by_output[order])
