"""The image pipeline against its recording and against cases that can be worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from celo_nnx.tasks import images


def test_equals_the_recorded_pipeline(shared: Path) -> None:
    golden = np.load(shared / "golden" / "image_pipeline.npz", allow_pickle=False)
    for given, grey, expected in (
        ("gray28_in", False, "gray28_out8"),
        ("gray28_in", True, "gray28_out8"),
        ("rgb32_in", True, "rgb32_out8_bw"),
        ("rgb32_in", False, "rgb32_out8"),
    ):
        out = images.prepare(golden[given], 8, grey)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, golden[expected], rtol=0, atol=1e-6)


def test_32_to_8_is_the_mean_of_the_central_four_pixels() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    blocks = raw.reshape(3, 8, 4, 8, 4, 3)[:, :, 1:3, :, 1:3]
    expected = blocks.mean(axis=(2, 4)).mean(axis=-1, keepdims=True) / 255
    np.testing.assert_allclose(images.prepare(raw, 8, True), expected, atol=1e-6)


def test_ramp_is_sampled_at_half_pixel_centres() -> None:
    ramp = np.tile(np.arange(28, dtype=np.uint8), (1, 28, 1))
    out = images.prepare(ramp, 8, True, scale=1.0)[0, 0, :, 0]
    np.testing.assert_allclose(out, 3.5 * (np.arange(8) + 0.5) - 0.5, atol=1e-5)


def test_enlarging_clamps_to_the_edge() -> None:
    out = images.resize_bilinear(np.array([[0, 100]], np.uint8).reshape(1, 1, 2, 1), 4)
    np.testing.assert_allclose(out[0, 0, :, 0], [0, 25, 75, 100])


def test_images_of_the_right_size_are_only_scaled_and_keep_their_order() -> None:
    raw = np.random.default_rng(0).integers(0, 17, (2 * images.BLOCK + 7, 8, 8), np.uint8)
    np.testing.assert_array_equal(
        images.prepare(raw, 8, True, scale=16.0)[..., 0], raw.astype(np.float32) / 16
    )


@pytest.mark.parametrize("grey", [True, False])
def test_channels(grey: bool) -> None:
    out = images.prepare(np.zeros((2, 5, 7, 3), np.uint8), 4, grey)
    assert out.shape == (2, 4, 4, 1 if grey else 3)
