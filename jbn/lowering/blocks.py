"""How many blocks to split rows into: short, on one device each, or within a cache."""

import math

from jbn.axes import is_static
from jbn.lowering.cpu import fuses_sums
from jbn.lowering.late import ENABLED, SHAPES, Target, expected_platform


# Longest plain sum. XLA on CPU adds sequentially, and the rounding error of n additions
# grows like the square root of n, or faster.
_BLOCK_ROWS = 2048
# The same if parts are added in parallel: split sums on a CPU, rows of a tile on a TPU.
_SPLIT_BLOCK_ROWS = 8 * _BLOCK_ROWS
# Rows of an image that is one block on a TPU. There, a sum over several images, or part
# of an image, takes a separate pass, but a sum over each image does not.
_LEAST_IMAGE_ROWS, _MOST_IMAGE_ROWS = 128, 1 << 16
# A loop over blocks of rows. On a CPU several blocks fit into a core's cache, and sums
# within a matrix product, which XLA may add sequentially, are short. Elsewhere a block
# is spread over the device, and a few of them keep temporary arrays small.
_LOOP_ELEMENTS, _LOOP_ROWS, _LOOP_COUNT = 1 << 15, 1024, 8


def num_shards(target: Target, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """The number of devices that the first of `axes` may be sharded over."""
    first = shape[axes[0]] if axes else 1
    if not isinstance(first, int) or not first:
        return 1
    return math.gcd(first, target.shards)


def block_counts(
    target: Target, shape: tuple[int, ...], axes: tuple[int, ...], shards: int
) -> dict[int, int]:
    """The number of equal blocks to split each reduced axis into.

    The first one, along which batches are sharded, gets a multiple of `shards`.
    """
    if target == SHAPES or not is_static([shape[a] for a in axes]):
        return {a: 1 for a in axes}
    rows = math.prod(shape[a] for a in axes)
    number = None
    if target.platform == "gpu" or fuses_sums(target):
        # Thousands of threads add, or vectors that are added in pairs: no sum is long.
        number = shards
    elif target.platform == "tpu":
        if rows <= _SPLIT_BLOCK_ROWS * shards:
            number = shards
        elif _LEAST_IMAGE_ROWS <= rows // shape[axes[0]] <= _MOST_IMAGE_ROWS:
            number = shape[axes[0]]
    if number is not None:
        return {a: number if a == axes[0] else 1 for a in axes}
    wanted = rows / (_SPLIT_BLOCK_ROWS if target.one_cpu else _BLOCK_ROWS)
    counts = {}
    for a in axes:
        base = shards if a == axes[0] else 1
        last = min(shape[a], math.ceil(4 * wanted) * base)
        divisors = [c for c in range(base, last + 1, base) if shape[a] % c == 0]
        divisors = divisors or [base]
        counts[a] = next((c for c in divisors if c >= wanted), divisors[-1])
        wanted /= counts[a]
    return counts


def segment_block_counts(
    shape: tuple[int, ...], axes: tuple[int, ...], ids: tuple[int, ...], num: int
) -> dict[int, int]:
    """The number of blocks of each axis, for sums by id and sums within one id.

    Each block has all segments. So the number of blocks is limited such that the
    statistics have at most an eighth of the size of the rows.
    """
    if not is_static([shape[a] for a in axes]):
        return {a: 1 for a in axes}
    most = max(1, math.prod(shape[a] for a in axes) // (8 * num))
    counts = {}
    for summed, longest in (
        ([a for a in axes if ids[a] != 1], _BLOCK_ROWS),
        # These are summed first, in one loop; splitting them would need more ids.
        ([a for a in axes if ids[a] == 1], 4 * _BLOCK_ROWS),
    ):
        wanted = math.ceil(math.prod(shape[a] for a in summed) / longest)
        for a in sorted(summed, key=lambda a: -shape[a]):
            counts[a] = max(1, min(wanted, shape[a], most))
            wanted, most = -(-wanted // counts[a]), most // counts[a]
    return counts


def loop_rows(rows: int, features: int, least: int) -> int:
    """The number of rows of each block, but the last, of a loop over rows.

    `least` limits the number of blocks. A loop is traced for one platform: the one that
    is expected.
    """
    if not ENABLED:
        return rows
    if expected_platform() == "cpu":
        block = min(_LOOP_ELEMENTS // max(1, features), _LOOP_ROWS)
    else:
        block = -(-rows // _LOOP_COUNT)
    return min(rows, max(block, least))
