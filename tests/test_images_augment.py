"""augment: image and mask move together, the same draw gives the same bits, the given image is left alone."""

import torch

from lowrank_geo.images.augment import augment, drop, turn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(h=24, w=24):
    mask = torch.zeros(h, w, dtype=torch.uint8)
    mask[4:12, 6:16] = 1
    return mask[None].float(), mask


def test_image_and_mask_move_together_and_shapes_stay():
    """With the mask as the image, they agree but for the border and what was blackened."""
    image, mask = pair(64, 48)
    for seed in range(40):
        moved, labels = augment(image, mask, generator(seed))
        assert moved.shape == image.shape and labels.shape == mask.shape
        assert labels.dtype == torch.uint8 and set(labels.unique().tolist()) <= {0, 1}
        assert (labels[(moved[0] > 0.75)] == 1).all()


def test_a_quarter_turn_is_rot90_and_mirrored_images_fill_the_corners():
    image, mask = pair()
    turned, labels = turn(image, mask, 90.0)
    assert torch.equal(labels, mask.rot90(1)) and torch.allclose(
        turned, image.rot90(1, (1, 2)), atol=1e-5
    )
    ones, _ = turn(torch.ones(1, 24, 24), None, 35.0)
    assert torch.allclose(ones, torch.ones(1, 24, 24), atol=1e-5)


def test_the_same_draw_gives_the_same_bits_and_leaves_the_image():
    image, mask = torch.rand(1, 32, 32), pair(32, 32)[1]
    before = image.clone()
    for seed in range(5):
        first, second = (augment(image, mask, generator(seed)) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(image, before)
    assert len({augment(image, None, generator(s))[0].sum().item() for s in range(20)}) > 8


def test_patches_are_black_squares_of_an_eighth():
    dropped = drop(torch.ones(3, 64, 64), generator(3))
    black = dropped == 0
    assert torch.equal(black[0], black[2]) and 64 <= black[0].sum() <= 640


def test_each_change_happens_in_three_of_ten_images():
    """Of 400 draws, 0.7⁴ = 24 % change nothing; four standard deviations are 8.5 %."""
    image = torch.rand(1, 16, 16)
    same = sum(torch.equal(augment(image, None, generator(s))[0], image) for s in range(400))
    assert abs(same / 400 - 0.7**4) < 0.085
