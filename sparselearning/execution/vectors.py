"""SIMD primitives for the kernels, where a compiler's own vectorisation is not enough.

Numba turns each of them into a few lines of LLVM code. A vector is :data:`LANES` float32 numbers; a *block* is ``rows``
times ``columns`` times ``vectors`` of them, few enough to stay in registers while a list of active weights goes by.
Addresses are integers and count bytes; offsets, pitches and counts are in float32 numbers.
"""

import hashlib
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 8  # vectors of a block, at most: with what else they need, so many fit the 16 registers of AVX2


LANES = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
"""Float32 numbers in the widest vector register that PyTorch uses on this processor."""

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
RUNS = sorted({LANES, 4}, reverse=True)
"""How many numbers are copied at a time: many as long as there are so many, then a few, then one."""

PROCESSOR = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()} {LANES}"
HERE = hashlib.blake2b(PROCESSOR.encode() + Path(__file__).read_bytes(), digest_size=6).hexdigest()
"""Digest of this processor, the width of the registers, and the primitives in this file."""


LEAST_STREAMED = 1 << 21
"""Float32 numbers of the smallest tensor that is written past the caches, which would not hold it until it is read."""


def is_streamed(numbers: int, address: int) -> bool:
    """Whether so many float32 numbers that begin at an address are to be written past the caches, and can be."""
    return numbers >= LEAST_STREAMED and address % (4 * LANES) == 0


def compiled(*version: int, **options: Any) -> Callable[[Callable], Any]:
    """Decorator that compiles a C function of addresses and counts, and caches it in files of its own.

    Numba keeps one index for all versions of a function, and does not lock it: processes that compile at the same time
    can mix its entries up, and load another version than they ask for, for good. Nor does it notice when this file
    changes. So each version, processor and content of this file has a name of its own.

    Args:
        version: numbers that the function is compiled for.
        options: of ``numba.cfunc``.
    """

    def compile(function: Callable) -> Any:
        count = len(signature(function).parameters)
        function.__qualname__ = "_".join([function.__qualname__.partition(".")[0], *map(str, version), HERE])
        return cfunc(types.void(*[types.int64] * count), cache=True, **options)(function)

    return compile


class _Code:
    """The few LLVM instructions that the primitives are made of."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def at(self, address: ir.Value, floats: Any) -> ir.Value:
        floats = INT64(floats) if isinstance(floats, int) else floats
        return self.builder.add(address, self.builder.mul(floats, INT64(4)))

    def load(self, kind: ir.Type, address: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=4)

    def stream(self, value: ir.Value, address: ir.Value) -> None:
        """Store a vector past the caches, to an address that is a multiple of its size."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        store = self.builder.store(value, pointer, align=4 * value.type.count)
        store.set_metadata("nontemporal", self.builder.module.add_metadata([INT32(1)]))

    def prefetch(self, address: ir.Value) -> None:
        """Ask for the cache line at an address, which need not be there yet when the next instructions run."""
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), INT32, INT32, INT32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        self.builder.call(function, [pointer, INT32(0), INT32(3), INT32(1)])  # to read, into all caches, data

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes)))

    def splat(self, value: ir.Value) -> ir.Value:
        single = self.builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, INT32(0))
        return self.shuffle(single, single, [0] * LANES)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a · b + c``, rounded once."""
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c]
        )

    def either(
        self, condition: ir.Value, yes: Callable[[], Sequence[ir.Value]], no: Callable[[], Sequence[ir.Value]]
    ) -> list[ir.Value]:
        """``yes()`` if a condition holds, and else ``no()``: as many values of the same types."""
        ends = []
        with self.builder.if_else(condition) as branches:
            for branch, make in zip(branches, (yes, no), strict=True):
                with branch:
                    ends.append((make(), self.builder.block))
        results = [self.builder.phi(value.type) for value in ends[0][0]]
        for values, block in ends:
            for result, value in zip(results, values, strict=True):
                result.add_incoming(value, block)
        return results

    def total(self, vector: ir.Value) -> ir.Value:
        """Sum of a vector's lanes, in halves."""
        while (lanes := vector.type.count) > 1:
            halves = (self.shuffle(vector, vector, range(begin, begin + lanes // 2)) for begin in (0, lanes // 2))
            vector = self.builder.fadd(*halves)
        return self.builder.extract_element(vector, INT32(0))

    def totals(self, a: ir.Value, b: ir.Value, c: ir.Value, d: ir.Value) -> ir.Value:
        """Sums of the lanes of four vectors, as a vector of four: half the work of four times :meth:`total`."""
        even, odd = range(0, LANES, 2), range(1, LANES, 2)
        pairs = []
        for x, y in ((a, b), (c, d)):
            first, second = ([lane for i in half for lane in (i, i + LANES)] for half in (even, odd))
            pairs.append(self.builder.fadd(self.shuffle(x, y, first), self.shuffle(x, y, second)))
        of_ab, of_cd = pairs
        first, second = (
            [lane for i in range(begin, LANES, 4) for lane in (i, i + 1, i + LANES, i + 1 + LANES)] for begin in (0, 2)
        )
        vector = self.builder.fadd(self.shuffle(of_ab, of_cd, first), self.shuffle(of_ab, of_cd, second))
        while (lanes := vector.type.count) > 4:
            halves = (self.shuffle(vector, vector, range(begin, begin + lanes // 2)) for begin in (0, lanes // 2))
            vector = self.builder.fadd(*halves)
        return vector

    def loop(
        self, begin: ir.Value, end: ir.Value, step: int, carried: Sequence[ir.Value], body: Callable
    ) -> tuple[ir.Value, list[ir.Value]]:
        """``for j in range(begin, end - step + 1, step)``: ``body(j, carried) -> carried``.

        Returns:
            The first j that was not done, and what is carried out.
        """
        builder = self.builder
        before = builder.block
        inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
        last = builder.sub(end, INT64(step))
        builder.cbranch(builder.icmp_signed("<=", begin, last), inside, after)
        builder.position_at_end(inside)
        j = builder.phi(INT64)
        values = [builder.phi(value.type) for value in carried]
        news = body(j, values)
        following = builder.add(j, INT64(step))
        builder.cbranch(builder.icmp_signed("<=", following, last), inside, after)
        for phi, start, new in zip([j, *values], [begin, *carried], [following, *news], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(new, inside)
        builder.position_at_end(after)
        results = [builder.phi(value.type) for value in (j, *carried)]
        for phi, start, new in zip(results, [begin, *carried], [following, *news], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(new, inside)
        return results[0], results[1:]


class _Block:
    """Registers for ``rows`` times ``columns`` segments of ``vectors`` each, and where they lie in some memory."""

    def __init__(self, code: _Code, *shape: Any) -> None:
        self.code = code
        self.rows, self.columns, self.vectors = (size.literal_value for size in shape)

    def distances(self, row: ir.Value, column: ir.Value) -> list[ir.Value]:
        """Bytes from the first segment to each one, where rows and columns lie so many numbers apart."""
        at, zero = self.code.at, INT64(0)
        mul = self.code.builder.mul
        rows = [at(zero, mul(row, INT64(r))) if r else zero for r in range(self.rows)]
        return [at(start, mul(column, INT64(c))) if c else start for start in rows for c in range(self.columns)]

    def places(self, base: ir.Value, distances: Sequence[ir.Value]) -> list[ir.Value]:
        """Address of every vector."""
        segments = [self.code.builder.add(base, distance) for distance in distances]
        return [self.code.at(segment, v * LANES) for segment in segments for v in range(self.vectors)]

    def packed(self, base: ir.Value) -> list[ir.Value]:
        """The same where all lie one behind the other."""
        return [self.code.at(base, i * LANES) for i in range(self.rows * self.columns * self.vectors)]


@intrinsic(prefer_literal=True)
def accumulate(  # type: ignore[no-untyped-def]
    typing_context, rows, columns, vectors, block, fresh, start,
    source, row_pitch, column_pitch, values, offsets, begin, end,
    added, gate, ahead, lowest, target, target_row, target_column, streams,
):  # fmt: skip
    """Add weighted inputs to a block of sums: ``block += Σ_j values[j] · source[offsets[j] + …]``, j from begin to end.

    The block starts as ``start`` in all lanes, plus, unless ``fresh``, the numbers at ``block``. In the end those at
    ``added`` are added, sums below ``lowest`` become that, and those where the number at ``gate`` is zero or less
    become zero; 0 in place of an address: none. What lies ``ahead`` bytes after ``added`` and ``gate`` is to be read
    soon. The block is written to ``target`` or, if that is 0, back to ``block``; with ``streams`` past the caches. Rows
    and columns at ``added``, ``gate`` and ``target`` lie ``target_row`` and ``target_column`` numbers apart.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, _, block, fresh, start, source, row_pitch, column_pitch, values, offsets, *others = args
        begin, end, added, gate, ahead, lowest, target, target_row, target_column, streams = others
        code = _Code(builder)
        registers = _Block(code, rows, columns, vectors)
        homes = registers.packed(block)
        begins = code.splat(start)
        sums = code.either(
            builder.icmp_signed("!=", fresh, INT64(0)),
            lambda: [begins] * len(homes),
            lambda: [builder.fadd(begins, code.load(VECTOR, home)) for home in homes],
        )
        distances = registers.distances(row_pitch, column_pitch)
        in_target = registers.distances(target_row, target_column)
        has_added, has_gate = (builder.icmp_signed("!=", address, INT64(0)) for address in (added, gate))
        for is_there, address in ((has_added, added), (has_gate, gate)):
            with builder.if_then(is_there):
                for place in registers.places(builder.add(address, ahead), in_target):
                    code.prefetch(place)

        def body(j: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            weight = code.splat(code.load(FLOAT, code.at(values, j)))
            base = code.at(source, builder.sext(code.load(INT32, code.at(offsets, j)), INT64))
            inputs = [code.load(VECTOR, place) for place in registers.places(base, distances)]
            return [code.fma(weight, x, total) for x, total in zip(inputs, sums, strict=True)]

        _, sums = code.loop(begin, end, 1, sums, body)

        def with_added() -> list[ir.Value]:
            terms = [code.load(VECTOR, place) for place in registers.places(added, in_target)]
            return [builder.fadd(total, term) for total, term in zip(sums, terms, strict=True)]

        totals = code.either(has_added, with_added, lambda: sums)
        least = code.splat(lowest)
        totals = [builder.select(builder.fcmp_ordered("<", total, least), least, total) for total in totals]

        def through_gate() -> list[ir.Value]:
            zero = code.splat(FLOAT(0.0))
            shut = [builder.fcmp_ordered("<=", code.load(VECTOR, x), zero) for x in registers.places(gate, in_target)]
            return [builder.select(is_shut, zero, total) for is_shut, total in zip(shut, totals, strict=True)]

        sums = code.either(has_gate, through_gate, lambda: totals)
        with builder.if_else(builder.icmp_signed("!=", target, INT64(0))) as (outside, back):
            with outside:
                places = registers.places(target, in_target)
                with builder.if_else(builder.icmp_signed("!=", streams, INT64(0))) as (past_caches, through_caches):
                    for branch, store in ((past_caches, code.stream), (through_caches, code.store)):
                        with branch:
                            for place, total in zip(places, sums, strict=True):
                                store(total, place)
            with back:
                for place, total in zip(homes, sums, strict=True):
                    code.store(total, place)
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(rows, columns, vectors, i64, i64, f32, *[i64] * 10, f32, *[i64] * 4), generate


@intrinsic(prefer_literal=True)
def contract(  # type: ignore[no-untyped-def]
    typing_context, rows, columns, vectors, results, block, ahead, block_row, block_column,
    source, row_pitch, column_pitch, offsets, begin, end,
):  # fmt: skip
    """Multiply a block with the inputs of each weight: ``results[j] += Σ block · source[offsets[j] + …]``.

    The block's rows and columns, and those at ``ahead``, which are to be read soon, lie ``block_row`` and
    ``block_column`` numbers apart.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, _, results, block, ahead, block_row, block_column, source, row_pitch, column_pitch, *others = args
        offsets, begin, end = others
        code = _Code(builder)
        registers = _Block(code, rows, columns, vectors)
        in_block = registers.distances(block_row, block_column)
        factors = [code.load(VECTOR, place) for place in registers.places(block, in_block)]
        for place in registers.places(ahead, in_block):
            code.prefetch(place)
        distances = registers.distances(row_pitch, column_pitch)

        def product(j: ir.Value) -> ir.Value:
            base = code.at(source, builder.sext(code.load(INT32, code.at(offsets, j)), INT64))
            inputs = [code.load(VECTOR, place) for place in registers.places(base, distances)]
            total = builder.fmul(factors[0], inputs[0])
            for factor, x in zip(factors[1:], inputs[1:], strict=True):
                total = code.fma(factor, x, total)
            return total

        def four(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            place = code.at(results, j)
            sums = code.totals(*(product(builder.add(j, INT64(i))) for i in range(4)))
            code.store(builder.fadd(code.load(sums.type, place), sums), place)
            return []

        def one(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            place = code.at(results, j)
            code.store(builder.fadd(code.load(FLOAT, place), code.total(product(j))), place)
            return []

        rest, _ = code.loop(begin, end, 4, [], four)
        code.loop(rest, end, 1, [], one)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, columns, vectors, *[i64] * 11), generate


@intrinsic
def _copy(typing_context, target, source, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` float32 numbers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, source, count = args
        code = _Code(builder)

        def move(kind: ir.Type) -> Callable:
            def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                code.store(code.load(kind, code.at(source, i)), code.at(target, i))
                return []

            return body

        rest = INT64(0)
        for lanes in RUNS:
            rest, _ = code.loop(rest, count, lanes, [], move(ir.VectorType(FLOAT, lanes)))
        code.loop(rest, count, 1, [], move(FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _stream(typing_context, target, source, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` float32 numbers, whole vectors, past the caches."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, source, count = args
        code = _Code(builder)

        def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.stream(code.load(VECTOR, code.at(source, i)), code.at(target, i))
            return []

        code.loop(INT64(0), count, LANES, [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _copy_every(typing_context, target, source, step, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` float32 numbers that lie ``step`` numbers apart."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, source, step, count = args
        code = _Code(builder)

        def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            code.store(code.load(FLOAT, code.at(source, builder.mul(i, step))), code.at(target, i))
            return []

        code.loop(INT64(0), count, 1, [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _clear(typing_context, target, count):  # type: ignore[no-untyped-def]
    """Set ``count`` float32 numbers to zero."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        target, count = args
        code = _Code(builder)

        def set_to(zero: ir.Value) -> Callable:
            def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                code.store(zero, code.at(target, i))
                return []

            return body

        rest = INT64(0)
        for lanes in RUNS:
            rest, _ = code.loop(rest, count, lanes, [], set_to(ir.Constant(ir.VectorType(FLOAT, lanes), [0.0] * lanes)))
        code.loop(rest, count, 1, [], set_to(FLOAT(0.0)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_and_add(typing_context, address, amount):  # type: ignore[no-untyped-def]
    """Add to the int64 at an address, atomically; return what stood there before."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], INT64.as_pointer()), args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def finish_streams(typing_context):  # type: ignore[no-untyped-def]
    """Let other threads see what was written past the caches."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(typing_context, function, *numbers):  # type: ignore[no-untyped-def]
    """Call the compiled function at an address with so many integers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        function, packed = args
        kind = ir.FunctionType(ir.VoidType(), [INT64] * len(numbers))
        builder.call(builder.inttoptr(function, kind.as_pointer()), cgutils.unpack_tuple(builder, packed))
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple([types.int64] * len(numbers))), generate


@intrinsic
def number_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The float32 number at an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _Code(builder).load(FLOAT, args[0])

    return types.float32(types.int64), generate


@intrinsic
def as_pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """The address as a pointer, for ``numba.carray``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@njit
def copy(target, source, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` numbers."""
    _copy(target, source, count)


@njit
def stream(target, source, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` numbers past the caches: whole vectors, to where addresses are multiples of their size."""
    _stream(target, source, count)


@njit
def copy_every(target, source, step, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` numbers that lie ``step`` numbers apart."""
    _copy_every(target, source, step, count)


@njit
def clear(target, count):  # type: ignore[no-untyped-def]
    """Set ``count`` numbers to zero."""
    _clear(target, count)
