"""The grid that `fastdiff sample` writes."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiff.cli import output


def test_grid_puts_each_image_in_its_place():
    values = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
    images = np.broadcast_to(values[:, None, None, None], (5, 3, 70, 70)).copy()
    drawn = output.grid(images, columns=2)
    assert (drawn.mode, drawn.size) == ("RGB", (2 * 72 + 2, 3 * 72 + 2))
    for index, value in enumerate((0, 64, 128, 191, 255)):
        for corner in (2, 71):
            place = (index % 2 * 72 + corner, index // 2 * 72 + corner)
            assert drawn.getpixel(place) == (value, value, value)
    assert drawn.getpixel((1, 1)) == (255, 255, 255)
    assert drawn.crop((74, 146, 144, 216)).getextrema() == ((0, 0),) * 3, "the place of a sixth image"


@pytest.mark.parametrize(
    ("count", "columns"),
    [(1, 1), (2, 2), (3, 3), (5, 5), (7, 3), (8, 4), (10, 5), (12, 4), (16, 4), (17, 5), (50, 10), (64, 8), (80, 10)],
)
def test_a_grid_is_full_where_the_count_allows_it(count, columns):
    assert output.columns_for(count) == columns
