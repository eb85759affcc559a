"""models.rope: turned inner products depend on relative positions; turning is a complex product."""

import pytest
import torch

from lowrank_geo.models.rope import rotate, rotation

WIDTH = 16


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    return rotate(x[None], rotation(position, 1, WIDTH, theta=10000.0, like=x))[0]


@pytest.mark.parametrize("shift", [1, 7, 1000])
def test_inner_products_depend_on_the_difference_of_positions_only(shift):
    q, k = torch.randn(2, WIDTH, dtype=torch.float64)
    here = turned(q, 5) @ turned(k, 2)
    there = turned(q, 5 + shift) @ turned(k, 2 + shift)
    assert (here - there).abs() < 1e-11  # angles of 1000 rad are exact to 1e-13
    assert (here - turned(q, 6) @ turned(k, 2)).abs() > 1e-3


def test_turning_is_a_complex_product_of_coordinates_i_and_i_plus_half():
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    positions = torch.arange(2, 6, dtype=torch.float64)
    frequency = 500.0 ** (-2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
    angle = positions[:, None] * frequency
    half = WIDTH // 2
    expected = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    result = rotate(x, rotation(2, 4, WIDTH, theta=500.0, like=x))
    assert torch.allclose(result[..., :half], expected.real, rtol=0, atol=1e-14)
    assert torch.allclose(result[..., half:], expected.imag, rtol=0, atol=1e-14)


def test_angles_keep_float32_when_the_model_is_bfloat16():
    x = torch.randn(1, 1, 300, WIDTH)
    turn = rotation(0, 300, WIDTH, theta=10000.0, like=x.bfloat16())
    assert turn.cos.dtype == torch.float32
    assert rotate(x.bfloat16(), turn).dtype == torch.bfloat16


def test_position_zero_leaves_x_as_it_is():
    x = torch.randn(WIDTH)
    assert torch.equal(turned(x, 0), x)
