"""BatchNorm and ReLU where activations lie in memory as [channel, row, column, image]: a channel is a line of numbers.

Statistics are taken in one pass; a second one normalises, adds what is to be added, and does the ReLU. Backward, the
passes of ReLU and BatchNorm are the same ones, too.
"""

import numpy as np
from numba import carray, njit

from sparselearning.execution.vectors import as_pointer, compiled, fetch_and_add, finish_streams, stream

PLANES = np.dtype(
    [
        (name, np.int64)
        for name in (
            "next_share", "shares", "channels", "numbers", "inputs", "outputs", "gradients",
            "mean", "variance", "scale", "shift", "gradient_scale", "gradient_shift", "added", "relu", "uses_batch",
            "streams", "work",
        )
    ]
)  # fmt: skip
"""What a kernel is told: addresses of float32 [channels, numbers] (``inputs``, ``outputs``, ``gradients``, ``added``)
and [channels], counts and switches. ``scale`` and ``shift`` are what an input is multiplied with, and what is added.
``streams``: outputs are written past the caches, by way of ``work``, :data:`CHUNK` numbers for each share."""

CHUNK = 2048  # numbers summed up in float32, whose sums are then added in float64; or written at a time


@njit(inline="always")
def _line(address, channel, numbers):  # type: ignore[no-untyped-def]
    return carray(as_pointer(address + 4 * channel * numbers), numbers, np.float32)


@njit(inline="always")
def _block(address, begin, numbers):  # type: ignore[no-untyped-def]
    return carray(as_pointer(address + 4 * begin), min(CHUNK, numbers - begin), np.float32)


@njit(inline="always")
def _each(address, channels):  # type: ignore[no-untyped-def]
    return carray(as_pointer(address), channels, np.float32)


@njit
def _channels(address, task):  # type: ignore[no-untyped-def]
    """The channels of one share of the work after the other, until none is left, and the share's memory to work in."""
    while True:
        share = fetch_and_add(address, 1)
        if share >= task.shares:
            break
        for c in range(share * task.channels // task.shares, (share + 1) * task.channels // task.shares):
            yield c, task.work + 4 * CHUNK * share


@njit(inline="always")
def _moments(x):  # type: ignore[no-untyped-def]
    """Mean and biased variance of a line."""
    first = x[0]
    total = squares = 0.0
    for begin in range(0, len(x), CHUNK):
        block = x[begin : begin + CHUNK]
        a = b = np.float32(0)
        for i in range(len(block)):
            difference = block[i] - first
            a += difference
            b += difference * difference
        total += a
        squares += b
    mean = total / len(x)
    return first + mean, max(squares / len(x) - mean * mean, 0.0)


@compiled(fastmath=True)
def statistics(address):  # type: ignore[no-untyped-def]
    """Mean and biased variance of every channel."""
    task = carray(as_pointer(address), 1, PLANES)[0]
    mean, variance = _each(task.mean, task.channels), _each(task.variance, task.channels)
    for c, _ in _channels(address, task):
        mean[c], variance[c] = _moments(_line(task.inputs, c, task.numbers))


@njit(inline="always")
def _scaled(x, y, scale, shift, lowest):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        y[i] = max(x[i] * scale + shift, lowest)


@njit(inline="always")
def _scaled_sum(x, added, y, scale, shift, lowest):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        y[i] = max(x[i] * scale + shift + added[i], lowest)


@compiled(fastmath=True)
def normalise(address):  # type: ignore[no-untyped-def]
    """``outputs = inputs · scale + shift``, then whatever is ``added``, and ReLU."""
    task = carray(as_pointer(address), 1, PLANES)[0]
    numbers, streams = task.numbers, task.streams != 0
    scale, shift = _each(task.scale, task.channels), _each(task.shift, task.channels)
    lowest = np.float32(0) if task.relu != 0 else np.float32(-np.inf)
    for c, work in _channels(address, task):
        place = 4 * c * numbers
        for begin in range(0, numbers, CHUNK):
            x = _block(task.inputs + place, begin, numbers)
            y = _block(work - 4 * begin if streams else task.outputs + place, begin, numbers)
            if task.added != 0:
                _scaled_sum(x, _block(task.added + place, begin, numbers), y, scale[c], shift[c], lowest)
            else:
                _scaled(x, y, scale[c], shift[c], lowest)
            if streams:
                stream(task.outputs + place + 4 * begin, work, len(x))
    finish_streams()


@njit(inline="always")
def _through_relu(gradient, output, relu):  # type: ignore[no-untyped-def]
    return gradient if not relu or output > 0 else np.float32(0)


@njit(inline="always")
def _products(x, g, mean, scale, shift, relu):  # type: ignore[no-untyped-def]
    """Sums of the gradients that come through ReLU, and of their products with the centred inputs."""
    total = products = 0.0
    for begin in range(0, len(x), CHUNK):
        block, gradients = x[begin : begin + CHUNK], g[begin : begin + CHUNK]
        a = b = np.float32(0)
        for i in range(len(block)):
            gradient = _through_relu(gradients[i], block[i] * scale + shift, relu)
            a += gradient
            b += gradient * (block[i] - mean)
        total += a
        products += b
    return total, products


@njit(inline="always")
def _through(x, g, y, scale, shift, relu, slope, offset):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        gradient = _through_relu(g[i], x[i] * scale + shift, relu)
        y[i] = gradient * scale + x[i] * slope + offset


@compiled(fastmath=True)
def backward(address):  # type: ignore[no-untyped-def]
    """Gradients with respect to inputs (in ``outputs``), weight (without its division by the deviation) and bias."""
    task = carray(as_pointer(address), 1, PLANES)[0]
    scale, shift = _each(task.scale, task.channels), _each(task.shift, task.channels)
    mean = _each(task.mean, task.channels)
    variance = _each(task.variance, task.channels)
    for_scale, for_shift = _each(task.gradient_scale, task.channels), _each(task.gradient_shift, task.channels)
    relu = task.relu != 0
    numbers, streams = task.numbers, task.streams != 0
    for c, work in _channels(address, task):
        x, g = _line(task.inputs, c, numbers), _line(task.gradients, c, numbers)
        total, products = _products(x, g, mean[c], scale[c], shift[c], relu)
        for_shift[c], for_scale[c] = total, products
        if task.outputs != 0:
            slope = offset = 0.0
            if task.uses_batch != 0:  # mean and variance depend on the inputs, too; variance holds 1 / (σ² + ε)
                slope = -scale[c] * variance[c] * products / numbers
                offset = -scale[c] * total / numbers - slope * mean[c]
            outputs = task.outputs + 4 * c * numbers
            for begin in range(0, numbers, CHUNK):
                y = _block(work - 4 * begin if streams else outputs, begin, numbers)
                block, gradients = x[begin : begin + CHUNK], g[begin : begin + CHUNK]
                _through(block, gradients, y, scale[c], shift[c], relu, np.float32(slope), np.float32(offset))
                if streams:
                    stream(outputs + 4 * begin, work, len(y))
    finish_streams()
