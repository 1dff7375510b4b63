"""Where a kernel keeps each number of a block is learned from what it writes."""

import numpy as np
import pytest

from backends.vllm.cells import Shape, coordinate, places

SHAPE = Shape(2, 3, 8, 4)


def seen(kernel) -> dict[str, np.ndarray]:
    """What `kernel`, which turns numbers in our order into its own block, makes of coordinates."""
    return {
        axis: kernel(coordinate(SHAPE, axis)).reshape(-1).astype(float) for axis in SHAPE._fields
    }


def token_major(numbers: np.ndarray) -> np.ndarray:
    """Heads, tokens, then K beside V: what the tensor of that shape looks like."""
    return np.concatenate([numbers[0], numbers[1]], axis=-1)


def transposed(numbers: np.ndarray) -> np.ndarray:
    """All of K before all of V, and K with its tokens innermost, as CPU kernels have it."""
    return np.stack([numbers[0].transpose(0, 2, 1).reshape(3, 8, 4), numbers[1]], axis=1)


def paired(numbers: np.ndarray) -> np.ndarray:
    """K in pairs of dimensions, V in pairs of tokens, as a matrix unit takes them."""
    keys = numbers[0].reshape(3, 8, 2, 2).transpose(0, 2, 1, 3).reshape(3, 8, 4)
    values = numbers[1].reshape(3, 4, 2, 4).transpose(0, 1, 3, 2).reshape(3, 8, 4)
    return np.stack([keys, values], axis=1)


@pytest.mark.parametrize("kernel", [token_major, transposed, paired])
def test_a_block_is_read_back_in_the_order_of_the_layout(kernel) -> None:
    numbers = np.random.default_rng(3).normal(size=SHAPE)
    found = places(SHAPE, seen(kernel))
    np.testing.assert_array_equal(kernel(numbers).reshape(-1)[found], numbers.reshape(-1))


def test_a_kernel_that_rounds_what_it_keeps_is_refused() -> None:
    def scaled(numbers: np.ndarray) -> np.ndarray:
        return token_major(numbers) / 2

    with pytest.raises(ValueError, match="as they are"):
        places(SHAPE, seen(scaled))


def test_a_kernel_that_keeps_a_number_twice_is_refused() -> None:
    def twice(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([numbers[0], numbers[0]], axis=-1)

    with pytest.raises(ValueError, match="each number of a block once"):
        places(SHAPE, seen(twice))


def test_a_kernel_that_writes_only_some_of_a_block_is_refused() -> None:
    def some(numbers: np.ndarray) -> np.ndarray:
        block = token_major(numbers).copy()
        block[:, -1] = -1
        return block

    with pytest.raises(ValueError, match="as they are"):
        places(SHAPE, seen(some))


def test_a_block_with_more_numbers_than_its_layout_is_refused() -> None:
    def padded(numbers: np.ndarray) -> np.ndarray:
        return np.pad(token_major(numbers).reshape(-1), (0, 16))

    with pytest.raises(ValueError, match="a block has 208 numbers, its layout 192"):
        places(SHAPE, seen(padded))


def test_axes_too_long_for_exact_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="longer than 256"):
        places(Shape(1, 1, 512, 2), {})
