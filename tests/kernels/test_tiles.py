"""Tiles of the Triton kernels: the default, a table, and what is refused."""

from __future__ import annotations

import pytest

from hicache_kernels.tiles import Tile, default, key, override, read_table, tile, write_table


def test_default_and_override():
    assert tile("update_", 3, 2, 1) == default(3, 2) == Tile()
    wide = Tile(block=2048, num_warps=8)
    with override({key("update_", 3, 2, 1): wide}):
        assert tile("update_", 3, 2, 1) is wide
        assert tile("update_", 3, 4, 1) == Tile()
    assert tile("update_", 3, 2, 1) == Tile()


def test_many_features_share_a_tile():
    assert key("gated_sum", 3, 2, 76) == key("gated_sum", 3, 2, 114) != key("gated_sum", 3, 2, 1)


def test_table_survives_a_file(tmp_path):
    table = {key("gated_sum", 3, 2, 76): Tile(rows=8, columns=128, num_stages=3)}
    write_table(tmp_path / "tiles.json", table)
    assert read_table(tmp_path / "tiles.json") == table


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": {"blocks": 1}}', '{"a": {"block": 1000}}', '{"a": {"num_warps": "4"}}']
)
def test_bad_table(text, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json: expected a JSON table of tiles with block, rows"):
        read_table(path)
    with pytest.raises(ValueError, match=r"expected a JSON table"):
        read_table(tmp_path / "nothing.json")
