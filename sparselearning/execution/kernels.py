"""Correlations over active weights alone, for CPUs.

All of a convolution's three passes, and a linear layer's, are one of two loops over a list of active weights:

- :func:`correlate`: ``target[o, p] = bias[o] + Σ_j value[j] · source[c_j, p · step + shift_j]``, over the weights j
  of output o: the forward pass and, with inputs and outputs exchanged, the gradient with respect to the input. What
  comes next may be part of the same pass: another tensor is added, and ReLU follows, or its backward pass, which makes
  numbers zero where those of a third tensor, the *gate*, are zero or less;
- :func:`contraction`: ``result[j] = Σ_p target[o_j, p] · source[c_j, p · step + shift_j]``: the gradient of each active
  weight, where the target holds the gradient of the output.

Activations lie in memory as [channel, row, column, image], the image innermost, so that a shift moves whole runs of
numbers. A *tile* is a few rows and columns of the target for some images: so many sums as registers hold while an
output's weights go by. A *region* is a few tiles. What it reads of the source, its borders padded with zeros and, where
``step`` is not 1, every ``step``-th row and column side by side (a *phase*), is first copied to a scratch buffer that
fits the second-level cache. There every weight is one constant offset from wherever the tile is. Channels are read in
blocks of so many as fit the first-level cache for one tile.

:func:`tile_by_tile` goes over regions and tiles. What it calls for each, one of the two loops, is compiled anew for
every shape of a tile in registers, and short for that reason.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit

from sparselearning.execution.vectors import (
    LANES,
    accumulate,
    as_pointer,
    call,
    clear,
    compiled,
    contract,
    copy,
    copy_every,
    fetch_and_add,
    finish_streams,
    number_at,
)

TASK = np.dtype(
    [
        (name, np.int64)
        for name in (
            # shares of the work: taken one by one until none is left, whatever threads there are
            "next_share", "shares", "tile_function", "work", "work_bytes", "scratch_floats",
            # memory
            "source", "target", "streams", "bias", "added", "relu", "gate", "values", "offsets", "entries",
            "entry_starts", "results", "results_bytes",
            # sizes: source [channels, rows, columns, images], target [outputs, target_rows, target_columns, images]
            "channels", "rows", "columns", "images", "outputs", "target_rows", "target_columns",
            "target_plane", "target_row", "target_column",
            # where a tile reads
            "row_step", "column_step", "first_row", "first_column", "row_phases", "column_phases",
            # one tile, and a block of sums of it
            "tile_rows", "tile_columns", "tile_images", "block_row", "block_column", "whole",
            # one region, and blocks of channels and outputs
            "region_rows", "region_columns", "phase_rows", "phase_columns", "padding", "channel_floats", "fetches_all",
            "channel_block", "channel_blocks", "output_block", "output_blocks",
        )
    ]
)  # fmt: skip
"""What a kernel is told.

Memory is given by addresses, 0 where there is none. ``tile_function`` is called with the task, the share, where the
tile's inputs of a block of channels begin, the tile's first row, column and image, its number of images, and which
block of outputs and of channels it is. ``streams``: tiles inside the target are written past the caches.
``added`` and ``gate`` lie in memory as the target does. ``entries`` is int32 [n, 3] of (output, begin, end) into
``values`` and ``offsets``, for each block of outputs and in it each block of channels, from ``entry_starts`` on.
``target_plane``, ``target_row`` and ``target_column`` are distances in the target, ``block_row`` and ``block_column``
in a block of sums, in numbers. ``whole``: the registers of a tile inside the target hold nothing but numbers of it. A
channel takes ``channel_floats`` numbers of the scratch buffer, the last ``padding`` of which are zero. ``fetches_all``:
a region's inputs of all channels are fetched at once, not block by block.
"""

NEXT_SHARE = 8 * list(TASK.names or ()).index("next_share")  # bytes
AHEAD = 2  # by so many entries, memory is asked for before it is read


@njit(inline="always")
def _ceil_div(a, b):  # type: ignore[no-untyped-def]
    return (a + b - 1) // b


@njit(inline="always")
def _inside(first, step, count, size):  # type: ignore[no-untyped-def]
    """How many of ``count`` rows or columns, ``step`` apart, lie before a plane of some size, and how many in it."""
    before = min(max(0, _ceil_div(-first, step)), count)
    return before, max(0, min(_ceil_div(size - first, step), count) - before)


@njit
def _pack(task, scratch, channel, last, first_row, first_column, image, images):  # type: ignore[no-untyped-def]
    """Copy what a region reads of some channels: [channel, row phase, column phase, row, column, image]."""
    line = task.columns * task.images
    run, columns = task.tile_images, task.phase_columns
    size = task.phase_rows * columns * run
    step = task.column_step * task.images
    contiguous = task.column_step == 1 and images == task.images and images == run
    place = scratch
    while channel < last:
        for row_phase in range(task.row_phases):
            row = first_row * task.row_step + task.first_row + row_phase
            above, rows_inside = _inside(row, task.row_step, task.phase_rows, task.rows)
            for column_phase in range(task.column_phases):
                column = first_column * task.column_step + task.first_column + column_phase
                left, columns_inside = _inside(column, task.column_step, columns, task.columns)
                if rows_inside < task.phase_rows or columns_inside < columns or images < run:
                    clear(place, size)
                source = channel * task.rows * line + (row + above * task.row_step) * line
                source = task.source + 4 * (source + column * task.images + left * step + image)
                target = place + 4 * (above * columns + left) * run
                for _ in range(rows_inside):
                    if contiguous:
                        copy(target, source, columns_inside * run)
                    elif run == 1:
                        copy_every(target, source, step, columns_inside)
                    else:
                        for c in range(columns_inside):
                            copy(target + 4 * c * run, source + 4 * c * step, images)
                    target += 4 * columns * run
                    source += 4 * task.row_step * line
                place += 4 * size
        clear(place, task.padding)
        place += 4 * task.padding
        channel += 1


@njit(inline="always")
def _clear_end(task, scratch):  # type: ignore[no-untyped-def]
    """Let the last registers of a tile read zeros, not what is left of other layers, where they reach too far."""
    channels = task.channels if task.fetches_all else task.channel_block
    clear(scratch + 4 * channels * task.channel_floats, LANES)


@njit
def _move_tile(task, block, target, first_row, first_column, image, images, write):  # type: ignore[no-untyped-def]
    """Write a block of sums to its tile of one target plane, or read the block from there, zero outside the tile."""
    rows = min(task.tile_rows, task.target_rows - first_row)
    columns = min(task.tile_columns, task.target_columns - first_column)
    contiguous = task.target_column == images and task.block_column == images
    for r in range(rows):
        line = target + 4 * ((first_row + r) * task.target_row + first_column * task.target_column + image)
        place = block + 4 * r * task.block_row
        if contiguous:
            if write:
                copy(line, place, columns * images)
            else:
                copy(place, line, columns * images)
            continue
        for c in range(columns):
            if write:
                copy(line + 4 * c * task.target_column, place + 4 * c * task.block_column, images)
            else:
                copy(place + 4 * c * task.block_column, line + 4 * c * task.target_column, images)


@njit(inline="always")
def _region(task, number):  # type: ignore[no-untyped-def]
    """First row, column and image of a region, and its number of images."""
    image_blocks = _ceil_div(task.images, task.tile_images)
    column_blocks = _ceil_div(task.target_columns, task.region_columns * task.tile_columns)
    image = (number % image_blocks) * task.tile_images
    number //= image_blocks
    column = (number % column_blocks) * task.region_columns * task.tile_columns
    row = (number // column_blocks) * task.region_rows * task.tile_rows
    return row, column, image, min(task.tile_images, task.images - image)


@njit(inline="always")
def _regions(task):  # type: ignore[no-untyped-def]
    return (
        _ceil_div(task.images, task.tile_images)
        * _ceil_div(task.target_columns, task.region_columns * task.tile_columns)
        * _ceil_div(task.target_rows, task.region_rows * task.tile_rows)
    )


@njit(inline="always")
def _is_whole(task, row, column, images):  # type: ignore[no-untyped-def]
    return (
        row + task.tile_rows <= task.target_rows
        and column + task.tile_columns <= task.target_columns
        and images == task.tile_images
    )


@njit(inline="always")
def _lists(task):  # type: ignore[no-untyped-def]
    """Where the entries of each block start, and the entries."""
    starts = carray(as_pointer(task.entry_starts), task.output_blocks * task.channel_blocks + 1, np.int64)
    return starts, carray(as_pointer(task.entries), (starts[len(starts) - 1], 3), np.int32)


@compiled()
def tile_by_tile(address):  # type: ignore[no-untyped-def]
    """Do a task: fetch what each region reads, and let the task's ``tile_function`` go over its tiles.

    A tile's blocks of channels come one after the other, from the first to the last: sums, and gradients copied for the
    first, stay in the share's memory meanwhile.
    """
    task = carray(as_pointer(address), 1, TASK)[0]
    regions = _regions(task)
    items = regions * task.output_blocks
    while True:
        share = fetch_and_add(address + NEXT_SHARE, 1)
        if share >= task.shares:
            break
        scratch = task.work + share * task.work_bytes
        _clear_end(task, scratch)
        for item in range(share * items // task.shares, (share + 1) * items // task.shares):
            first_row, first_column, image, images = _region(task, item % regions)
            if task.fetches_all:
                _pack(task, scratch, 0, task.channels, first_row, first_column, image, images)
            for tile in range(task.region_rows * task.region_columns):
                down = tile // task.region_columns * task.tile_rows
                right = tile % task.region_columns * task.tile_columns
                row, column = first_row + down, first_column + right
                if row >= task.target_rows or column >= task.target_columns:
                    continue
                for channel_block in range(task.channel_blocks):
                    source = scratch + 4 * (down * task.phase_columns + right) * task.tile_images
                    channel = channel_block * task.channel_block
                    if task.fetches_all:
                        source += 4 * channel * task.channel_floats
                    else:
                        end = min(channel + task.channel_block, task.channels)
                        _pack(task, scratch, channel, end, first_row, first_column, image, images)
                    call(
                        task.tile_function,
                        address, share, source, row, column, image, images, item // regions, channel_block,
                    )  # fmt: skip
    finish_streams()


@cache
def correlate(rows: int, columns: int, vectors: int) -> Any:
    """Compiled correlation of a tile and a block of channels; sums are ``rows · columns · vectors`` registers."""
    size = rows * columns * vectors * LANES

    @compiled(rows, columns, vectors)
    def tile(address, share, source, row, column, image, images, output_block, channel_block):  # type: ignore[no-untyped-def]
        task = carray(as_pointer(address), 1, TASK)[0]
        starts, entries = _lists(task)
        blocks = task.work + share * task.work_bytes + 4 * task.scratch_floats
        row_pitch, column_pitch = task.phase_columns * task.tile_images, task.tile_images
        whole = task.whole and _is_whole(task, row, column, images)
        place = 4 * (row * task.target_row + column * task.target_column + image)
        first, last = channel_block == 0, channel_block == task.channel_blocks - 1
        lowest = np.float32(0) if last and task.relu != 0 else np.float32(-np.inf)
        number = output_block * task.channel_blocks + channel_block
        for e in range(starts[number], starts[number + 1]):
            output = entries[e, 0]
            block = blocks + 4 * size * (output - output_block * task.output_block)
            target = task.target + 4 * output * task.target_plane
            bias = np.float32(0)
            if first and task.bias != 0:
                bias = number_at(task.bias + 4 * output)
            added = gate = ahead = 0
            begins_with_added = task.added != 0 and not whole
            if first and begins_with_added:
                plane = task.added + 4 * output * task.target_plane
                _move_tile(task, block, plane, row, column, image, images, False)
            if last and whole and (task.added != 0 or task.gate != 0):
                later = entries[min(e + AHEAD, starts[number + 1] - 1), 0]
                ahead = 4 * (later - output) * task.target_plane
                if task.added != 0:
                    added = task.added + 4 * output * task.target_plane + place
                if task.gate != 0:
                    gate = task.gate + 4 * output * task.target_plane + place
            elif last and not whole and task.gate != 0:
                gate = blocks + 4 * size * task.output_block
                plane = task.gate + 4 * output * task.target_plane
                _move_tile(task, gate, plane, row, column, image, images, False)
            accumulate(
                rows, columns, vectors, block, first and not begins_with_added, bias,
                source, row_pitch, column_pitch, task.values, task.offsets,
                entries[e, 1], entries[e, 2], added, gate, ahead, lowest, target + place if last and whole else 0,
                task.target_row if whole else columns * vectors * LANES,
                task.target_column if whole else vectors * LANES, task.streams,
            )  # fmt: skip
            if last and not whole:
                _move_tile(task, block, target, row, column, image, images, True)

    return tile


@cache
def contraction(rows: int, columns: int, vectors: int) -> Any:
    """Compiled gradient of active weights; each share adds to its own ``results``, which the caller adds up."""
    size = rows * columns * vectors * LANES

    @compiled(rows, columns, vectors)
    def tile(address, share, source, row, column, image, images, output_block, channel_block):  # type: ignore[no-untyped-def]
        task = carray(as_pointer(address), 1, TASK)[0]
        starts, entries = _lists(task)
        results = task.results + share * task.results_bytes
        row_pitch, column_pitch = task.phase_columns * task.tile_images, task.tile_images
        first = output_block * task.output_block
        # Gradients are read where they are, unless registers reach outside of the tile.
        if task.whole and _is_whole(task, row, column, images):
            place = first * task.target_plane + row * task.target_row + column * task.target_column + image
            tiles, tile_plane = task.target + 4 * place, task.target_plane
            tile_row, tile_column = task.target_row, task.target_column
        else:
            tiles, tile_plane = task.work + share * task.work_bytes + 4 * task.scratch_floats, size
            tile_row, tile_column = columns * vectors * LANES, vectors * LANES
            if channel_block == 0:
                last = min(first + task.output_block, task.outputs)
                clear(tiles, size * (last - first))  # numbers outside of the tile count as zero
                for output in range(first, last):
                    block = tiles + 4 * size * (output - first)
                    target = task.target + 4 * output * task.target_plane
                    _move_tile(task, block, target, row, column, image, images, False)
        number = output_block * task.channel_blocks + channel_block
        for e in range(starts[number], starts[number + 1]):
            later = entries[min(e + AHEAD, starts[number + 1] - 1), 0]
            contract(
                rows, columns, vectors, results, tiles + 4 * tile_plane * (entries[e, 0] - first),
                tiles + 4 * tile_plane * (later - first), tile_row, tile_column,
                source, row_pitch, column_pitch, task.offsets, entries[e, 1], entries[e, 2],
            )  # fmt: skip

    return tile
