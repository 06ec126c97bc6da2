"""Inner loops for Numba functions that are written in vectors: its vectoriser keeps no sums in registers.

Design: each is an intrinsic, a function that writes the compiler's intermediate code: vectors of 512 bits, which a
machine with shorter registers sees as several. Sums stand in registers from the first term to the last, in one order,
with fused multiply-adds that are asked for by name: results do not depend on what the compiler makes of the code
around. Offsets are counted in elements; nothing is checked.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

__all__ = [
    "ROWS",
    "VECTORS",
    "add_rows",
    "add_tile",
    "cloud_group",
    "copy_row",
    "dot_row",
    "label_group",
    "multiply_row",
    "set_tile",
    "set_tiles",
    "set_upper_tile",
    "solve_rows",
    "subtract_tiles",
    "width_of",
]

# Called without the typing context, which is no argument to a reader of types.
intrinsic: Any = extending.intrinsic

ROWS = 4
"""Rows of a tile of `add_tile`."""
VECTORS = 4
"""Vectors next to each other in a tile, at most: 16 sums stand in registers, which hides the latency of an addition."""
TOGETHER = 4
"""Directions of a cloud whose products with as many others are summed at the same time, in registers."""
BITS = 512


def width_of(bits: int) -> int:
    """Numbers of so many bits in a vector."""
    return BITS // bits


class _Vectors:
    """Vectors of one floating-point type in a function that is being built."""

    def __init__(self, builder: Any, scalar: Any) -> None:
        self.builder, self.scalar = builder, scalar
        self.bits = 32 if isinstance(scalar, ir.FloatType) else 64
        self.width = width_of(self.bits)
        self.type = ir.VectorType(scalar, self.width)
        self._suffix = f"v{self.width}f{self.bits}"

    def _call(self, name: str, *values: Any) -> Any:
        kind = ir.FunctionType(self.type, [self.type] * len(values))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.{self._suffix}")
        return self.builder.call(function, values)

    def add_product(self, total: Any, a: Any, b: Any) -> Any:
        """Total + a b, rounded once."""
        return self._call("fma", a, b, total)

    def root(self, a: Any) -> Any:
        """Square root."""
        return self._call("sqrt", a)

    def all_of(self, value: Any) -> Any:
        """A vector of one number."""
        if value.type != self.scalar:
            value = self.builder.fpext(value, self.scalar)
        one = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), value, ir.IntType(32)(0))
        nowhere = ir.Constant(ir.VectorType(ir.IntType(32), self.width), [0] * self.width)
        return self.builder.shuffle_vector(one, ir.Constant(self.type, ir.Undefined), nowhere)

    def constant(self, value: float) -> Any:
        """A vector of one constant."""
        return ir.Constant(self.type, [value] * self.width)

    def sum_of(self, value: Any) -> Any:
        """Sum of the numbers of a vector: halves are added until one number is left."""
        width = self.width
        while width > 1:
            width //= 2
            place = ir.VectorType(ir.IntType(32), self.width)
            upper = ir.Constant(place, [(k + width) % self.width for k in range(self.width)])
            value = self.builder.fadd(value, self.builder.shuffle_vector(value, value, upper))
        return self.builder.extract_element(value, ir.IntType(32)(0))

    def load(self, pointer: Any) -> Any:
        """The vector that begins at a number."""
        place = self.builder.bitcast(pointer, self.type.as_pointer())
        return self.builder.load(place, align=self.bits // 8)

    def store(self, value: Any, pointer: Any) -> None:
        """Put a vector where a number is."""
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=self.bits // 8)

    def variable(self, value: Any) -> Any:
        """A register that changes in a loop."""
        place = cgutils.alloca_once(self.builder, self.type)
        self.builder.store(value, place)
        return place


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.make_array(kind)(context, builder, value).data


def _at(builder: Any, index: Any, base: Any, start: Any, *steps: tuple[Any, Any]) -> Any:
    """Pointer to number start + Σ stride · count behind a pointer."""
    for stride, count in steps:
        start = builder.add(start, builder.mul(stride, index(count) if isinstance(count, int) else count))
    return builder.gep(base, [start])


def _sums(  # type: ignore[no-untyped-def]
    builder, vectors, index, count, rows, hop, begin, stride, n, ends, *, fresh, less=False, skipped=0
):
    """Code that adds to, or subtracts from, numbers at `ends` (rows, `count` vectors) the sums of n products.

    Of the first terms, as many as `skipped`, row r has those from r on.
    """
    totals = [
        [vectors.variable(vectors.constant(0.0) if fresh else vectors.load(end)) for end in row]
        for row in ends
    ]

    def add(term: Any, which: slice) -> None:
        line = builder.gep(begin, [builder.mul(term, stride)])
        parts = [vectors.load(builder.gep(line, [index(v * vectors.width)])) for v in range(count)]
        along = builder.mul(term, hop)
        for row, total in zip(rows[which], totals[which], strict=True):
            factor = builder.load(builder.gep(row, [along]))
            factor = vectors.all_of(builder.fneg(factor) if less else factor)
            for part, register in zip(parts, total, strict=True):
                builder.store(vectors.add_product(builder.load(register), factor, part), register)

    for term in range(skipped):
        add(index(term), slice(term + 1))
    with cgutils.for_range_slice(builder, index(skipped), n, index(1), intp=index) as (term, _):
        add(term, slice(None))
    for row, total in zip(ends, totals, strict=True):
        for end, register in zip(row, total, strict=True):
            vectors.store(builder.load(register), end)


def _tile(  # type: ignore[no-untyped-def]
    a, first, step, b, start, stride, n, out, place, far, hop, count, *, fresh, upper=False
):
    """Signature and code of `add_tile`, of `set_tile`, whose sums begin at nothing, or of `set_upper_tile`."""
    i = types.intp
    signature = types.void(a, i, i, b, i, i, i, out, i, i, i, i)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        factors, terms, sums = (_data(context, builder, kinds[k], args[k]) for k in (0, 3, 7))
        _, first, step, _, start, stride, n, _, place, far, hop, count = args
        vectors = _Vectors(builder, context.get_data_type(kinds[3].dtype))
        index = context.get_value_type(types.intp)
        rows = [_at(builder, index, factors, first, (step, r)) for r in range(ROWS)]
        begin = builder.gep(terms, [start])
        for size in range(1, VECTORS + 1):
            with builder.if_then(builder.icmp_signed("==", count, index(size))):
                ends = [
                    [_at(builder, index, sums, place, (far, r), (hop, v)) for v in range(size)]
                    for r in range(ROWS)
                ]
                terms_of_tile = rows, index(1), begin, stride, n, ends
                if not upper:
                    _sums(builder, vectors, index, size, *terms_of_tile, fresh=fresh)
                    continue
                all_there = builder.icmp_signed(">=", n, index(ROWS - 1))
                with builder.if_else(all_there) as (then, otherwise):
                    with then:
                        _sums(builder, vectors, index, size, *terms_of_tile, fresh=fresh, skipped=ROWS - 1)
                    with otherwise:
                        _sums(builder, vectors, index, size, *terms_of_tile, fresh=fresh)
        return context.get_dummy_value()

    return signature, write


@intrinsic
def add_tile(typingctx, a, first, step, b, start, stride, n, out, place, far, hop, count):  # type: ignore[no-untyped-def]
    """Out[place + r far + v hop + l] += Σ_c a[first + r step + c] b[start + c stride + v L + l].

    For r < 4, c < n, v < count ≤ 4, and l < L, the width of a vector.
    """
    return _tile(a, first, step, b, start, stride, n, out, place, far, hop, count, fresh=False)


@intrinsic
def set_tile(typingctx, a, first, step, b, start, stride, n, out, place, far, hop, count):  # type: ignore[no-untyped-def]
    """Out[place + r far + v hop + l] = Σ_c a[first + r step + c] b[start + c stride + v L + l]; see `add_tile`."""
    return _tile(a, first, step, b, start, stride, n, out, place, far, hop, count, fresh=True)


@intrinsic
def set_upper_tile(  # type: ignore[no-untyped-def]
    typingctx, a, first, step, b, start, stride, n, out, place, far, hop, count
):
    """As `set_tile`, of a whose numbers r step + c with c < r are zero: they are not multiplied with."""
    return _tile(a, first, step, b, start, stride, n, out, place, far, hop, count, fresh=True, upper=True)


def _tiles(  # type: ignore[no-untyped-def]
    a, first, step, hop, b, start, stride, n, out, place, far, count, *, fresh, less
):
    """Signature and code of `subtract_tiles`, or of `set_tiles`, whose sums begin at nothing."""
    i = types.intp
    signature = types.void(a, i, i, i, b, i, i, i, out, i, i, i)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        factors, terms, sums = (_data(context, builder, kinds[k], args[k]) for k in (0, 4, 8))
        _, first, step, hop, _, start, stride, n, _, place, far, count = args
        vectors = _Vectors(builder, context.get_data_type(kinds[4].dtype))
        index = context.get_value_type(types.intp)
        rows = [_at(builder, index, factors, first, (step, r)) for r in range(ROWS)]

        def sum_tile(begin: Any, size: int) -> None:
            begin = builder.mul(begin, index(vectors.width))
            terms_of_tile = _at(builder, index, terms, start, (begin, 1))
            to = builder.add(place, begin)
            ends = [
                [_at(builder, index, sums, to, (far, r), (index(vectors.width), v)) for v in range(size)]
                for r in range(ROWS)
            ]
            _sums(
                builder, vectors, index, size, rows, hop, terms_of_tile, stride, n, ends, fresh=fresh, less=less,
            )  # fmt: skip

        tiles = builder.sdiv(count, index(VECTORS))
        with cgutils.for_range(builder, tiles, intp=index) as loop:
            sum_tile(builder.mul(loop.index, index(VECTORS)), VECTORS)
        done = builder.mul(tiles, index(VECTORS))
        for size in range(1, VECTORS):
            with builder.if_then(builder.icmp_signed("==", builder.sub(count, done), index(size))):
                sum_tile(done, size)
        return context.get_dummy_value()

    return signature, write


@intrinsic
def subtract_tiles(  # type: ignore[no-untyped-def]
    typingctx, a, first, step, hop, b, start, stride, n, out, place, far, count
):
    """Out[place + r far + l] −= Σ_c a[first + r step + c hop] b[start + c stride + l] for r < 4, c < n, l < count L.

    L is the width of a vector, and `count` any number of them. The three may be one array, whose rows of sums are none
    of the rows that are added.
    """
    return _tiles(a, first, step, hop, b, start, stride, n, out, place, far, count, fresh=False, less=True)


@intrinsic
def set_tiles(  # type: ignore[no-untyped-def]
    typingctx, a, first, step, hop, b, start, stride, n, out, place, far, count
):
    """Out[place + r far + l] = Σ_c a[first + r step + c hop] b[start + c stride + l]; see `subtract_tiles`."""
    return _tiles(a, first, step, hop, b, start, stride, n, out, place, far, count, fresh=True, less=False)


@intrinsic
def add_rows(typingctx, a, first, b, second, out, place, count):  # type: ignore[no-untyped-def]
    """Out[place + l] = a[first + l] + b[second + l] for l < count L, with L the width of a vector."""
    i = types.intp
    signature = types.void(a, i, b, i, out, i, i)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        vectors = _Vectors(builder, context.get_data_type(kinds[0].dtype))
        index = context.get_value_type(types.intp)
        one, other, end = (
            builder.gep(_data(context, builder, kinds[k], args[k]), [args[k + 1]]) for k in (0, 2, 4)
        )
        with cgutils.for_range(builder, args[6], intp=index) as loop:
            here = [builder.mul(loop.index, index(vectors.width))]
            total = builder.fadd(vectors.load(builder.gep(one, here)), vectors.load(builder.gep(other, here)))
            vectors.store(total, builder.gep(end, here))
        return context.get_dummy_value()

    return signature, write


@intrinsic
def copy_row(typingctx, a, first, out, place, count):  # type: ignore[no-untyped-def]
    """Out[place + l] = a[first + l] for l < count L, with L the width of a vector."""
    i = types.intp
    signature = types.void(a, i, out, i, i)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        vectors = _Vectors(builder, context.get_data_type(kinds[0].dtype))
        index = context.get_value_type(types.intp)
        begin, end = (builder.gep(_data(context, builder, kinds[k], args[k]), [args[k + 1]]) for k in (0, 2))
        with cgutils.for_range(builder, args[4], intp=index) as loop:
            here = [builder.mul(loop.index, index(vectors.width))]
            vectors.store(vectors.load(builder.gep(begin, here)), builder.gep(end, here))
        return context.get_dummy_value()

    return signature, write


@intrinsic
def multiply_row(typingctx, a, first, x, second, out, place, factor, count):  # type: ignore[no-untyped-def]
    """Out[place + l] += factor a[first + l], and return Σ_l a[first + l] x[second + l], for l < count L."""
    i = types.intp
    signature = a.dtype(a, i, x, i, out, i, a.dtype, i)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        vectors = _Vectors(builder, context.get_data_type(kinds[0].dtype))
        index = context.get_value_type(types.intp)
        row, other, end = (
            builder.gep(_data(context, builder, kinds[k], args[k]), [args[k + 1]]) for k in (0, 2, 4)
        )
        factor = vectors.all_of(args[6])
        register = vectors.variable(vectors.constant(0.0))
        with cgutils.for_range(builder, args[7], intp=index) as loop:
            here = [builder.mul(loop.index, index(vectors.width))]
            value, to = vectors.load(builder.gep(row, here)), builder.gep(end, here)
            vectors.store(vectors.add_product(vectors.load(to), factor, value), to)
            total = vectors.add_product(builder.load(register), value, vectors.load(builder.gep(other, here)))
            builder.store(total, register)
        return vectors.sum_of(builder.load(register))

    return signature, write


@intrinsic
def dot_row(typingctx, a, first, x, second, count):  # type: ignore[no-untyped-def]
    """Σ_l a[first + l] x[second + l] for l < count L, with L the width of a vector."""
    i = types.intp
    signature = a.dtype(a, i, x, i, i)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        vectors = _Vectors(builder, context.get_data_type(kinds[0].dtype))
        index = context.get_value_type(types.intp)
        row, other = (builder.gep(_data(context, builder, kinds[k], args[k]), [args[k + 1]]) for k in (0, 2))
        register = vectors.variable(vectors.constant(0.0))
        with cgutils.for_range(builder, args[4], intp=index) as loop:
            here = [builder.mul(loop.index, index(vectors.width))]
            value = vectors.load(builder.gep(row, here))
            total = vectors.add_product(builder.load(register), value, vectors.load(builder.gep(other, here)))
            builder.store(total, register)
        return vectors.sum_of(builder.load(register))

    return signature, write


@intrinsic
def solve_rows(typingctx, a, place, far, count, inverses, factors):  # type: ignore[no-untyped-def]
    """Rows v₀ to v₃ of `count` vectors, `far` apart from `place` on: v_r ← (v_r − Σ_k<r l_kr v_k)/l_rr in that order.

    `inverses` are 1/l₀₀ to 1/l₃₃, and `factors` l₀₁, l₀₂, l₀₃, l₁₂, l₁₃, l₂₃.
    """
    signature = types.void(a, types.intp, types.intp, types.intp, inverses, factors)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        vectors = _Vectors(builder, context.get_data_type(kinds[0].dtype))
        index = context.get_value_type(types.intp)
        _, place, far, count, inverses, factors = args
        base = _data(context, builder, kinds[0], args[0])
        inverses = [vectors.all_of(value) for value in cgutils.unpack_tuple(builder, inverses)]
        less = [vectors.all_of(builder.fneg(value)) for value in cgutils.unpack_tuple(builder, factors)]
        of_pair = dict(zip(itertools.combinations(range(ROWS), 2), less, strict=True))
        rows = [_at(builder, index, base, place, (far, r)) for r in range(ROWS)]
        with cgutils.for_range(builder, count, intp=index) as loop:
            ends = [builder.gep(row, [builder.mul(loop.index, index(vectors.width))]) for row in rows]
            done: list[Any] = []
            for r, end in enumerate(ends):
                value = vectors.load(end)
                for k, before in enumerate(done):
                    value = vectors.add_product(value, of_pair[k, r], before)
                done.append(builder.fmul(value, inverses[r]))
                vectors.store(done[r], end)
        return context.get_dummy_value()

    return signature, write


@intrinsic
def cloud_group(  # type: ignore[no-untyped-def]
    typingctx,
    vectors,
    lane,
    stride,
    size,
    n,
    reach,
    n_drawn,
    star,
    centre,
    spectrum,
    width,
    panel,
    lower,
    inverse,
    coefficients,
    square,
    pivots,
):
    """Best points of a vector of clouds, with the star in whitened coordinates.

    With L the width of a vector, x_v[c] = vectors[(lane / L · (n_drawn + 1) + v) size + c], a vector each, for c < n
    and v < n_drawn, δ = x₀ − centre[star] and tangents x₁, …, which are zero from `reach` on, and width (δ +
    spectrum[star]), which the last of the vectors are scratch for, as x₀ is for δ:
    L of L Lᵀ = I + T Tᵀ, rows of its lower triangle one behind the other; 1/L_kk; γ = −(L Lᵀ)⁻¹ T δ;
    |δ + Tᵀγ|² + |γ|²; and L_kk². Vectors of all of these are `stride` numbers apart, and all but the last are put in
    their place of a panel. `n_drawn` = 1 + the number of tangents x₁, … is a tuple of so many numbers, since the code
    is written for it.
    """
    signature = types.void(
        vectors, types.intp, types.intp, types.intp, types.intp, types.intp, n_drawn, types.intp, centre, spectrum,
        width, types.intp, lower, inverse, coefficients, square, pivots,
    )  # fmt: skip
    drawn = len(n_drawn)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        drawn_data, of_centre, of_spectrum, lowers, inverses, gammas, squares, of_pivots = (
            _data(context, builder, kinds[k], args[k]) for k in (0, 8, 9, 12, 13, 14, 15, 16)
        )
        lane, stride, size, n, reach, star, panel = (args[k] for k in (1, 2, 3, 4, 5, 7, 11))
        v = _Vectors(builder, context.get_data_type(kinds[0].dtype))
        index = context.get_value_type(types.intp)
        broad = v.all_of(args[10])
        of_centre, of_spectrum = (
            builder.gep(base, [builder.mul(star, size)]) for base in (of_centre, of_spectrum)
        )
        t = drawn
        whole = builder.mul(size, index(v.width))
        of_lane = builder.sdiv(lane, index(v.width))
        starts = [
            _at(
                builder, index, drawn_data, index(0), (builder.mul(whole, index(drawn + 1)), of_lane), (whole, k)
            )
            for k in range(drawn + 1)
        ]  # fmt: skip

        def of_panel(base: Any, size: int) -> Any:
            return builder.gep(base, [builder.mul(panel, builder.mul(stride, index(size)))])

        lowers, squares = of_panel(lowers, t * (t + 1) // 2), of_panel(squares, 1)
        inverses, gammas = of_panel(inverses, t), of_panel(gammas, t)

        def at(base: Any, k: int) -> Any:
            return builder.gep(base, [builder.add(lane, builder.mul(stride, index(k)))])

        def place_of(k: int, place: Any) -> Any:
            return builder.gep(starts[k], [builder.mul(place, index(v.width))])

        def coordinate(k: int, place: Any) -> Any:
            """One of δ, the tangents, and the change with the scale, which is the last."""
            return v.load(place_of(k, place))

        def coordinates(place: Any, *, with_tangents: bool = True) -> list[Any]:
            return [coordinate(k, place) for k in range(t + 1) if with_tangents or k % t == 0]

        with cgutils.for_range(builder, n, intp=index) as loop:
            place = loop.index
            apart = builder.fsub(
                coordinate(0, place), v.all_of(builder.load(builder.gep(of_centre, [place])))
            )
            more = v.all_of(builder.load(builder.gep(of_spectrum, [place])))
            v.store(apart, place_of(0, place))
            v.store(builder.fmul(broad, builder.fadd(apart, more)), place_of(t, place))

        zero, one = v.constant(0.0), v.constant(1.0)
        products = {
            (a, b): v.variable(one if a == b else zero)
            for a in range(t + 1)
            for b in range(a, t + 1)
            if b > 0
        }
        # More sums than registers would be written to memory in every step: a few at a time.
        parts = [range(k, min(k + TOGETHER, t + 1)) for k in range(0, t + 1, TOGETHER)]
        for rows, columns in itertools.combinations_with_replacement(parts, 2):
            with cgutils.for_range(builder, reach, intp=index) as loop:
                x = {k: coordinate(k, loop.index) for k in sorted({*rows, *columns})}
                for a, b in itertools.product(rows, columns):
                    if (a, b) in products:
                        register = products[a, b]
                        builder.store(v.add_product(builder.load(register), x[a], x[b]), register)
        with cgutils.for_range_slice(builder, reach, n, index(1), intp=index) as (place, _):
            apart, scaled = coordinates(place, with_tangents=False)
            for (a, b), x in (((0, t), apart), ((t, t), scaled)):
                register = products[a, b]
                builder.store(v.add_product(builder.load(register), x, scaled), register)
        rho = [builder.fneg(builder.load(products[0, k + 1])) for k in range(t)]
        matrix = {(a, b): builder.load(products[b + 1, a + 1]) for a in range(t) for b in range(a + 1)}
        roots = []
        for k in range(t):
            v.store(matrix[k, k], at(of_pivots, k))
            roots.append(builder.fdiv(one, v.root(matrix[k, k])))
            rho[k] = builder.fmul(rho[k], roots[k])
            for i in range(k + 1, t):
                matrix[i, k] = builder.fmul(matrix[i, k], roots[k])
            for i in range(k + 1, t):
                less = builder.fneg(matrix[i, k])
                rho[i] = v.add_product(rho[i], less, rho[k])
                for j in range(k + 1, i + 1):
                    matrix[i, j] = v.add_product(matrix[i, j], less, matrix[j, k])
        for k in reversed(range(t)):
            for i in range(k + 1, t):
                rho[k] = v.add_product(rho[k], builder.fneg(matrix[i, k]), rho[i])
            rho[k] = builder.fmul(rho[k], roots[k])
        place = 0
        for a in range(t):
            v.store(roots[a], at(inverses, a))
            v.store(rho[a], at(gammas, a))
            for b in range(a + 1):
                v.store(matrix[a, b], at(lowers, place))
                place += 1
        total = zero
        for gamma in rho:
            total = v.add_product(total, gamma, gamma)
        register = v.variable(total)
        with cgutils.for_range(builder, reach, intp=index) as loop:
            residual, *tangents = coordinates(loop.index)
            for gamma, tangent in zip(rho, tangents, strict=True):
                residual = v.add_product(residual, gamma, tangent)
            builder.store(v.add_product(builder.load(register), residual, residual), register)
        with cgutils.for_range_slice(builder, reach, n, index(1), intp=index) as (place, _):
            residual, scaled = coordinates(place, with_tangents=False)
            residual = v.add_product(residual, rho[-1], scaled)
            builder.store(v.add_product(builder.load(register), residual, residual), register)
        v.store(builder.load(register), at(squares, 0))
        return context.get_dummy_value()

    return signature, write


@intrinsic
def label_group(  # type: ignore[no-untyped-def]
    typingctx,
    lane,
    stride,
    n_tangents,
    panel,
    lower,
    inverse,
    coefficients,
    place,
    gains,
    labels,
    mean,
    is_first,
    first,
    variance,
    along,
):
    """A label of a vector of clouds: mean + γᵀg, |L⁻¹g|², and L⁻¹g times that of the first label.

    `lower`, `inverse` and `coefficients` are L, 1/L_kk and γ of `cloud_group` in the place of a panel; gains, labels
    and means have a place of their own for each panel and label. `first` holds L⁻¹g of the first label, and is filled
    with it where this is the first. `n_tangents` is a tuple of so many numbers.
    """
    signature = types.void(
        types.intp, types.intp, n_tangents, types.intp, lower, inverse, coefficients, types.intp, gains, labels, mean,
        types.boolean, first, variance, along,
    )  # fmt: skip
    t = len(n_tangents)

    def write(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = signature.args
        lowers, inverses, gammas, of_gains, of_labels, means, firsts, variances, products = (
            _data(context, builder, kinds[k], args[k]) for k in (4, 5, 6, 8, 9, 10, 12, 13, 14)
        )
        lane, stride, panel, place, is_first = args[0], args[1], args[3], args[7], args[11]
        v = _Vectors(builder, context.get_data_type(kinds[4].dtype))
        index = context.get_value_type(types.intp)

        def placed(base: Any, which: Any, size: int) -> Any:
            return builder.gep(base, [builder.mul(which, builder.mul(stride, index(size)))])

        lowers, inverses, gammas = (
            placed(base, panel, size)
            for base, size in ((lowers, t * (t + 1) // 2), (inverses, t), (gammas, t))
        )
        of_gains, of_labels, means = (
            placed(of_gains, place, t),
            placed(of_labels, place, 1),
            placed(means, place, 1),
        )

        def at(base: Any, k: int) -> Any:
            return builder.gep(base, [builder.add(lane, builder.mul(stride, index(k)))])

        total, square, product = v.load(at(of_labels, 0)), v.constant(0.0), v.constant(0.0)
        solved: list[Any] = []
        for a in range(t):
            gain = v.load(at(of_gains, a))
            total = v.add_product(total, v.load(at(gammas, a)), gain)
            for b, other in enumerate(solved):
                gain = v.add_product(gain, builder.fneg(v.load(at(lowers, a * (a + 1) // 2 + b))), other)
            gain = builder.fmul(gain, v.load(at(inverses, a)))
            solved.append(gain)
            square = v.add_product(square, gain, gain)
        with builder.if_then(builder.trunc(is_first, ir.IntType(1))):
            for a, gain in enumerate(solved):
                v.store(gain, at(firsts, a))
        for a, gain in enumerate(solved):
            product = v.add_product(product, gain, v.load(at(firsts, a)))
        v.store(total, at(means, 0))
        v.store(square, at(variances, 0))
        v.store(product, at(products, 0))
        return context.get_dummy_value()

    return signature, write
